"""The first step of a run looks for the queues in which its pods would wait."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest

from components.distill.kube import Kube
from components.prepare_run.parameters import RunParameters
from components.prepare_run.queues import _queues, check_queue, check_queues
from tests.components.conftest import Answers

Refusal = Callable[[Callable[[], object]], str]


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
