"""The entries of the ledger: what is known of the distillation of a teacher, and how its state may change. No file is read here."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any, Literal, NamedTuple, Self

from pydantic import BaseModel, ConfigDict

from dmd2.errors import Refused
from dmd2.io.local import json_digest
from dmd2.io.storage import join_uri

EntryState = Literal["waiting", "claimed", "running", "done", "failed", "quarantined"]
FREE: tuple[EntryState, ...] = ("waiting", "failed")
"""States in which an entry can be claimed."""
ACTIVE: tuple[EntryState, ...] = ("claimed", "running")
"""States in which a claim holds the entry."""
ENTRIES = "entries/"
"""Folder of the entries in that of the ledger; like the fields below it is a stored format."""


class LedgerObject(BaseModel):
    """A JSON object of the ledger."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class WorkItem(LedgerObject):
    """One distillation of a teacher; it is done once."""

    teacher: str
    """Digest of the teacher."""
    recipe: str
    """Digest of the settings that every teacher shares: recipe, overrides, data, gate."""
    image: str
    """Digest of the container images of the pipeline."""

    @property
    def key(self) -> str:
        """Name of the entry. It begins with the teacher, so that the entries of a teacher are sorted together."""
        return f"{self.teacher[:16]}-{json_digest(self.model_dump())[:16]}"


class FailedRun(LedgerObject):
    """A run that failed or was cancelled, or could not be started."""

    claim: str
    run: str
    """KFP id of the run; empty if the platform refused to start it."""
    reason: str
    at: datetime
    counted: bool = True
    """Whether it counts towards the quarantine; a failure of the infrastructure does not."""
    gpu_hours: float | None = None
    """GPU-hours of the run; None if they are not known."""


class LedgerEntry(LedgerObject):
    """The state of a work item, and its history."""

    work: WorkItem
    teacher: str
    """Address of the teacher."""
    state: EntryState
    reason: str = ""
    """Reason of the state."""
    changed: datetime
    claim: str = ""
    """Token of the current claim, or of the last one."""
    owner: str = ""
    """KFP id of the watcher's run that made the claim."""
    expires: datetime | None = None
    """End of the lease: if no run has started by then, check whether the watcher has died."""
    run: str = ""
    """KFP id of the run of this claim, once it is known."""
    begun: bool = False
    """Whether the run of this claim has presented its claim. One that has not can be given up: it will be refused."""
    stopping: str = ""
    """Why a watcher has requested the termination of the run."""
    claims: int = 0
    """Number of claims so far."""
    failures: tuple[FailedRun, ...] = ()
    decision: str = ""
    """Decision of the gate, once the entry is done."""
    package: str = ""
    """Address of the package, if the gate accepted the student."""
    gpu_hours: float | None = None
    """GPU-hours that the run of a done entry has reported."""

    def holds(self, claim: str) -> bool:
        """Whether this claim holds the entry. A claim that has lost the entry never holds it again."""
        return self.state in ACTIVE and self.claim == claim

    def is_run_of(self, claim: str, run: str) -> bool:
        """Whether `run` is the run of this claim, running or ended."""
        return bool(run) and (self.claim, self.run) == (claim, run)

    def was_released(self, claim: str) -> bool:
        """Whether the last claim was this one, and no run was started for it."""
        known = any(failure.claim == claim for failure in self.failures)
        return self.state == "waiting" and self.claim == claim and not known

    def spent(self, claim: str, reserved: float) -> float:
        """GPU-hours of a claim that does not hold: what its run has reported, or else what was reserved."""
        ended = {failure.claim: failure.gpu_hours for failure in self.failures}
        if self.state == "done":
            ended[self.claim] = self.gpu_hours
        hours = 0.0 if self.was_released(claim) else ended.get(claim)
        return reserved if hours is None else hours

    @property
    def counted_failures(self) -> int:
        return sum(failure.counted for failure in self.failures)

    def with_state(self, state: EntryState, at: datetime, **changes: Any) -> Self:
        """The entry in another state, without a reason unless one is given."""
        return self.model_copy(update={"state": state, "changed": at, "reason": "", **changes})

    @property
    def summary(self) -> str:
        """The state of the entry as a clause of a sentence."""
        by_run = f" by run {self.run}" if self.run else ""
        return f"entry {self.work.key} of teacher {self.teacher} is {self.state}{by_run}"


class LoggedChange(LedgerObject):
    """What a file in the log of a claim changes in the entry: the fields that are not None."""

    state: EntryState | None = None
    reason: str | None = None
    changed: datetime | None = None
    run: str | None = None
    begun: bool | None = None
    stopping: str | None = None
    failures: tuple[FailedRun, ...] | None = None
    decision: str | None = None
    package: str | None = None
    gpu_hours: float | None = None

    @property
    def fields(self) -> dict[str, Any]:
        found = {name: getattr(self, name) for name in LoggedChange.model_fields}
        return {name: value for name, value in found.items() if value is not None}

    @classmethod
    def between(cls, before: LedgerEntry, after: LedgerEntry) -> Self:
        values = {name: getattr(after, name) for name in cls.model_fields}
        return cls(**{name: value for name, value in values.items() if value != getattr(before, name)})


