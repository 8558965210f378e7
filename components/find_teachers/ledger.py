"""The ledger of retraining: which teacher is distilled by which run, as one readable JSON file per work item.

A work item is (teacher, recipe, image), each by its digest; its entry is only changed by compare-and-swap. A claim has a
token that is used once: the run with the token of an entry may work on it, every other run is refused. So a run that
starts late, twice, or for a claim that was released is refused before it does anything. Clocks are not trusted: the lease
of a claim only says when to check whether its watcher has died. `places.json` limits the runs and GPU-hours of all
entries together, and the runs of a teacher to one. Starting runs and asking for their state is in `runs.py`.
"""

from __future__ import annotations

import hashlib
import json
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
from dmd2.io.storage import join_uri
from dmd2.io.store import CONCURRENT_REQUESTS, Store

EntryState = Literal["waiting", "claimed", "running", "done", "failed", "quarantined"]
FREE: tuple[EntryState, ...] = ("waiting", "failed")
"""States in which an entry can be claimed."""
ACTIVE: tuple[EntryState, ...] = ("claimed", "running")
"""States in which a claim holds the entry."""
ENTRIES, RESERVATIONS = "entries/", "places.json"
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
        return f"{self.teacher[:16]}-{digest(self.model_dump())[:16]}"


class FailedRun(LedgerObject):
    """A run that failed or was cancelled."""

    claim: str
    run: str
    reason: str
    at: datetime


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
    claims: int = 0
    """Number of claims so far."""
    failures: tuple[FailedRun, ...] = ()
    decision: str = ""
    """Decision of the gate, once the entry is done."""
    package: str = ""
    """Address of the package, if the gate accepted the student."""

    def holds(self, claim: str) -> bool:
        """Whether this claim holds the entry. A claim that has lost the entry never holds it again."""
        return self.state in ACTIVE and self.claim == claim

    def is_run_of(self, claim: str, run: str) -> bool:
        """Whether `run` is the run of this claim, running or ended."""
        return bool(run) and (self.claim, self.run) == (claim, run)

    def has_run(self, claim: str) -> bool:
        """Whether a run was started for this claim, running or failed."""
        return self.is_run_of(claim, self.run) or any(failure.claim == claim for failure in self.failures)

    def with_state(self, state: EntryState, at: datetime, **changes: Any) -> Self:
        """The entry in another state, without a reason unless one is given."""
        return self.model_copy(update={"state": state, "changed": at, "reason": "", **changes})

    @property
    def summary(self) -> str:
        """The state of the entry as a clause of a sentence."""
        by_run = f" by run {self.run}" if self.run else ""
        return f"entry {self.work.key} of teacher {self.teacher} is {self.state}{by_run}"


class Reservation(LedgerObject):
    """The share of a claim in the limits: one run, and its GPU-hours."""

    teacher: str
    key: str
    claim: str
    gpu_hours: float
    at: datetime


class Reservations(LedgerObject):
    """Reservations of claims that hold, and of runs that ended within the window."""

    places: tuple[Reservation, ...] = ()


class RetrainLimits(NamedTuple):
    """Limits for all entries of a ledger together."""

    runs: int
    """Largest number of runs at a time."""
    gpu_hours: float
    """Largest sum of GPU-hours of the runs that were claimed within the window."""
    window: timedelta = timedelta(days=7)


@dataclass
class Capacity:
    """How much of the limits is used."""

    limits: RetrainLimits
    active: list[Reservation] = field(default_factory=list)
    """Reservations of claims that hold."""
    recent: list[Reservation] = field(default_factory=list)
    """Reservations of the window whose runs have ended."""

    def refusal(self, work: WorkItem, gpu_hours: float) -> str:
        """The reason why a run may not start now; empty if it may."""
        if other := next(
            (reservation for reservation in self.active if reservation.teacher == work.teacher), None
        ):
            return f"entry {other.key} is at work on the same teacher"
        if len(self.active) >= self.limits.runs:
            return f"{len(self.active)} of at most {self.limits.runs} runs are at work"
        spent = sum(reservation.gpu_hours for reservation in (*self.active, *self.recent))
        if spent + gpu_hours > self.limits.gpu_hours:
            days = self.limits.window / timedelta(days=1)
            return (
                f"{spent:g} of at most {self.limits.gpu_hours:g} GPU-hours are spent in {days:g} days, "
                f"a run takes {gpu_hours:g}"
            )
        return ""


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
    changes = {"claim": claim, "owner": owner, "teacher": teacher, "run": "", "expires": expires}
    return entry.with_state("claimed", at, claims=entry.claims + 1, **changes)


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


def apply_done(
    entry: LedgerEntry, claim: str, run: str, decision: str, package: str, at: datetime
) -> LedgerEntry:
    """running -> done, for a run that succeeded, whether its gate accepted the student or not."""
    if entry.is_run_of(claim, run) and entry.state == "running":
        return entry.with_state("done", at, decision=decision, package=package)
    if entry.is_run_of(claim, run) and entry.state == "done":
        return entry
    raise Refused(f"{entry.summary}; that run {run} is done is not recorded")


