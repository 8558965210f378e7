"""Why a training on several machines ended, or does not begin, from what Kubernetes says about its pods. No request is made here."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from pydantic import BaseModel

from components.failure import FINAL, severity
from dmd2.errors import EXIT_RANK_LOST, EXIT_RESTARTABLE

Json = dict[str, Any]
CONTAINER = "node"
MEANINGS = FINAL | {
    137: "it was killed, for its memory or by its machine",
    EXIT_RANK_LOST: "it lost another node",
    EXIT_RESTARTABLE: "it was told to stop, and saved",
}
"""Exit statuses of a node -> what they mean."""
QUIET = {"ContainerCreating", "PodInitializing"}
"""Reasons of a container that waits for nothing unusual."""


class PodEnd(BaseModel):
    """How a pod of a training ended."""

    pod: str
    rank: int
    """Index of the node."""
    attempt: int
    """Restarts of the gang before."""
    status: int
    reason: str = ""
    disrupted: str = ""
    """Why Kubernetes took the pod away, if it did."""
    finished: str = ""
    last_lines: str = ""

    @property
    def sentence(self) -> str:
        meaning = self.disrupted or MEANINGS.get(self.status, "")
        why = f": {meaning}" if meaning else ""
        return (
            f"node {self.rank} ({self.pod}) ended with exit status {self.status}"
            + (f" ({self.reason})" if self.reason not in ("", "Error") else "")
            + why
        )


def pod_end(pod: Json) -> PodEnd | None:
    """How a pod ended; None if it has not, or well."""
    meta, status = pod["metadata"], pod.get("status", {})
    disruption = _condition(pod, "DisruptionTarget")
    ended = next((one for one in _containers(pod) if "terminated" in one.get("state", {})), None)
    state = ended["state"]["terminated"] if ended else {}
    code = state.get("exitCode", 0 if status.get("phase") != "Failed" else 1)
    if not code:
        return None
    labels = meta.get("labels", {})
    return PodEnd(
        pod=meta["name"], rank=int(labels.get("batch.kubernetes.io/job-completion-index", 0)),
        attempt=int(labels.get("jobset.sigs.k8s.io/restart-attempt", 0)), status=code, reason=state.get("reason", status.get("reason", "")),
        disrupted=disruption.get("message", "") or disruption.get("reason", "") if disruption else "",
        finished=state.get("finishedAt", ""), last_lines=state.get("message", ""),
    )  # fmt: skip


def cause_of(ends: Iterable[PodEnd]) -> PodEnd | None:
    """The end that explains the others: of the last attempt, the one with the most specific exit status, then the first."""
    found = sorted(ends, key=lambda end: (-end.attempt, severity(end.status), end.finished, end.rank))
    return found[0] if found else None


def reasons_to_wait(
    trainjob: Json, workloads: Iterable[Json], pods: Sequence[Json], warnings: Iterable[Json]
) -> str:
    """Why a training does not run yet, in the words of whoever holds it; empty if nobody says."""
    if is_true(trainjob, "Suspended"):
        told = [_held(one) for one in workloads]
        return "; ".join(filter(None, told)) or "it is suspended"
    told = [reason for pod in pods for reason in _pod_waits(pod)]
    if told or pods:
        return "; ".join(dict.fromkeys(told))
    return next((event["message"] for event in warnings), "")


def _held(workload: Json) -> str:
    """What Kueue says about a workload that it does not admit."""
    for kind in ("QuotaReserved", "Admitted"):
        found = _condition(workload, kind, "False")
        if found:
            return f"Kueue: {found.get('message') or found.get('reason')}"
    return "" if _condition(workload, "Admitted") else "Kueue has not looked at it yet"


def _pod_waits(pod: Json) -> Iterator[str]:
    if found := _condition(pod, "PodScheduled", "False"):
        yield f"pod not scheduled: {found.get('message') or found.get('reason')}"
    for one in _containers(pod):
        waiting = one.get("state", {}).get("waiting", {})
        if waiting.get("reason", "ContainerCreating") not in QUIET:
            yield f"{waiting['reason']}: {waiting.get('message', '')}".rstrip(": ")


def is_true(item: Json, kind: str) -> bool:
    return bool(_condition(item, kind))


def condition_message(item: Json, kind: str) -> str:
    found = _condition(item, kind)
    return str(found.get("message") or found.get("reason", ""))


def _condition(item: Json, kind: str, status: str = "True") -> Json:
    found: list[Json] = item.get("status", {}).get("conditions") or []
    return next((one for one in found if (one["type"], one["status"]) == (kind, status)), {})


def _containers(pod: Json) -> list[Json]:
    """The training's container first: its end is the pod's."""
    status = pod.get("status", {})
    found: list[Json] = [
        *(status.get("initContainerStatuses") or []),
        *(status.get("containerStatuses") or []),
    ]
    return sorted(found, key=lambda one: one["name"] != CONTAINER)
