"""The first step of a run looks for the queues in which its pods would wait."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from http.server import ThreadingHTTPServer
from typing import Any, ClassVar

import pytest
from kubernetes import client

from components.distill.kube import Kube
from components.prepare_run.parameters import RunParameters
from components.prepare_run.queues import _queues, check_queue, check_queues
from tests.bucket import QuietHandler

Refusal = Callable[[Callable[[], object]], str]


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


def answer(name: str, status: int, reason: str) -> dict[str, tuple[int, Any]]:
    said = {"kind": "Status", "reason": reason, "message": f'localqueues "{name}" {reason}'}
    details = {"name": name, "group": "kueue.x-k8s.io", "kind": "localqueues"}
    path = f"/apis/kueue.x-k8s.io/v1beta2/namespaces/dmd2/localqueues/{name}"
    return {path: (status, said | {"details": details, "code": status})}


def test_a_queue_that_does_not_exist_is_refused(
    kube: Kube, refusal: Refusal, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = {"/apis/kueue.x-k8s.io/v1beta2/namespaces/dmd2/localqueues/dmd2": (200, {"kind": "LocalQueue"})}
    monkeypatch.setattr(Answers, "given", there | answer("typo", 404, "NotFound"))
    check_queue(kube, "dmd2")
    said = refusal(lambda: check_queue(kube, "typo"))
    assert "the LocalQueue typo is not in namespace dmd2, and pods would wait in it for ever" in said


def test_without_kueue_or_the_right_to_look_the_run_goes_on_and_says_so(
    kube: Kube, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(Answers, "given", answer("secret", 403, "Forbidden"))
    with caplog.at_level(logging.WARNING):
        check_queue(kube, "dmd2")
        check_queue(kube, "secret")
    assert [record.getMessage() for record in caplog.records] == [
        "whether the LocalQueue dmd2 exists is not known: Not Found",
        'whether the LocalQueue secret exists is not known: localqueues "secret" Forbidden',
    ]


def test_a_run_asks_for_the_queues_that_its_pods_name() -> None:
    run = RunParameters(gpus=8, queue="mine")
    assert list(_queues(run, "trainjob")) == ["dmd2", "mine"]
    assert list(_queues(run, "here")) == ["dmd2"]
    assert list(_queues(RunParameters(gpus=0), "here")) == []
    assert list(_queues(RunParameters(gpus=0, queue=""), "trainjob")) == []
    check_queues(run, "trainjob")  # there is no cluster here
