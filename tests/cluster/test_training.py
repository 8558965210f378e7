"""A distillation on two nodes through the launcher, and its faults by real means, on the servers of the test bed."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from components.failure import read_failure
from dmd2.io.storage import open_store
from tests.cluster.conftest import LONG, Cluster, Json, Run, scripted, student, wait_for, wait_until_gone

NewRun = Callable[..., Run]


def test_two_trainings_at_once_plain_and_through_kueue_learn_what_two_processes_of_one_machine_learn(
    cluster: Cluster, new_training: NewRun, weights: dict[str, str]
) -> None:
    runs = [new_training(LONG, queue=queue) for queue in ("", "dmd2")]
    pods = [run.start() for run in runs]
    jobs = [run.job for run in runs]
    for run, pod, job in zip(runs, pods, jobs, strict=True):
        assert run.wait(pod) == 0, cluster.log(pod)
        assert student(f"{run.root}/run") == weights
        said = cluster.log(pod)
        assert f"TrainJob {job}: 2 nodes" in said
        assert "steps/s" in said or "distill: " in said, "the log of rank 0"
        wait_until_gone(cluster, job)
        record = run.record()
        assert record["exit_status"] == 0
        assert record["trainjob"]["metadata"]["name"] == job
        owners = record["trainjob"]["metadata"]["ownerReferences"]
        assert [owner["name"] for owner in owners] == [run.name]


def test_a_pod_that_is_evicted_costs_a_restart_that_is_not_counted_and_no_step(
    cluster: Cluster, new_training: NewRun, weights: dict[str, str]
) -> None:
    run = new_training(LONG)
    pod = run.start()
    cluster.evict(run.training_pods()[1]["metadata"]["name"])
    assert run.wait(pod) == 0, cluster.log(pod)
    assert student(f"{run.root}/run") == weights
    (jobset,) = run.record()["jobset"]
    assert (jobset["restarts"], jobset.get("restartsCountTowardsMax", 0)) == (1, 0)


def test_a_launcher_that_starts_again_follows_the_job_that_is_there(
    cluster: Cluster, new_training: NewRun, weights: dict[str, str]
) -> None:
    run = new_training(LONG)
    first = run.start()
    run.training_pods()
    (job,) = cluster.all("trainjobs", f"dmd2/run={run.name}")
    cluster.kubectl("delete", "pod", first, "--force", "--grace-period=0")
    second = run.start()
    assert run.wait(second) == 0, cluster.log(second)
    assert "is there already, and is followed on" in cluster.log(second)
    assert run.record()["trainjob"]["metadata"]["uid"] == job["metadata"]["uid"]
    assert student(f"{run.root}/run") == weights


@pytest.mark.parametrize(
    ("change", "status", "sentence"),
    [("distill.batch=7", 64, "batch"), ("distill.student.lr=1e30 distill.critic.lr=1e30", 76, "became ")],
    ids=["wrong input", "diverged"],
)
def test_what_would_fail_again_fails_at_once_and_the_step_says_why(
    cluster: Cluster, new_training: NewRun, change: str, status: int, sentence: str
) -> None:
    run = new_training(f"{LONG} {change}")
    pod = run.start()
    job = run.job
    assert run.wait(pod) == status, cluster.log(pod)
    assert sentence in cluster.log(pod)
    record = run.record()
    assert record["jobset"][0].get("restarts", 0) == 0
    assert f"exit status {status}" in record["sentence"]
    failure = read_failure(run.root, run.name)
    assert failure
    assert failure.status == status
    wait_until_gone(cluster, job)


def test_the_workflow_takes_its_training_with_it(cluster: Cluster, new_training: NewRun) -> None:
    run = new_training(f"{LONG} distill.steps=100000")
    run.start()
    run.training_pods()
    job = run.job
    cluster.kubectl("delete", "workflow", run.name)
    wait_until_gone(cluster, job)
    assert open_store(run.root).has_objects("run/"), "what was saved stays"


@pytest.mark.parametrize(
    ("one", "other", "restarts", "counted"),
    [
        ("exit 64", "exit 64", 0, 0),
        ("sleep 2; exit 64", "sleep 2.3; exit 79", 0, 0),
        ("sleep 2; exit 64", "sleep 2.3; exit 75", 0, 0),
        ("exit 1", "exit 1", 3, 3),
        ("sleep 2; exit 137", "sleep 2.3; exit 79", 3, 3),
        ("sleep 2; exit 137", "sleep 2.3; exit 75", 3, 3),
        ("exit 75", "exit 75", 3, 3),
    ],
)
def test_only_what_kubernetes_takes_away_restarts_without_being_counted(
    cluster: Cluster, one: str, other: str, restarts: int, counted: int, request: pytest.FixtureRequest
) -> None:
    name = f"scripted-{abs(hash((one, other))) % 10**8}"
    cluster.create(scripted(name, cluster.image, one, other))
    try:
        wait_for(lambda: ended(cluster.get("trainjob", name)), 300)
        status: Json = cluster.get("jobset", name)["status"]
        assert (status.get("restarts", 0), status.get("restartsCountTowardsMax", 0)) == (restarts, counted)
    finally:
        cluster.kubectl("delete", "trainjob", name)


def ended(job: Json) -> bool:
    return any(
        one["type"] in ("Complete", "Failed") and one["status"] == "True"
        for one in job.get("status", {}).get("conditions", [])
    )
