"""Why a training on several machines failed or waits, from what Kubernetes says about its pods."""

from __future__ import annotations

from typing import Any

import pytest

from components.distill.cause import PodEnd, cause_of, pod_end, reasons_to_wait

Json = dict[str, Any]


def pod(rank: int, status: int, attempt: int = 0, **more: Any) -> Json:
    labels = {
        "batch.kubernetes.io/job-completion-index": str(rank),
        "jobset.sigs.k8s.io/restart-attempt": str(attempt),
    }
    ended = {"exitCode": status, "reason": "Error", "finishedAt": f"2026-01-01T00:00:0{rank}Z", **more}
    container = {"name": "node", "state": {"terminated": ended}}
    return {
        "metadata": {"name": f"job-node-0-{rank}-x", "labels": labels},
        "status": {"phase": "Failed", "containerStatuses": [{"name": "daemon", "state": {}}, container]},
    }


def ends(*pods: Json) -> list[PodEnd]:
    return [end for end in map(pod_end, pods) if end]


@pytest.mark.parametrize(
    ("statuses", "rank"),
    [((79, 64), 1), ((64, 79), 0), ((137, 79), 0), ((79, 75, 137), 2), ((75, 79), 1), ((76, 1), 0), ((1, 137), 0)],
)  # fmt: skip
def test_the_node_that_says_most_is_the_cause(statuses: tuple[int, ...], rank: int) -> None:
    cause = cause_of(ends(*(pod(number, status) for number, status in enumerate(statuses))))
    assert cause
    assert (cause.rank, cause.status) == (rank, statuses[rank])


def test_the_last_attempt_decides() -> None:
    cause = cause_of(ends(pod(0, 64, attempt=0), pod(1, 137, attempt=1, reason="OOMKilled", message="last")))
    assert cause
    assert cause.sentence == (
        "node 1 (job-node-0-1-x) ended with exit status 137 (OOMKilled): it was killed, for its memory or by its machine"
    )
    assert cause.last_lines == "last"


def test_a_pod_that_kubernetes_took_away_says_so() -> None:
    evicted = pod(1, 75)
    evicted["status"]["conditions"] = [
        {"type": "DisruptionTarget", "status": "True", "reason": "EvictionByEvictionAPI", "message": "Eviction API: evicting"}
    ]  # fmt: skip
    cause = cause_of(ends(evicted, pod(0, 75)))
    assert cause
    assert "Eviction API: evicting" in next(end for end in ends(evicted)).sentence


def test_a_pod_that_runs_or_ended_well_is_no_end() -> None:
    assert pod_end(pod(0, 0)) is None
    assert pod_end({"metadata": {"name": "x"}, "status": {"phase": "Running"}}) is None


def conditions(kind: str, status: str, message: str) -> Json:
    return {"status": {"conditions": [{"type": kind, "status": status, "message": message}]}}


def test_who_holds_a_training_is_asked_why() -> None:
    suspended = conditions("Suspended", "True", "")
    held = conditions("QuotaReserved", "False", "insufficient unused quota for nvidia.com/gpu")
    assert reasons_to_wait(suspended, [held], [], []) == "Kueue: insufficient unused quota for nvidia.com/gpu"
    unscheduled = conditions("PodScheduled", "False", "0/2 nodes are available")
    assert (
        reasons_to_wait({}, [], [unscheduled, unscheduled], [])
        == "pod not scheduled: 0/2 nodes are available"
    )
    unknown = {
        "name": "node",
        "state": {"waiting": {"reason": "ImagePullBackOff", "message": "no such image"}},
    }
    quiet = {"name": "node", "state": {"waiting": {"reason": "ContainerCreating"}}}
    pods = [{"status": {"containerStatuses": [one]}} for one in (unknown, quiet)]
    assert reasons_to_wait({}, [], pods, []) == "ImagePullBackOff: no such image"
    assert reasons_to_wait({}, [], [], [{"message": "exceeded quota"}]) == "exceeded quota"
