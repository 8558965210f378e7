"""The ledger of retraining: which teacher is distilled by which run, as one readable JSON file per work item.

A work item is (teacher, recipe, image), each by its digest. A watcher claims its entry by compare-and-swap. What happens to
a claim is appended to the log of the claim, as numbered files that are created and never replaced: a number is free for
one process only, and a run needs no right to overwrite or delete anything. An entry is its file and the log of its claim;
watchers write the one into the other. A claim has a token that is used once: the run with the token of an entry may work
on it, every other run is refused. So a run that starts late, twice, or for a claim that was released is refused before it
does anything. A watcher uses the clock of the platform, not its own; the lease of a claim only says when to check whether
its watcher has died. `places.json` limits the runs and GPU-hours of all entries together, and the runs of a teacher to
one; what a run has cost stays in it when its entry is removed. An entry that cannot be read only stops its own work item.
Runs are started and watched in `runs.py`.
"""

from __future__ import annotations

import random
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Literal, NamedTuple, Self, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from dmd2.errors import Refused, brief
from dmd2.io.local import json_digest
from dmd2.io.storage import join_uri
from dmd2.io.store import CONCURRENT_REQUESTS, Store

EntryState = Literal["waiting", "claimed", "running", "done", "failed", "quarantined"]
FREE: tuple[EntryState, ...] = ("waiting", "failed")
"""States in which an entry can be claimed."""
ACTIVE: tuple[EntryState, ...] = ("claimed", "running")
"""States in which a claim holds the entry."""
ENTRIES, CLAIMS, RESERVATIONS = "entries/", "claims/", "places.json"
"""Names inside the folder of the ledger; like the fields below they are a stored format."""


class LedgerObject(BaseModel):
    """A JSON object of the ledger."""

    model_config = ConfigDict(frozen=True, extra="forbid")


ObjectT = TypeVar("ObjectT", bound=LedgerObject)


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


class Reservation(LedgerObject):
    """The share of a claim in the limits: one run, and its GPU-hours."""

    teacher: str
    key: str
    claim: str
    gpu_hours: float
    at: datetime


class Reservations(LedgerObject):
    """Reservations of claims that hold, and of runs that ended within the window with what they have cost."""

    places: tuple[Reservation, ...] = ()


class RetrainLimits(NamedTuple):
    """Limits for all entries of a ledger together, and for the time of each run."""

    runs: int
    """Largest number of runs at a time."""
    gpu_hours: float
    """Largest sum of GPU-hours of the runs that were claimed within the window."""
    window: timedelta = timedelta(days=7)
    pending: timedelta = timedelta(days=1)
    """Longest time that a run, or a step of it, may wait for its machine."""
    run: timedelta = timedelta(days=7)
    """Longest time from the creation of a run to its end."""


@dataclass
class Capacity:
    """How much of the limits is used."""

    limits: RetrainLimits
    active: list[Reservation] = field(default_factory=list)
    """Reservations of claims that hold."""
    recent: list[Reservation] = field(default_factory=list)
    """Reservations of the window whose runs have ended."""

    @property
    def gpu_hours(self) -> float:
        """GPU-hours that are spent or reserved within the window."""
        return sum(reservation.gpu_hours for reservation in (*self.active, *self.recent))

    def refusal(self, work: WorkItem, gpu_hours: float) -> str:
        """The reason why a run may not start now; empty if it may."""
        if other := next(
            (reservation for reservation in self.active if reservation.teacher == work.teacher), None
        ):
            return f"entry {other.key} is at work on the same teacher"
        if len(self.active) >= self.limits.runs:
            return f"{len(self.active)} of at most {self.limits.runs} runs are at work"
        if self.gpu_hours + gpu_hours > self.limits.gpu_hours:
            days = self.limits.window / timedelta(days=1)
            return (
                f"{self.gpu_hours:g} of at most {self.limits.gpu_hours:g} GPU-hours are spent in {days:g} days, "
                f"a run takes {gpu_hours:g}"
            )
        return ""


class LedgerContent(NamedTuple):
    """What a watcher reads of a ledger, by key."""

    entries: dict[str, LedgerEntry]
    unreadable: dict[str, str]
    """Why an entry cannot be read."""
    unsettled: set[str]
    """Entries whose logs hold more than their files."""


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


def now() -> datetime:
    return datetime.now(UTC)


