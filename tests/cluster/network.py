"""The network of the played pods: a bridge in a network namespace of its own, on which every pod has an address and all its ports.

Nothing of it is on this machine's own network, so any number of test beds can run, and it ends with the process that made it.
A pod reaches other pods, and at 127.0.0.1 the ports of this machine that are named: the API server, the object store.
NetworkPolicies are not enforced.
"""

from __future__ import annotations

import ctypes
import os
import socket
import subprocess
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

HOST = "127.0.0.1"
CLONE_NEWNET = 0x40000000
LIBC = ctypes.CDLL(None, use_errno=True)


class Namespace:
    """A network namespace with a loopback device, held by a process that sleeps."""

    def __init__(self) -> None:
        script = "ip link set lo up; echo; exec sleep infinity"
        words = ["setpriv", "--pdeathsig", "KILL", "unshare", "--net", "sh", "-ec", script]
        self.process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
        assert self.process.stdout
        if not self.process.stdout.readline():
            raise RuntimeError("no network namespace could be made")

    @property
    def path(self) -> str:
        return f"/proc/{self.process.pid}/ns/net"

    def run(self, *words: str) -> None:
        """Run a command in it."""
        subprocess.run(["nsenter", f"--net={self.path}", *words], check=True)

    def listen(self, port: int) -> socket.socket:
        """A socket that listens in it on 127.0.0.1."""
        with ThreadPoolExecutor(1) as thread:  # the namespace is a property of a thread
            return thread.submit(self._listen, port).result()

    def _listen(self, port: int) -> socket.socket:
        with open(self.path) as namespace:
            if LIBC.setns(namespace.fileno(), CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        return socket.create_server((HOST, port), backlog=64)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


class PodNetwork(Namespace):
    """The namespace of a pod, joined to the bridge."""

    def __init__(self, bridge: Bridge, address: str, name: str, ports: Iterable[int]) -> None:
        super().__init__()
        pair = ["type", "veth", "peer", "name", name, "netns", str(bridge.process.pid)]
        subprocess.run(["ip", "link", "add", "eth0", "netns", str(self.process.pid), *pair], check=True)
        bridge.run("ip", "link", "set", name, "master", "pods", "up")
        self.run("ip", "address", "add", f"{address}/16", "dev", "eth0")
        self.run("ip", "link", "set", "eth0", "up")
        self.listeners = [self.listen(port) for port in ports]
        for listener in self.listeners:
            threading.Thread(target=_accept, args=(listener,), daemon=True).start()

    def close(self) -> None:
        for listener in self.listeners:
            with suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            listener.close()
        super().close()


class Bridge(Namespace):
    """What joins the pods."""

    def __init__(self) -> None:
        super().__init__()
        self.run("ip", "link", "add", "pods", "type", "bridge")
        self.run("ip", "link", "set", "pods", "up")


def _accept(listener: socket.socket) -> None:
    """Relay connections to the same port of this machine, until the listener is closed."""
    port = listener.getsockname()[1]
    with suppress(OSError):
        while True:
            client, _ = listener.accept()
            threading.Thread(target=_relay, args=(client, port), daemon=True).start()


def _relay(client: socket.socket, port: int) -> None:
    with client, suppress(OSError), socket.create_connection((HOST, port)) as server:
        back = threading.Thread(target=_copy, args=(server, client), daemon=True)
        back.start()
        _copy(client, server)
        back.join()


def _copy(source: socket.socket, sink: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(1 << 16):
            sink.sendall(data)
    with suppress(OSError):
        sink.shutdown(socket.SHUT_WR)
