"""Imports what is slow to import, once, and forks processes that have it: `python -m tests.warm.server SOCKET OWNER`.

It runs no operation of torch and has one thread, so that a fork of it is a whole process. It ends with its owner.
"""

from __future__ import annotations

import atexit
import builtins
import gc
import importlib.util
import json
import os
import runpy
import selectors
import shutil
import signal
import socket
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

IMPORTED = (
    "torch", "torch._dynamo", "torch.distributed.checkpoint", "torch.distributed.fsdp", "torch.distributed.run", "torch.utils.data",
    "torch.utils.tensorboard", "torch.utils.flop_counter", "numpy", "scipy.linalg", "matplotlib.pyplot", "PIL.Image", "lmdb",
    "webdataset", "google.cloud.storage", "accelerate", "diffusers", "transformers", "peft",
    "dmd2.stages", "dmd2.cli", "dmd2.training.build", "dmd2.model", "tests.worker",
)  # fmt: skip
WITH_KFP = ("kfp.dsl.executor_main", "pipelines.__main__")
"""Imported first: KFP looks up the module of every frame of the stack, which takes longer among thousands of modules."""


@dataclass
class Server:
    listener: socket.socket
    waiting: dict[int, tuple[socket.socket, bool]] = field(default_factory=dict)
    """Of each process that runs: the connection of its client, and whether that leads a session."""
    selector: selectors.DefaultSelector = field(default_factory=selectors.DefaultSelector)

    def serve(self, owner: int) -> None:
        """Until the owner ends."""
        lasts = os.pidfd_open(owner)
        self.watch(lasts, lambda: None)
        self.watch(self.listener, self.accept)
        while lasts not in (ready := {key.fd: key.data for key, _ in self.selector.select()}):
            for action in ready.values():
                action()
        for pid in self.waiting:
            os.killpg(pid, signal.SIGKILL)

    def watch(self, what: Any, action: Callable[[], object]) -> None:
        self.selector.register(what, selectors.EVENT_READ, action)

    def accept(self) -> None:
        client = self.listener.accept()[0]
        head, descriptors, _, _ = socket.recv_fds(client, 8, 3)
        if len(head) < 8:  # killed before it could ask
            client.close()
            return
        asked = json.loads(_received(client, int.from_bytes(head, "big")))
        pid = os.fork()
        if not pid:
            _end(_status(lambda: self.become(asked, client, descriptors)))
        for descriptor in descriptors:
            os.close(descriptor)
        self.waiting[pid] = client, asked["leads"]
        ended = os.pidfd_open(pid)
        self.watch(client, lambda: self.lost(pid))
        self.watch(ended, lambda: self.ended(pid, ended))
        _tell(client, pid)

    def lost(self, pid: int) -> None:
        """The client was killed, so the process is."""
        client, leads = self.waiting[pid]
        self.selector.unregister(client)
        (os.killpg if leads else os.kill)(pid, signal.SIGKILL)

    def ended(self, pid: int, descriptor: int) -> None:
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        client, _ = self.waiting.pop(pid)
        self.selector.unregister(descriptor)
        os.close(descriptor)
        if client in self.selector.get_map():
            self.selector.unregister(client)
            _tell(client, status)
        client.close()

    def become(self, asked: dict[str, Any], client: socket.socket, descriptors: list[int]) -> None:
        """In the fork: be the process that was asked for."""
        client.close()
        for key in [*self.selector.get_map().values()]:
            os.close(key.fd)
        self.listener.detach()
        self.selector.close()
        os.setsid()
        for target, descriptor in enumerate(descriptors):
            os.dup2(descriptor, target)
            os.close(descriptor)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for number in asked["ignored"]:
            signal.signal(number, signal.SIG_IGN)
        os.environ.clear()
        os.environ.update(asked["environment"])
        os.chdir(asked["directory"])
        _run(asked["words"])


def _received(client: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size and (more := client.recv(size - len(data))):
        data += more
    return data


def _tell(client: socket.socket, number: int) -> None:
    try:
        client.sendall(f"{number}\n".encode())
    except BrokenPipeError:  # the next event says that it is gone
        return


def _run(words: list[str]) -> None:
    """`python WORDS`, with -u, -m MODULE, -c CODE or a script."""
    import numpy as np
    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    np.random.seed()
    if words[0] == "-u":
        sys.stdout.reconfigure(write_through=True)  # type: ignore[union-attr]
        words = words[1:]
    kind, *rest = words
    if kind == "-m":
        sys.argv, sys.path[0] = rest, os.getcwd()
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif kind == "-c":
        sys.argv, sys.path[0] = ["-c", *rest[1:]], ""
        main = sys.modules["__main__"] = ModuleType("__main__")
        main.__dict__["__builtins__"] = builtins
        exec(compile(rest[0], "<string>", "exec"), main.__dict__)
    elif kind.startswith("-"):
        raise SystemExit(f"a warm process knows no {kind}")
    else:
        sys.argv, sys.path[0] = words, str(Path(kind).parent)
        runpy.run_path(kind, run_name="__main__")


def _status(action: Callable[[], None]) -> int:
    """The exit status that Python gives to such an end."""
    try:
        action()
    except SystemExit as end:
        if isinstance(end.code, int) or end.code is None:
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        sys.excepthook(*sys.exc_info())
        return -signal.SIGINT
    except BaseException:
        sys.excepthook(*sys.exc_info())
        return 1
    return 0


def _end(status: int) -> None:
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    if status < 0:
        signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status & 0xFF)


def main(path: Path, owner: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for name in (*(WITH_KFP if importlib.util.find_spec("kfp") else ()), *IMPORTED):
        importlib.import_module(name)
    threads = os.listdir("/proc/self/task")
    assert len(threads) == 1, f"{len(threads)} threads; a fork would lose all but one"
    gc.collect()
    gc.freeze()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(64)
        print("ready", flush=True)
        try:
            Server(listener).serve(owner)
        finally:
            shutil.rmtree(path.parent, ignore_errors=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
