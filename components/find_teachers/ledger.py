"""Which teachers are distilled, and by which run: the ledger of retraining, one readable JSON object per piece of work.

A piece of work is (teacher, recipe, image), each by its digest; its entry changes by compare-and-swap only. A claim is
a token that is never used twice: the run that shows the token of an entry may work, every other one gives way. So a run
that starts late, twice, or for a claim that was taken away is refused before it does anything, and no clock is
trusted: a lease only says when to look whether a claim was lost. `places.json` bounds the runs and GPU-hours of all
entries together, one run per teacher. How runs are started and asked is not here.
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

State = Literal["waiting", "claimed", "running", "done", "failed", "quarantined"]
FREE: tuple[State, ...] = ("waiting", "failed")
"""May be claimed."""
ACTIVE: tuple[State, ...] = ("claimed", "running")
"""Somebody's."""
ENTRIES, PLACES = "entries/", "places.json"


class Part(BaseModel):
    """What the ledger is written in."""

    model_config = ConfigDict(frozen=True, extra="forbid")


Read = TypeVar("Read", bound=Part)


class Work(Part):
    """What is done once."""

    teacher: str
    """Digest of the teacher."""
    recipe: str
    """Digest of what is asked for every teacher: recipe, overrides, data, gate."""
    image: str
    """Digest of the images that it runs in."""

    @property
    def key(self) -> str:
        """Name of the entry. The teacher comes first, so that those of one teacher stand together."""
        return f"{self.teacher[:16]}-{digest(self.model_dump())[:16]}"


class Failure(Part):
    """A run that did not end well."""

    claim: str
    run: str
    reason: str
    at: datetime


class Entry(Part):
    """What is known of a piece of work."""

    work: Work
    teacher: str
    """Where the teacher is."""
    state: State
    reason: str = ""
    """Of the state."""
    changed: datetime
    claim: str = ""
    """Token of the claim; of the last one, if it is over."""
    owner: str = ""
    """Who claimed it: the run of a watcher."""
    expires: datetime | None = None
    """When to look whether the claim was lost, if no run has begun until then."""
    run: str = ""
    """The one run of this claim, once it is known."""
    claims: int = 0
    """So far."""
    failures: tuple[Failure, ...] = ()
    decision: str = ""
    """Of the gate, once it is done."""
    package: str = ""
    """Where the package is, if the gate accepted it."""

    def active(self, claim: str) -> bool:
        """Whether this claim holds. Once it does not, it never will again."""
        return self.state in ACTIVE and self.claim == claim

    def ran(self, claim: str, run: str) -> bool:
        """Whether this is the run of the claim, at work or not."""
        return bool(run) and (self.claim, self.run) == (claim, run)

    def used(self, claim: str) -> bool:
        """Whether a run has begun for this claim, now or before."""
        return self.ran(claim, self.run) or any(failure.claim == claim for failure in self.failures)

    def to(self, state: State, at: datetime, **changes: Any) -> Self:
        return self.model_copy(update={"state": state, "changed": at, "reason": "", **changes})

    @property
    def told(self) -> str:
        whose = f" by run {self.run}" if self.run else ""
        return f"entry {self.work.key} of teacher {self.teacher} is {self.state}{whose}"


class Place(Part):
    """The right of a claim to have a run."""

    teacher: str
    key: str
    claim: str
    gpu_hours: float
    at: datetime


class Places(Part):
    """All that are taken, and those of the past that still count."""

    places: tuple[Place, ...] = ()


class Limits(NamedTuple):
    """For all entries of a ledger together."""

    runs: int
    """At a time."""
    gpu_hours: float
    """Of the runs that were claimed within the window."""
    window: timedelta = timedelta(days=7)


@dataclass
class Room:
    """What the limits leave to further runs."""

    limits: Limits
    taken: list[Place] = field(default_factory=list)
    past: list[Place] = field(default_factory=list)
    """Of the window, whose runs are over."""

    def why_not(self, work: Work, gpu_hours: float) -> str:
        """Why a run for it may not start now; nothing if it may."""
        if other := next((place for place in self.taken if place.teacher == work.teacher), None):
            return f"entry {other.key} is at work on the same teacher"
        if len(self.taken) >= self.limits.runs:
            return f"{len(self.taken)} of at most {self.limits.runs} runs are at work"
        spent = sum(place.gpu_hours for place in (*self.taken, *self.past))
        if spent + gpu_hours > self.limits.gpu_hours:
            days = self.limits.window / timedelta(days=1)
            return (
                f"{spent:g} of at most {self.limits.gpu_hours:g} GPU-hours are spent in {days:g} days, "
                f"a run takes {gpu_hours:g}"
            )
        return ""