class Claim(NamedTuple):
    """The right of one run to work on an entry."""

    ledger: str
    key: str
    token: str

    @property
    def text(self) -> str:
        """The claim as a pipeline parameter: address of the entry, `#`, token."""
        return f"{join_uri(self.ledger, ENTRIES + self.key)}.json#{self.token}"

    @classmethod
    def read(cls, text: str) -> Claim:
        """The inverse of `text`."""
        address, _, token = text.rpartition("#")
        ledger, _, name = address.rpartition(f"/{ENTRIES}")
        key = name.removesuffix(".json")
        if not (ledger and token and key != name and "/" not in key):
            raise Refused(
                f"claim is {text!r}, which is not LEDGER/entries/KEY.json#TOKEN; leave it empty, retraining fills it"
            )
        return cls(ledger, key, token)


# State transitions: each returns the new entry, or the same object if nothing changes.


def apply_claim(
    entry: LedgerEntry, claim: str, owner: str, teacher: str, at: datetime, expires: datetime
) -> LedgerEntry:
    """free -> claimed; an entry that is not free stays as it is."""
    if entry.state not in FREE:
        return entry
    changes = {"claim": claim, "owner": owner, "teacher": teacher, "expires": expires, "run": ""}
    return entry.with_state("claimed", at, claims=entry.claims + 1, begun=False, stopping="", **changes)


def apply_release(entry: LedgerEntry, claim: str, reason: str, at: datetime) -> LedgerEntry:
    """claimed -> waiting, for a claim without a run; any other entry stays as it is."""
    if entry.state == "claimed" and entry.claim == claim:
        return entry.with_state("waiting", at, reason=reason)
    return entry


def apply_run(entry: LedgerEntry, claim: str, run: str, at: datetime) -> LedgerEntry:
    """claimed -> running. Recording the same run again changes nothing; a second run of a claim is refused."""
    if entry.is_run_of(claim, run):
        return entry
    if entry.state == "claimed" and entry.claim == claim:
        return entry.with_state("running", at, run=run)
    raise Refused(f"{entry.summary}; run {run} has no claim on it and gives way")


def apply_begin(entry: LedgerEntry, claim: str, run: str, at: datetime) -> LedgerEntry:
    """claimed or running -> running, begun. A run whose claim is over is refused."""
    entry = apply_run(entry, claim, run, at)
    if entry.state != "running":
        raise Refused(f"{entry.summary}; that run is over and gives way")
    return entry if entry.begun else entry.model_copy(update={"begun": True})


def apply_overdue(
    entry: LedgerEntry, claim: str, run: str, reason: str, at: datetime, patience: timedelta
) -> LedgerEntry:
    """running -> running, with the reason why the run is to be stopped. The entry is given up at once if the run has not
    begun, and after `patience` if the platform does not say that it has ended."""
    if not (entry.is_run_of(claim, run) and entry.state == "running"):
        return entry
    if entry.begun and not entry.stopping:
        return entry.with_state("running", at, stopping=reason)
    if entry.begun and at - entry.changed < patience:
        return entry
    hours = None if entry.begun else 0.0
    return _with_failure(
        entry, FailedRun(claim=claim, run=run, reason=reason, at=at, counted=False, gpu_hours=hours)
    )


def apply_done(
    entry: LedgerEntry,
    claim: str,
    run: str,
    decision: str,
    package: str,
    gpu_hours: float | None,
    at: datetime,
) -> LedgerEntry:
    """running -> done, for a run that succeeded, whether its gate accepted the student or not."""
    if entry.is_run_of(claim, run) and entry.state == "running":
        return entry.with_state("done", at, decision=decision, package=package, gpu_hours=gpu_hours)
    if entry.is_run_of(claim, run) and entry.state == "done":
        return entry
    raise Refused(f"{entry.summary}; that run {run} is done is not recorded")


def apply_failed(entry: LedgerEntry, failure: FailedRun, max_failures: int) -> LedgerEntry:
    """claimed (if it could not be started) or running -> waiting, if the failure does not count, failed, or quarantined
    after `max_failures` that count; only a person can release an entry from quarantine."""
    if any((failure.claim, failure.run) == (known.claim, known.run) for known in entry.failures):
        return entry
    if not (entry.holds(failure.claim) and entry.run == failure.run):
        raise Refused(f"{entry.summary}; that run {failure.run} failed is not recorded")
    return _with_failure(entry, failure, max_failures)


def _with_failure(entry: LedgerEntry, failure: FailedRun, max_failures: int = 1) -> LedgerEntry:
    changes = {"failures": (*entry.failures, failure), "reason": failure.reason}
    if not failure.counted:
        return entry.with_state("waiting", failure.at, **changes)
    count = entry.counted_failures + 1
    if count < max_failures:
        return entry.with_state("failed", failure.at, **changes)
    times = f"failed {count} times, at last: " if count > 1 else ""
    return entry.with_state("quarantined", failure.at, **changes | {"reason": times + failure.reason})
