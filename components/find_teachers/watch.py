"""One look of the watcher: settle what has ended, then start a run for each new teacher, as far as there is room.

It may be killed anywhere, and any number of watchers may look at once: whatever it decides, it decides by a
compare-and-swap in the ledger, and a run that the ledger does not want refuses itself. A run is known by a name
with the token of its claim, so that one whose creator died before it could say so is found again.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from components.find_teachers.ledger import FREE, Claim, Entry, Ledger, Limits, Work, digest
from components.find_teachers.runs import Pipeline, Runs, State
from components.find_teachers.sources import Teacher, find
from dmd2.errors import Refused
from dmd2.io.storage import join_uri, open_store

SAME = ("recipe", "overrides", "source", "gate")
"""The settings of a distillation that decide what comes out; with others, a teacher is another piece of work."""
OWN = {"teacher", "root", "claim"}
"""Those that are another for each."""


@dataclass(frozen=True)
class Watch:
    ledger: Ledger
    runs: Runs
    settings: Mapping[str, Any]
    """Of every distillation."""
    root: str
    """Folder that receives what they make, in a folder for each entry: a second attempt goes on in that of the first."""
    gpu_hours: float
    """That one distillation takes."""
    limits: Limits
    owner: str
    """The run of this watcher."""
    say: Callable[[str], None] = print

    def settle(self) -> None:
        """Find the run of a claim whose watcher died, and record the end of a run that could not do so itself."""
        for entry in self.ledger.entries():
            self._settle(entry)

    def _settle(self, entry: Entry) -> None:
        claim = self._claim(entry)
        if self.ledger.lost(entry):
            self._find_run(entry, claim)
        elif entry.state == "running":
            self._settle_run(claim, entry.run, self.runs.state(entry.run))

    def _find_run(self, entry: Entry, claim: Claim) -> None:
        if run := self.runs.find(run_name(entry.teacher, claim)):
            self._told(claim, run)
            self.say(f"{entry.work.key}: run {run} is that of watcher {entry.owner}, which was lost")
        else:
            reason = f"watcher {entry.owner} was lost before it started a run"
            self.ledger.give_back(claim, reason)
            self.say(f"{entry.work.key}: {reason}")

    def _settle_run(self, claim: Claim, run: str, state: State) -> None:
        if state.health == "alive":
            return
        try:
            if state.health == "succeeded":
                self.ledger.done(claim, run, "unknown", "")
            else:
                self.ledger.failed(claim, run, state.reason, for_good=state.health == "cancelled")
        except Refused as error:  # it has done so itself meanwhile
            self.say(str(error))
        else:
            self.say(f"{claim.key}: run {run}: {state.reason}")

    def start(self, teachers: Iterable[Teacher]) -> list[str]:
        """Start a run for each that is new, or failed before -> the runs."""
        entries = {entry.work.key: entry for entry in self.ledger.entries()}
        todo = [
            (teacher, work) for teacher in teachers if _free(entries.get((work := self.work(teacher)).key))
        ]
        todo.sort(key=lambda pair: _failures(entries.get(pair[1].key)))  # those that never failed come first
        started, room = [], self.ledger.room(self.limits)
        for teacher, work in todo:
            if why_not := room.why_not(work, self.gpu_hours):
                self.say(f"{teacher.name}: waits, {why_not}")
                continue
            if claim := self.ledger.claim(work, teacher.address, self.owner, self.gpu_hours, self.limits):
                started.append(self._start(teacher, claim))
            room = self.ledger.room(self.limits)
        return started

    def work(self, teacher: Teacher) -> Work:
        asked = {name: self.settings.get(name) for name in SAME}
        return Work(teacher=teacher.digest, recipe=digest(asked), image=self.runs.image)

    def _start(self, teacher: Teacher, claim: Claim) -> str:
        name = run_name(teacher.address, claim)
        own = {"teacher": teacher.address, "root": join_uri(self.root, claim.key), "claim": claim.text}
        try:
            run = self.runs.start(name, {**self.settings, **own})
        except Refused as error:
            self.ledger.give_back(claim, str(error))
            raise
        except OSError as error:  # its answer was lost, perhaps, and not the run
            run = self.runs.find(name)
            if not run:
                self.ledger.give_back(claim, str(error))
                raise
        self._told(claim, run)
        self.say(f"{teacher.name}: started run {run} ({name})")
        return run

    def _told(self, claim: Claim, run: str) -> None:
        """The ledger knows the run; or another one was faster, and this one will give way by itself."""
        try:
            self.ledger.tell(claim, run)
        except Refused as error:
            self.say(str(error))

    def _claim(self, entry: Entry) -> Claim:
        return Claim(self.ledger.store.uri, entry.work.key, entry.claim)


def retrained(
    teachers: str,
    ledger: str,
    root: str,
    settings: Mapping[str, Any],
    pipeline: str,
    service_account: str,
    max_runs: int,
    gpu_hours: float,
    max_gpu_hours: float,
    owner: str,
    api: str = "",
) -> str:
    """What the component does -> the ledger as a page."""
    limits = Limits(max_runs, max_gpu_hours)
    if limits.runs < 1 or gpu_hours <= 0 or limits.gpu_hours < gpu_hours:
        raise Refused(
            f"max_runs is {limits.runs}, gpu_hours {gpu_hours:g}, max_gpu_hours {limits.gpu_hours:g}; nothing could ever "
            "start: give at least one run, and as many GPU-hours as it takes"
        )
    if owns := settings.keys() & OWN:
        raise Refused(f"settings has {min(owns)!r}, which retraining sets for each teacher; leave it out")
    runs, book = Pipeline(pipeline, service_account, api), Ledger(open_store(ledger))
    runs.check({**settings, **dict.fromkeys(OWN, "")})
    watch = Watch(book, runs, settings, root, gpu_hours, limits, owner)
    watch.settle()  # whatever the sources say
    found = find(teachers)
    for sentence in found.passed_over:
        print(sentence)
    started = watch.start(found.teachers)
    print(f"{len(found.teachers)} teachers announced, {len(started)} runs started")
    return table(book.entries())


def run_name(teacher: str, claim: Claim) -> str:
    """What the run of a claim is called, which nobody else's is."""
    word = re.sub(r"[^a-zA-Z0-9.-]+", "-", teacher.rstrip("/").rpartition("/")[2])[:40]
    return f"retrain-{word}-{claim.token}"


def _free(entry: Entry | None) -> bool:
    return entry is None or entry.state in FREE


def _failures(entry: Entry | None) -> int:
    return len(entry.failures) if entry else 0


def table(entries: Iterable[Entry]) -> str:
    """The ledger, as Markdown."""
    rows = [
        (e.teacher, e.state, e.claims, len(e.failures), e.run or "-", e.package or e.decision or e.reason or "-", f"{e.changed:%Y-%m-%d %H:%M}")
        for e in sorted(entries, key=lambda e: e.changed, reverse=True)
    ]  # fmt: skip
    lines = [
        f"| {' | '.join(' '.join(str(cell).replace('|', '/').split()) for cell in row)} |" for row in rows
    ]
    head = "| teacher | state | claims | failures | run | package or reason | changed (UTC) |"
    return "\n".join([head, "|---|---|--:|--:|---|---|---|", *lines]) + "\n"
