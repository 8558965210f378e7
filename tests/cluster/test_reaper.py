"""The CronJob of the component `reaper`, with its own account, beside TrainJobs of all kinds."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from components.distill.cause import is_true
from components.distill.trainjob import ENDED
from components.reap_jobs.reap import OURS
from tests.cluster.conftest import Cluster, Json, asked_by, granted, owner_of, scripted, wait_for, workflow
from tests.manifests.test_policies import rendered

LABEL, VALUE = OURS.split("=")
PARTS = {
    "ServiceAccount/reaper",
    "Role/reap",
    "RoleBinding/reap",
    "CronJob/reaper",
    "NetworkPolicy/reaper-to-api-server",
}


@pytest.fixture(scope="module")
def reaper(cluster: Cluster) -> Iterator[None]:
    """The component, suspended: the tests start its job themselves."""
    cluster.bed  # noqa: B018 - Argo would end these Workflows itself
    parts = [one for one in rendered("dev+reaper") if f"{one['kind']}/{one['metadata']['name']}" in PARTS]
    assert len(parts) == len(PARTS)
    cluster.create(*parts)
    cluster.patch("cronjob", "reaper", {"spec": {"suspend": True}})
    yield
    for part in PARTS:
        cluster.kubectl("delete", part)


@pytest.fixture
def jobs(cluster: Cluster, reaper: None) -> Iterator[None]:
    """TrainJobs, each of a run or of a person."""
    ended = {"phase": "Failed", "finishedAt": "2026-01-01T00:00:00Z"}
    for name, status in {"goes-on": {"phase": "Running"}, "terminated": ended}.items():
        cluster.create(workflow(name) | {"status": status})
    make(cluster, "of-terminated", "terminated")
    make(cluster, "of-running", "goes-on")
    make(cluster, "finished", "goes-on", ends=True)
    make(cluster, "by-hand", ends=True)
    make(cluster, "of-others", "terminated", labels={})
    wait_for(lambda: all(has_ended(cluster.get("trainjob", name)) for name in ("finished", "by-hand")), 120)
    yield
    cluster.kubectl("delete", "trainjobs", "--all")
    cluster.kubectl("delete", "workflow", "goes-on", "terminated")


def make(
    cluster: Cluster, name: str, run: str = "", ends: bool = False, labels: dict[str, str] | None = None
) -> None:
    """A TrainJob that ends at once, or waits for ever."""
    job = scripted(name, cluster.image, "true", "true")
    job["metadata"]["labels"] = {LABEL: VALUE} if labels is None else labels
    if run:
        owner = owner_of(cluster.get("workflow", run)) | {"controller": False}
        job["metadata"]["ownerReferences"] = [owner]
    job["spec"]["suspend"] = not ends
    cluster.create(job)


def reap(cluster: Cluster, name: str, *arguments: str) -> str:
    """Start the job of the CronJob, with more arguments -> its log."""
    made: Json = json.loads(
        cluster.kubectl("create", "job", name, "--from=cronjob/reaper", "--dry-run=client", "-o", "json")
    )
    made["spec"]["template"]["spec"]["containers"][0]["args"] = list(arguments)
    cluster.create(made)
    done: Any = wait_for(lambda: cluster.get("job", name).get("status", {}).get("conditions"), 120)
    (pod,) = cluster.all("pods", f"job-name={name}")
    log = cluster.log(pod["metadata"]["name"])
    assert "Complete" in [one["type"] for one in done], log
    return log


def has_ended(job: Json) -> bool:
    return any(is_true(job, kind) for kind in ENDED)


def names(cluster: Cluster) -> set[str]:
    return {one["metadata"]["name"] for one in cluster.all("trainjobs")}


def test_the_reaper_deletes_what_nobody_follows_and_has_no_right_that_it_does_not_use(
    cluster: Cluster, jobs: None
) -> None:
    log = cluster.bed.folder / "audit.log"
    begun = log.stat().st_size
    assert "4 TrainJobs, 0 of them deleted" in reap(cluster, "reaper-1"), "they are younger than ten minutes"
    assert names(cluster) == {"of-terminated", "of-running", "finished", "by-hand", "of-others"}
    said = reap(cluster, "reaper-2", "--grace-minutes", "0", "--kept-hours", "0")
    assert "TrainJob of-terminated is deleted: its Workflow terminated has ended (Failed)" in said
    assert "TrainJob finished is deleted: it has ended, and its launcher has not deleted it" in said
    wait_for(lambda: names(cluster) == {"of-running", "by-hand", "of-others"}, 60)
    assert asked_by(log, "reaper", begun) == granted(cluster.get("role", "reap"))
