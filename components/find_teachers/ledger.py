"""The ledger of retraining: which teacher is distilled by which run, as one readable JSON file per work item.

A work item is (teacher, recipe, image), each by its digest. A watcher claims its entry by compare-and-swap. What happens to
a claim is appended to the log of the claim, as numbered files that are created and never replaced: a number is free for
one process only, and a run needs no right to overwrite or delete anything. An entry is its file and the log of its claim;
watchers write the one into the other. A claim has a token that is used once: the run with the token of an entry may work
on it, every other run is refused. So a run that starts late, twice, or for a claim that was released is refused before it
does anything. A watcher uses the clock of the platform, not its own; the lease of a claim only says when to check whether
its watcher has died. `places.json` limits the runs and GPU-hours of all entries together, and the runs of a teacher to
one; what a run has cost stays in it when its entry is removed. An entry that cannot be read only stops its own work item.
What an entry holds and how it may change is in `entries.py`, the limits are in `limits.py`; runs are started and watched in `runs.py`.
"""

from __future__ import annotations

import random
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import NamedTuple, TypeVar

from pydantic import ValidationError

from components.find_teachers.entries import (
    ACTIVE,
    ENTRIES,
    Claim,
    FailedRun,
    LedgerEntry,
    LedgerObject,
    LoggedChange,
    WorkItem,
    apply_begin,
    apply_claim,
    apply_done,
    apply_failed,
    apply_overdue,
    apply_release,
    apply_run,
)
from components.find_teachers.limits import Capacity, Reservation, Reservations, RetrainLimits
from dmd2.errors import Refused, brief
from dmd2.io.store import CONCURRENT_REQUESTS, Store

CLAIMS, RESERVATIONS = "claims/", "places.json"
"""Names inside the folder of the ledger; they are a stored format."""
ObjectT = TypeVar("ObjectT", bound=LedgerObject)


class LedgerContent(NamedTuple):
    """What a watcher reads of a ledger, by key."""

    entries: dict[str, LedgerEntry]
    unreadable: dict[str, str]
    """Why an entry cannot be read."""
    unsettled: set[str]
    """Entries whose logs hold more than their files."""


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