class Claim(NamedTuple):
    """What a run shows in order to work."""

    ledger: str
    key: str
    token: str

    @property
    def text(self) -> str:
        """The address of the entry, `#`, and the token."""
        return f"{join_uri(self.ledger, ENTRIES + self.key)}.json#{self.token}"

    @classmethod
    def read(cls, text: str) -> Claim:
        address, _, token = text.rpartition("#")
        ledger, _, name = address.rpartition(f"/{ENTRIES}")
        key = name.removesuffix(".json")
        if not (ledger and token and key != name and "/" not in key):
            raise Refused(
                f"claim is {text!r}, which is not LEDGER/entries/KEY.json#TOKEN; leave it empty, retraining fills it"
            )
        return cls(ledger, key, token)


# The rules: an entry -> the entry after it, which is the same one where nothing is to change.


def claimed(entry: Entry, claim: str, owner: str, teacher: str, at: datetime, expires: datetime) -> Entry:
    """Taken by a watcher, unless somebody has it."""
    if entry.state not in FREE:
        return entry
    whose = {"claim": claim, "owner": owner, "teacher": teacher, "run": "", "expires": expires}
    return entry.to("claimed", at, claims=entry.claims + 1, **whose)


def waiting(entry: Entry, claim: str, reason: str, at: datetime) -> Entry:
    """Given back, or lost, before a run began."""
    if entry.state == "claimed" and entry.claim == claim:
        return entry.to("waiting", at, reason=reason)
    return entry


def running(entry: Entry, claim: str, run: str, at: datetime) -> Entry:
    """A run has begun, or is told of again: one run per claim."""
    if entry.ran(claim, run):
        return entry
    if entry.state == "claimed" and entry.claim == claim:
        return entry.to("running", at, run=run)
    raise Refused(f"{entry.told}; run {run} has no claim on it and gives way")


def done(entry: Entry, claim: str, run: str, decision: str, package: str, at: datetime) -> Entry:
    """The run ended well: with a package, or rejected by its gate."""
    if entry.ran(claim, run) and entry.state == "running":
        return entry.to("done", at, decision=decision, package=package)
    if entry.ran(claim, run) and entry.state == "done":
        return entry
    raise Refused(f"{entry.told}; that run {run} is done is not recorded")


def failed(entry: Entry, claim: str, run: str, reason: str, at: datetime, patience: int) -> Entry:
    """The run ended otherwise. After so many of them, only a person lets it be tried again."""
    if entry.ran(claim, run) and entry.state in ("failed", "quarantined"):
        return entry
    if not (entry.ran(claim, run) and entry.state == "running"):
        raise Refused(f"{entry.told}; that run {run} failed is not recorded")
    failures = (*entry.failures, Failure(claim=claim, run=run, reason=reason, at=at))
    if len(failures) < patience:
        return entry.to("failed", at, failures=failures, reason=reason)
    times = f"failed {len(failures)} times, at last: " if len(failures) > 1 else ""
    return entry.to("quarantined", at, failures=failures, reason=times + reason)


def now() -> datetime:
    return datetime.now(UTC)