@dataclass(frozen=True)
class Ledger:
    """A folder of entries, on a bucket or on this machine."""

    store: Store
    clock: Callable[[], datetime] = now
    lease: timedelta = timedelta(minutes=30)
    """Time from a claim to its run: longer than starting one takes, with all retries."""
    max_failures: int = 3
    """Number of failures after which an entry is quarantined."""

    def entries(self) -> list[LedgerEntry]:
        """All entries that can be read, sorted by key."""
        return list(self.read_all().entries.values())

    def read_all(self) -> LedgerContent:
        """All entries, read side by side, sorted by key."""
        names = [entry.name for entry in self.store.list_objects(ENTRIES)]
        keys = [name.removeprefix(ENTRIES).removesuffix(".json") for name in names]
        content = LedgerContent({}, {}, set())
        with ThreadPoolExecutor(CONCURRENT_REQUESTS) as pool:
            list(pool.map(lambda key: self._read_into(content, key), keys))
        entries, unreadable = sorted(content.entries.items()), sorted(content.unreadable.items())
        return LedgerContent(dict(entries), dict(unreadable), content.unsettled)

    def _read_into(self, content: LedgerContent, key: str) -> None:
        try:
            if found := self._find(key):
                content.entries[key] = found[0]
                if found[1]:
                    content.unsettled.add(key)
        except (Refused, OSError) as error:
            content.unreadable[key] = describe(error)

    def entry(self, key: str) -> LedgerEntry | None:
        """The entry of this key, or None."""
        found = self._find(key)
        return found[0] if found else None

    def _find(self, key: str) -> tuple[LedgerEntry, int] | None:
        """The entry of this key, or None, and the number of files of its log that its own file does not hold yet."""
        text = self._read(_entry_name(key))
        return None if text is None else self._follow(self._parse(_entry_name(key), LedgerEntry, text))

    def settle(self, key: str) -> None:
        """Write what the log of its claim says into the file of an entry, unless another watcher changes it meanwhile."""
        name = _entry_name(key)
        version, text = self._read_version(name)
        if text and (now := self._follow(stored := self._parse(name, LedgerEntry, text))[0]) != stored:
            self._swap(name, now, version)

    def lease_expired(self, entry: LedgerEntry) -> bool:
        """Whether the run of a claim should have started by now."""
        return entry.state == "claimed" and entry.expires is not None and self.clock() >= entry.expires

    def capacity(self, limits: RetrainLimits) -> Capacity:
        """How much of the limits is used at the moment."""
        try:
            return self._capacity(self.store.read(RESERVATIONS), limits)
        except FileNotFoundError:
            return self._capacity(b"", limits)

    def claim(
        self, work: WorkItem, teacher: str, owner: str, gpu_hours: float, limits: RetrainLimits
    ) -> Claim | None:
        """Claim a work item; None if it is not free or the limits are reached."""
        token, at = uuid.uuid4().hex, self.clock()

        def take(entry: LedgerEntry | None) -> LedgerEntry:
            entry = entry or LedgerEntry(work=work, teacher=teacher, state="waiting", changed=at)
            return apply_claim(entry, token, owner, teacher, at, at + self.lease)

        if not self._update(work.key, take).holds(token):
            return None
        # After the claim: a reservation only counts while its claim holds.
        claim = Claim(self.store.uri, work.key, token)
        reservation = Reservation(teacher=work.teacher, key=work.key, claim=token, gpu_hours=gpu_hours, at=at)
        if refusal := self._reserve(reservation, work, limits):
            self.release(claim, refusal)
            return None
        return claim

    def release(self, claim: Claim, reason: str) -> LedgerEntry:
        """Release a claim for which no run was started, and its share in the limits."""
        at = self.clock()
        entry = self._update_claimed(claim, lambda entry: apply_release(entry, claim.token, reason, at))
        while entry.was_released(claim.token):
            version, text = self._read_version(RESERVATIONS)
            known = self._parse(RESERVATIONS, Reservations, text).places if text else ()
            left = tuple(reservation for reservation in known if reservation.claim != claim.token)
            if left == known or self._swap(RESERVATIONS, Reservations(places=left), version):
                break
        return entry

    def record_run(self, claim: Claim, run: str) -> LedgerEntry:
        """Record which run was started for a claim."""
        at = self.clock()
        return self._update_claimed(claim, lambda entry: apply_run(entry, claim.token, run, at))

    def begin(self, claim: Claim, run: str) -> LedgerEntry:
        """Record that a run starts to work; raises Refused if the claim is not this run's."""
        at = self.clock()
        return self._update_claimed(claim, lambda entry: apply_begin(entry, claim.token, run, at))

    def overdue(self, claim: Claim, run: str, reason: str, patience: timedelta) -> LedgerEntry:
        """Record that a run is stopped because it took too long, or give it up."""
        at = self.clock()
        return self._update_claimed(
            claim, lambda entry: apply_overdue(entry, claim.token, run, reason, at, patience)
        )

    def done(
        self, claim: Claim, run: str, decision: str, package: str, gpu_hours: float | None = None
    ) -> LedgerEntry:
        """Record that a run succeeded, and the GPU-hours that it has taken."""
        at = self.clock()
        return self._update_claimed(
            claim, lambda entry: apply_done(entry, claim.token, run, decision, package, gpu_hours, at)
        )

    def failed(
        self, claim: Claim, run: str, reason: str, *, for_good: bool = False, counted: bool = True
    ) -> LedgerEntry:
        """Record that a run failed, or with an empty `run` that it could not be started.

        Args:
            for_good: Quarantine the entry at the first failure.
            counted: Whether the failure counts towards the quarantine.
        """
        hours = None if run else 0.0
        failure = FailedRun(
            claim=claim.token, run=run, reason=reason, at=self.clock(), counted=counted, gpu_hours=hours
        )
        most = 1 if for_good else self.max_failures
        return self._update_claimed(claim, lambda entry: apply_failed(entry, failure, most))

    def _update_claimed(self, claim: Claim, rule: Callable[[LedgerEntry], LedgerEntry]) -> LedgerEntry:
        """Append a state transition to the log of the claim, after what another process appends meanwhile."""
        while True:
            found = self._find(claim.key)
            if not found:
                raise Refused(
                    f"{self.store.uri}/{_entry_name(claim.key)} is not there, so no run has a claim on it; was it removed?"
                )
            entry, number = found
            after = rule(entry)
            name = _log_name(claim.key, claim.token, number)
            if after is entry or self._swap(name, LoggedChange.between(entry, after), None):
                return after

    def _follow(self, entry: LedgerEntry) -> tuple[LedgerEntry, int]:
        """The entry after what the log of its claim says, and the number of files that were read of the log. Only a claim
        that holds is changed, so a log has an end."""
        number = 0
        while entry.state in ACTIVE and (
            text := self._read(name := _log_name(entry.work.key, entry.claim, number))
        ):
            change = self._parse(name, LoggedChange, text)
            entry, number = entry.model_copy(update=change.fields), number + 1
        return entry, number

    def _update(self, key: str, rule: Callable[[LedgerEntry | None], LedgerEntry]) -> LedgerEntry:
        """Apply a state transition to the stored entry, again if another process changes it meanwhile."""
        while True:
            version, text = self._read_version(_entry_name(key))
            stored = self._parse(_entry_name(key), LedgerEntry, text) if text else None
            after = rule(self._follow(stored)[0] if stored else None)
            if after == stored or self._swap(_entry_name(key), after, version):
                return after

    def _reserve(self, reservation: Reservation, work: WorkItem, limits: RetrainLimits) -> str:
        """Store a reservation if the limits allow it -> the reason if they do not, or nothing."""
        while True:
            version, text = self._read_version(RESERVATIONS)
            capacity = self._capacity(text, limits)
            if refusal := capacity.refusal(work, reservation.gpu_hours):
                return refusal
            places = Reservations(places=(*capacity.active, *capacity.recent, reservation))
            if self._swap(RESERVATIONS, places, version):
                return ""

    def _capacity(self, text: bytes, limits: RetrainLimits) -> Capacity:
        """Reservations that still count: of claims that hold, and of runs that were claimed within the window. That of an
        entry that was removed or cannot be read keeps its last known GPU-hours."""
        since, capacity = self.clock() - limits.window, Capacity(limits)
        for reservation in self._parse(RESERVATIONS, Reservations, text).places if text else ():
            try:
                entry = self.entry(reservation.key)
            except Refused:
                entry = None
            if entry and entry.holds(reservation.claim):
                capacity.active.append(reservation)
            elif reservation.at > since:
                reserved = reservation.gpu_hours
                hours = entry.spent(reservation.claim, reserved) if entry else reserved
                if hours:
                    capacity.recent.append(reservation.model_copy(update={"gpu_hours": hours}))
        return capacity

    def _read_version(self, name: str) -> tuple[str | None, bytes]:
        """Version and content of a file. If the content is newer than the version, `_swap` fails and the caller reads again."""
        while version := self.store.version(name):
            try:
                return version, self.store.read(name)
            except FileNotFoundError:  # removed between the two requests
                continue
        return None, b""

    def _read(self, name: str) -> bytes | None:
        try:
            return self.store.read(name)
        except FileNotFoundError:
            return None

    def _swap(self, name: str, value: LedgerObject, version: str | None) -> bool:
        try:
            self.store.compare_and_swap(name, value.model_dump_json(indent=1).encode() + b"\n", version)
        except FileExistsError:
            time.sleep(random.uniform(0, 0.1))  # another process was faster; spread the next attempts
            return False
        return True

    def _parse(self, name: str, kind: type[ObjectT], text: bytes) -> ObjectT:
        try:
            return kind.model_validate_json(text)
        except ValidationError as error:
            raise Refused(
                f"{self.store.uri}/{name} is not of this version of the ledger ({brief(error)}); "
                "restore it, or remove it, which makes the ledger forget it"
            ) from None


def describe(error: Exception) -> str:
    """What an error of a source, the ledger or the platform says, with the place if it has one."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror} at {error.filename}" if error.filename else error.strerror
    return brief(error)


def _entry_name(key: str) -> str:
    return f"{ENTRIES}{key}.json"


def _log_name(key: str, claim: str, number: int) -> str:
    return f"{CLAIMS}{key}/{claim}-{number}.json"