def apply_failed(
    entry: LedgerEntry, claim: str, run: str, reason: str, at: datetime, max_failures: int
) -> LedgerEntry:
    """running -> failed, or quarantined after `max_failures`; only a person can release an entry from quarantine."""
    if entry.is_run_of(claim, run) and entry.state in ("failed", "quarantined"):
        return entry
    if not (entry.is_run_of(claim, run) and entry.state == "running"):
        raise Refused(f"{entry.summary}; that run {run} failed is not recorded")
    failures = (*entry.failures, FailedRun(claim=claim, run=run, reason=reason, at=at))
    if len(failures) < max_failures:
        return entry.with_state("failed", at, failures=failures, reason=reason)
    times = f"failed {len(failures)} times, at last: " if len(failures) > 1 else ""
    return entry.with_state("quarantined", at, failures=failures, reason=times + reason)


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
        """All entries, sorted by key."""
        names = [entry.name for entry in self.store.list_objects(ENTRIES)]
        with ThreadPoolExecutor(CONCURRENT_REQUESTS) as pool:
            found = pool.map(self.entry, [name.removeprefix(ENTRIES).removesuffix(".json") for name in names])
            return [entry for entry in found if entry]

    def entry(self, key: str) -> LedgerEntry | None:
        """The entry of this key, or None."""
        try:
            return self._parse(_entry_name(key), LedgerEntry, self.store.read(_entry_name(key)))
        except FileNotFoundError:
            return None

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
        """Release a claim for which no run was started."""
        at = self.clock()
        return self._update_claimed(claim, lambda entry: apply_release(entry, claim.token, reason, at))

    def record_run(self, claim: Claim, run: str) -> LedgerEntry:
        """Record which run was started for a claim."""
        at = self.clock()
        return self._update_claimed(claim, lambda entry: apply_run(entry, claim.token, run, at))

    def begin(self, claim: Claim, run: str) -> LedgerEntry:
        """Record that a run starts to work; raises Refused if the claim is not this run's."""
        entry = self.record_run(claim, run)
        if entry.state != "running":
            raise Refused(f"{entry.summary}; that run is over and gives way")
        return entry

    def done(self, claim: Claim, run: str, decision: str, package: str) -> LedgerEntry:
        """Record that a run succeeded."""
        at = self.clock()
        return self._update_claimed(
            claim, lambda entry: apply_done(entry, claim.token, run, decision, package, at)
        )

    def failed(self, claim: Claim, run: str, reason: str, *, for_good: bool = False) -> LedgerEntry:
        """Record that a run failed. With `for_good` the entry is quarantined at the first failure."""
        at, max_failures = self.clock(), 1 if for_good else self.max_failures
        return self._update_claimed(
            claim, lambda entry: apply_failed(entry, claim.token, run, reason, at, max_failures)
        )

    def _update_claimed(self, claim: Claim, rule: Callable[[LedgerEntry], LedgerEntry]) -> LedgerEntry:
        def transition(entry: LedgerEntry | None) -> LedgerEntry:
            if not entry:
                raise Refused(
                    f"{self.store.uri}/{_entry_name(claim.key)} is not there, so no run has a claim on it; was it removed?"
                )
            return rule(entry)

        return self._update(claim.key, transition)

    def _update(self, key: str, rule: Callable[[LedgerEntry | None], LedgerEntry]) -> LedgerEntry:
        """Apply a state transition to the stored entry, again if another process changes it meanwhile."""
        while True:
            version, text = self._read_version(_entry_name(key))
            entry = self._parse(_entry_name(key), LedgerEntry, text) if text else None
            after = rule(entry)
            if after is entry or self._swap(_entry_name(key), after, version):
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
        """Reservations that still count: of claims that hold, and of runs that were started within the window."""
        since, capacity = self.clock() - limits.window, Capacity(limits)
        for reservation in self._parse(RESERVATIONS, Reservations, text).places if text else ():
            entry = self.entry(reservation.key)
            if entry and entry.holds(reservation.claim):
                capacity.active.append(reservation)
            elif entry and entry.has_run(reservation.claim) and reservation.at > since:
                capacity.recent.append(reservation)
        return capacity

    def _read_version(self, name: str) -> tuple[str | None, bytes]:
        """Version and content of a file. If the content is newer than the version, `_swap` fails and the caller reads again."""
        while version := self.store.version(name):
            try:
                return version, self.store.read(name)
            except FileNotFoundError:  # removed between the two requests
                continue
        return None, b""

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


def digest(value: Any) -> str:
    """The sha256 of a JSON value. Stored keys depend on it."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _entry_name(key: str) -> str:
    return f"{ENTRIES}{key}.json"