@dataclass(frozen=True)
class Ledger:
    """A folder of entries, on a bucket or on this machine."""

    store: Store
    clock: Callable[[], datetime] = now
    lease: timedelta = timedelta(minutes=30)
    """From a claim to its run: longer than it takes to start one, repetitions included."""
    patience: int = 3
    """Failures until quarantine."""

    def entries(self) -> list[Entry]:
        """All of them, sorted by key."""
        names = [entry.name for entry in self.store.list_objects(ENTRIES)]
        with ThreadPoolExecutor(CONCURRENT_REQUESTS) as pool:
            found = pool.map(self.entry, [name.removeprefix(ENTRIES).removesuffix(".json") for name in names])
            return [entry for entry in found if entry]

    def entry(self, key: str) -> Entry | None:
        try:
            return self._parsed(_file(key), Entry, self.store.read(_file(key)))
        except FileNotFoundError:
            return None

    def lost(self, entry: Entry) -> bool:
        """Whether it is time to look for the run of a claim."""
        return entry.state == "claimed" and entry.expires is not None and self.clock() >= entry.expires

    def room(self, limits: Limits) -> Room:
        """What there is for further runs, as far as one look can tell."""
        try:
            return self._room(self.store.read(PLACES), limits)
        except FileNotFoundError:
            return self._room(b"", limits)

    def claim(self, work: Work, teacher: str, owner: str, gpu_hours: float, limits: Limits) -> Claim | None:
        """The right to start one run for it; None if somebody else was faster or there is no room."""
        token, at = uuid.uuid4().hex, self.clock()

        def take(entry: Entry | None) -> Entry:
            entry = entry or Entry(work=work, teacher=teacher, state="waiting", changed=at)
            return claimed(entry, token, owner, teacher, at, at + self.lease)

        if not self._change(work.key, take).active(token):
            return None
        # Only now: a place counts as long as its claim is active, so one without a claim would count for nothing.
        claim = Claim(self.store.uri, work.key, token)
        place = Place(teacher=work.teacher, key=work.key, claim=token, gpu_hours=gpu_hours, at=at)
        if why_not := self._take(place, work, limits):
            self.give_back(claim, why_not)
            return None
        return claim

    def give_back(self, claim: Claim, reason: str) -> Entry:
        """A claim for which no run has begun."""
        at = self.clock()
        return self._settle(claim, lambda entry: waiting(entry, claim.token, reason, at))

    def tell(self, claim: Claim, run: str) -> Entry:
        """Which run was started for a claim."""
        at = self.clock()
        return self._settle(claim, lambda entry: running(entry, claim.token, run, at))

    def begin(self, claim: Claim, run: str) -> Entry:
        """What a run says before it does anything; refused if it may not work."""
        entry = self.tell(claim, run)
        if entry.state != "running":
            raise Refused(f"{entry.told}; that run is over and gives way")
        return entry

    def done(self, claim: Claim, run: str, decision: str, package: str) -> Entry:
        at = self.clock()
        return self._settle(claim, lambda entry: done(entry, claim.token, run, decision, package, at))

    def failed(self, claim: Claim, run: str, reason: str, *, for_good: bool = False) -> Entry:
        """`for_good`: into quarantine at once."""
        at, patience = self.clock(), 1 if for_good else self.patience
        return self._settle(claim, lambda entry: failed(entry, claim.token, run, reason, at, patience))

    def _settle(self, claim: Claim, rule: Callable[[Entry], Entry]) -> Entry:
        def change(entry: Entry | None) -> Entry:
            if not entry:
                raise Refused(
                    f"{self.store.uri}/{_file(claim.key)} is not there, so nobody has a claim on it; somebody removed it"
                )
            return rule(entry)

        return self._change(claim.key, change)

    def _change(self, key: str, rule: Callable[[Entry | None], Entry]) -> Entry:
        """Apply a rule to the entry as it is."""
        while True:
            version, text = self._state(_file(key))
            entry = self._parsed(_file(key), Entry, text) if text else None
            after = rule(entry)
            if after is entry or self._swapped(_file(key), after, version):
                return after

    def _take(self, place: Place, work: Work, limits: Limits) -> str:
        """Take a place; why not, if there is none."""
        while True:
            version, text = self._state(PLACES)
            room = self._room(text, limits)
            if why_not := room.why_not(work, place.gpu_hours):
                return why_not
            places = Places(places=(*room.taken, *room.past, place))
            if self._swapped(PLACES, places, version):
                return ""

    def _room(self, text: bytes, limits: Limits) -> Room:
        """Without the places of long ago, and those of claims that were lost before a run began."""
        since, room = self.clock() - limits.window, Room(limits)
        for place in self._parsed(PLACES, Places, text).places if text else ():
            entry = self.entry(place.key)
            if entry and entry.active(place.claim):
                room.taken.append(place)
            elif entry and entry.used(place.claim) and place.at > since:
                room.past.append(place)
        return room

    def _state(self, name: str) -> tuple[str | None, bytes]:
        """Version and content. A content newer than its version is refused when it is replaced."""
        while version := self.store.version(name):
            try:
                return version, self.store.read(name)
            except FileNotFoundError:  # removed in between
                continue
        return None, b""

    def _swapped(self, name: str, value: Part, version: str | None) -> bool:
        try:
            self.store.compare_and_swap(name, value.model_dump_json(indent=1).encode() + b"\n", version)
        except FileExistsError:
            time.sleep(random.uniform(0, 0.1))  # somebody was faster; not all of them at once again
            return False
        return True

    def _parsed(self, name: str, kind: type[Read], text: bytes) -> Read:
        try:
            return kind.model_validate_json(text)
        except ValidationError as error:
            raise Refused(
                f"{self.store.uri}/{name} is not of this version of the ledger ({brief(error)}); "
                "restore it, or remove it to have forgotten what it knows"
            ) from None


def digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _file(key: str) -> str:
    return f"{ENTRIES}{key}.json"
