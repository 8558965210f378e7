"""An API server of Kubernetes that gives recorded answers."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from typing import Any, ClassVar

import pytest
from kubernetes import client

from components.distill.kube import Kube
from tests.bucket import QuietHandler


class Answers(QuietHandler):
    """Answers of a Kubernetes API server (1.36, with Kueue 0.19) by path."""

    given: ClassVar[dict[str, tuple[int, Any]]] = {}

    def do_GET(self) -> None:  # noqa: N802 - as the base class calls it
        status, body = self.given.get(self.path, (404, "404 page not found\n"))
        if isinstance(body, dict):
            self.send_json(body, status)
        else:
            self.send(status, body.encode(), Content_Type="text/plain")


@pytest.fixture
def kube() -> Iterator[Kube]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    before = client.Configuration.get_default_copy()
    client.Configuration.set_default(client.Configuration(host=f"http://127.0.0.1:{server.server_port}"))
    yield Kube("dmd2")
    client.Configuration.set_default(before)
    server.shutdown()
    server.server_close()
    thread.join()
