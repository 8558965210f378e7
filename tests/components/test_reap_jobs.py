"""Which TrainJobs the reaper deletes, asked over HTTP of a server that speaks the few calls it makes."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.server import ThreadingHTTPServer
from typing import Any

import pytest
from kubernetes import client

from components.distill.kube import Kube
from components.reap_jobs.reap import reap
from tests.bucket import QuietHandler

Json = dict[str, Any]
NOW = datetime(2026, 1, 10, tzinfo=UTC)
JOBS = "/apis/trainer.kubeflow.org/v1alpha1/namespaces/dmd2/trainjobs"
WORKFLOWS = "/apis/argoproj.io/v1alpha1/namespaces/dmd2/workflows"


class Server(ThreadingHTTPServer):
    """Objects by their path; deletes only with the right uid."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.objects: dict[str, Json] = {}
        self.asked: list[str] = []


class Handler(QuietHandler):
    server: Server

    def do_GET(self) -> None:  # noqa: N802 - as the base class calls it
        path, _, query = self.path.partition("?")
        self.server.asked.append(f"GET {self.path}")
        if path == JOBS:
            assert query == "labelSelector=app.kubernetes.io%2Fpart-of%3Ddmd2"
            jobs = [one for name, one in self.server.objects.items() if name.startswith(JOBS)]
            self.send_json({"items": jobs})
        elif path in self.server.objects:
            self.send_json(self.server.objects[path])
        else:
            self.send_json({"message": "not found"}, 404)

    def do_DELETE(self) -> None:  # noqa: N802 - as the base class calls it
        self.server.asked.append(f"DELETE {self.path}")
        body = json.loads(self.body())
        assert body["propagationPolicy"] == "Background"
        found = self.server.objects.get(self.path)
        if not found or body["preconditions"]["uid"] != found["metadata"]["uid"]:
            self.send_json({"message": "another uid"}, 409 if found else 404)
            return
        del self.server.objects[self.path]
        self.send_json({"status": "Success"})


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def kube(server: Server, monkeypatch: pytest.MonkeyPatch) -> Kube:
    settings = client.Configuration(host=f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(client.Configuration, "_default", settings)
    return Kube("dmd2")


def ago(**parts: float) -> str:
    return (NOW - timedelta(**parts)).strftime("%Y-%m-%dT%H:%M:%SZ")


def add_job(server: Server, name: str, workflow: str = "w", created: str = "", **ended: str) -> None:
    owners = [{"kind": "Workflow", "name": workflow, "uid": f"uid-{workflow}"}] if workflow else []
    meta = {
        "name": name, "uid": f"uid-{name}", "creationTimestamp": created or ago(hours=30), "ownerReferences": owners,
    }  # fmt: skip
    conditions = [{"type": kind, "status": "True", "lastTransitionTime": at} for kind, at in ended.items()]
    server.objects[f"{JOBS}/{name}"] = {"metadata": meta, "status": {"conditions": conditions}}


def add_workflow(server: Server, name: str = "w", **status: str) -> None:
    server.objects[f"{WORKFLOWS}/{name}"] = {"metadata": {"uid": f"uid-{name}"}, "status": status}


def test_the_job_of_a_run_that_goes_on_is_left_alone(server: Server, kube: Kube) -> None:
    add_workflow(server, phase="Running")
    add_job(server, "training")
    add_job(server, "ended-an-hour-ago", Complete=ago(hours=1))
    add_job(server, "by-hand", workflow="")
    assert reap(kube, NOW) == []
    assert len(server.objects) == 4


def test_jobs_of_workflows_that_are_gone_or_have_ended_are_deleted(server: Server, kube: Kube) -> None:
    add_workflow(server, "terminated", phase="Failed", finishedAt=ago(hours=1))
    add_workflow(server, "just-ended", phase="Failed", finishedAt=ago(minutes=5))
    add_job(server, "of-terminated", "terminated")
    add_job(server, "of-just-ended", "just-ended")
    add_job(server, "of-gone", "gone")
    add_job(server, "new", "gone", created=ago(minutes=1))
    assert reap(kube, NOW) == ["of-terminated", "of-gone"]
    assert {name.rpartition("/")[2] for name in server.objects if name.startswith(JOBS)} == {
        "of-just-ended",
        "new",
    }


def test_another_workflow_of_the_same_name_is_not_the_owner(server: Server, kube: Kube) -> None:
    add_workflow(server, phase="Running")
    server.objects[f"{WORKFLOWS}/w"]["metadata"]["uid"] = "another"
    add_job(server, "orphan")
    assert reap(kube, NOW) == ["orphan"]


def test_a_job_that_ended_yesterday_is_deleted_and_its_state_logged(
    server: Server, kube: Kube, caplog: pytest.LogCaptureFixture
) -> None:
    add_workflow(server, phase="Running")
    add_job(server, "old", Failed=ago(hours=25))
    with caplog.at_level("INFO"):
        assert reap(kube, NOW) == ["old"]
    assert '"type": "Failed"' in caplog.text


def test_a_job_that_somebody_else_has_deleted_or_made_anew_is_no_error(
    server: Server, kube: Kube, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_job(server, "orphan", "gone")
    real = kube.custom.delete_namespaced_custom_object

    def delete(*where: str, **given: Any) -> Any:
        server.objects[f"{JOBS}/orphan"]["metadata"]["uid"] = "another"
        return real(*where, **given)

    monkeypatch.setattr(kube.custom, "delete_namespaced_custom_object", delete)
    assert reap(kube, NOW) == []
    assert f"{JOBS}/orphan" in server.objects
