"""One run of the watcher: record the end of runs that could not do so, then start a run for each new teacher.

It may be killed at any point, and any number of watchers may work at once: every decision is a compare-and-swap in the
ledger, and a run without a valid claim stops by itself. The name of a run contains the token of its claim, so a run whose
watcher died before it could record the run's id is found by its name.

What goes wrong with one source, entry, run or teacher is written down as a problem, and the others go on. A failure of the
infrastructure is tried again without being counted; after some failures of its own a teacher is quarantined.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from components.find_teachers.entries import ACTIVE, FREE, Claim, LedgerEntry, WorkItem
from components.find_teachers.ledger import Ledger, describe
from components.find_teachers.limits import Capacity, RetrainLimits
from components.find_teachers.runs import PipelineRuns, RunState, UploadedPipeline, cause_of
from components.find_teachers.sources import AnnouncedTeacher, find, name_of
from dmd2 import recipes
from dmd2.errors import Refused
from dmd2.io.local import json_digest
from dmd2.io.storage import join_uri, open_store

logger = logging.getLogger(__name__)

RESULT_SETTINGS = ("recipe", "overrides", "source", "gate")
"""Pipeline parameters that are part of every work item, given or not: they decide the result."""
RUN_SETTINGS = {"teacher", "root", "claim"}
"""The pipeline parameters that are set for each run."""
OTHER_SETTINGS = RUN_SETTINGS | {
    "destination",
    "scores",
    "nodes",
    "gpus",
    "pool",
    "queue",
    "budget",
    "price",
    "parts",
}
"""The pipeline parameters that do not decide the result. With another value of any parameter that is not among them, the same
teacher is another work item."""
OUTAGES = 3
"""Number of failed starts in a row after which no more runs are started: the platform or the bucket is down."""


@dataclass(frozen=True)
class Watcher:
    ledger: Ledger
    runs: PipelineRuns
    settings: Mapping[str, Any]
    """Pipeline parameters of every distillation."""
    root: str
    """Folder of the runs, with a folder for each entry: a second run of an entry continues where the first stopped."""
    gpu_hours: float
    """GPU-hours that one distillation is expected to take."""
    limits: RetrainLimits
    owner: str
    """KFP id of this watcher's run."""
    problems: list[str] = field(default_factory=list)
    """What went wrong with one entry, run or teacher, a sentence each."""
    waiting: Counter[str] = field(default_factory=Counter)
    """Number of teachers that wait, by reason."""

    def reconcile(self) -> None:
        """Find the runs of claims whose watcher died, record the end of runs that could not do so themselves, and stop
        runs that take too long."""
        alive: dict[str, str] = {}
        with self._isolated("the platform"):
            alive = self.runs.alive()
        found = self.ledger.read_all()
        self._stop_stray_runs(alive, found.entries)
        self.problems.extend(f"entry {key}: {problem}" for key, problem in found.unreadable.items())
        for key, entry in found.entries.items():
            with self._isolated(f"entry {key}"):
                self._reconcile_entry(entry)
                if entry.state in ACTIVE or key in found.unsettled:
                    self.ledger.settle(key)

    @contextmanager
    def _isolated(self, what: str) -> Iterator[None]:
        """Turn an error into a problem of this one thing."""
        try:
            yield
        except (Refused, OSError) as error:
            self._note(what, error)

    def _note(self, what: str, error: Exception) -> None:
        self.problems.append(f"{what}: {describe(error)}")
        logger.warning(self.problems[-1])

    def _reconcile_entry(self, entry: LedgerEntry) -> None:
        claim = self._claim_of(entry)
        if self.ledger.lease_expired(entry):
            self._find_run(entry, claim)
        elif entry.state == "running":
            self._reconcile_run(entry, claim, self.runs.state(entry.run))

    def _stop_stray_runs(self, alive: Mapping[str, str], entries: Mapping[str, LedgerEntry]) -> None:
        """Stop runs that the platform has made late or twice, whose claim was released or belongs to another run. They would be
        refused, but not before they have their machines.

        Args:
            alive: Runs and their claims, asked for before the entries were read: each claim was written before.
        """
        for run, text in alive.items():
            with self._isolated(f"run {run}"):
                claim = Claim.read(text) if text else None
                if (
                    not claim
                    or claim.ledger != self.ledger.store.uri
                    or not (entry := entries.get(claim.key))
                ):
                    continue
                if (
                    entry.claim != claim.token
                    or entry.was_released(claim.token)
                    or entry.run not in ("", run)
                ):
                    self.problems.append(
                        f"entry {claim.key}: run {run} is of a claim that was released or is another run's, and is stopped"
                    )
                    self.runs.stop(run)

    def _find_run(self, entry: LedgerEntry, claim: Claim) -> None:
        if run := self.runs.find(run_name(entry.teacher, claim)):
            self._record_run(claim, run)
            logger.info(f"{entry.work.key}: run {run} was started by watcher {entry.owner}, which died")
        else:
            reason = f"watcher {entry.owner} died before it started a run"
            self.ledger.release(claim, reason)
            logger.info(f"{entry.work.key}: {reason}")

    def _reconcile_run(self, entry: LedgerEntry, claim: Claim, state: RunState) -> None:
        run, reason = entry.run, entry.stopping or state.reason
        try:
            if state.health == "alive":
                self._stop_if_overdue(entry, claim, state)
            elif state.health == "succeeded":
                self.ledger.done(claim, run, "unknown", "")
            else:
                by_a_person = state.health == "cancelled" and not entry.stopping
                counted = cause_of(reason) != "infrastructure"
                self.ledger.failed(claim, run, reason, for_good=by_a_person, counted=counted)
        except Refused as error:  # the run has recorded its end meanwhile
            logger.info(str(error))
        else:
            logger.info(f"{claim.key}: run {run}: {reason or state.health}")

    def _stop_if_overdue(self, entry: LedgerEntry, claim: Claim, state: RunState) -> None:
        """Stop a run that takes too long. One that has not begun is given up at once: it would be refused."""
        if reason := overdue(state, self.limits):
            self.ledger.overdue(claim, entry.run, reason, self.limits.pending)
            self.problems.append(f"entry {claim.key}: run {entry.run} {reason} and is stopped")
            self.runs.stop(entry.run)

    def start(self, teachers: Iterable[AnnouncedTeacher]) -> list[str]:
        """Start a run for each teacher that is new or is to be tried again, within the limits -> the ids of the runs.

        Teachers that have been tried less often come first, so that none waits for one that fails.
        """
        entries, unreadable, _ = self.ledger.read_all()
        todo = [(teacher, self.work(teacher)) for teacher in teachers]
        todo = [(t, w) for t, w in todo if w.key not in unreadable and _free(entries.get(w.key))]
        todo.sort(key=lambda pair: entries[pair[1].key].claims if pair[1].key in entries else 0)
        hours, outages, started = self.expected_gpu_hours(entries.values()), 0, list[str]()
        capacity = self.ledger.capacity(self.limits)
        for teacher, work in todo:
            if refusal := capacity.refusal(work, hours):
                self.waiting[refusal] += 1
                continue
            try:
                if claim := self.ledger.claim(work, teacher.address, self.owner, hours, self.limits):
                    started.append(self._start(teacher, claim))
                capacity, outages = self.ledger.capacity(self.limits), 0
            except (Refused, OSError) as error:
                self._note(teacher.name, error)
                outages = outages + 1 if isinstance(error, OSError) else 0
                if outages == OUTAGES:
                    break
        return started

    def expected_gpu_hours(self, entries: Iterable[LedgerEntry]) -> float:
        """GPU-hours to reserve for one distillation: those of the plan, or the most that one of these settings has reported."""
        recipe = self.recipe
        reported = (e.gpu_hours for e in entries if e.gpu_hours and e.work.recipe == recipe)
        return max(self.gpu_hours, *reported, 0.0)

    @property
    def recipe(self) -> str:
        """Digest of the settings that decide the result."""
        given = {name: value for name, value in self.settings.items() if name not in OTHER_SETTINGS}
        return json_digest(dict.fromkeys(RESULT_SETTINGS) | given)

    def work(self, teacher: AnnouncedTeacher) -> WorkItem:
        """The work item of distilling this teacher with the settings of this watcher."""
        return WorkItem(teacher=teacher.digest, recipe=self.recipe, image=self.runs.image)

    def _start(self, teacher: AnnouncedTeacher, claim: Claim) -> str:
        name = run_name(teacher.address, claim)
        own = {"teacher": teacher.address, "root": join_uri(self.root, claim.key), "claim": claim.text}
        try:
            run = self.runs.start(name, {**self.settings, **own})
        except Refused as error:  # it would be refused again: the teacher's own failure
            self.ledger.failed(claim, "", str(error))
            raise
        except OSError as error:  # the answer may have been lost after the run was started
            run = self.runs.find(name)
            if not run:
                self.ledger.release(claim, str(error))
                raise
        self._record_run(claim, run)
        logger.info(f"{teacher.name}: started run {run} ({name})")
        return run

    def _record_run(self, claim: Claim, run: str) -> None:
        """Record the run in the ledger; if another run of the claim was faster, this one will stop by itself."""
        try:
            self.ledger.record_run(claim, run)
        except Refused as error:
            logger.info(str(error))

    def _claim_of(self, entry: LedgerEntry) -> Claim:
        return Claim(self.ledger.store.uri, entry.work.key, entry.claim)


def find_and_start(
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
    pending_hours: float = 24.0,
    run_hours: float = 168.0,
) -> str:
    """Run the watcher once -> what it found and the ledger as Markdown, the output of the component."""
    limits = RetrainLimits(
        max_runs, max_gpu_hours, pending=timedelta(hours=pending_hours), run=timedelta(hours=run_hours)
    )
    if limits.runs < 1 or limits.gpu_hours < gpu_hours:
        raise Refused(
            f"max_runs is {limits.runs}, gpu_hours {gpu_hours:g}, max_gpu_hours {limits.gpu_hours:g}; no distillation "
            "could start: allow at least one run, and the GPU-hours of one"
        )
    if gpu_hours < 0 or (gpu_hours == 0 and _gpus(settings)):
        raise Refused(
            f"gpu_hours is {gpu_hours:g}, and a distillation takes {_gpus(settings)} GPUs; give the GPU-hours of its plan, as "
            "`make schedule` does"
        )
    if pending_hours <= 0 or run_hours <= 0:
        raise Refused(
            f"pending_hours is {pending_hours:g}, run_hours {run_hours:g}; every run would be stopped: give positive numbers"
        )
    if owns := settings.keys() & RUN_SETTINGS:
        raise Refused(f"settings has {min(owns)!r}, which retraining sets for each run; leave it out")
    runs = UploadedPipeline(pipeline, service_account, api)
    runs.check({**settings, **dict.fromkeys(RUN_SETTINGS, "")})
    watch = Watcher(Ledger(open_store(ledger), runs.now), runs, settings, root, gpu_hours, limits, owner)
    watch.reconcile()  # before the sources, which may fail
    found = find(teachers)
    for sentence in found.skipped:
        logger.warning(sentence)
    started = watch.start(found.teachers)
    head = f"{len(found.teachers)} teachers found, {len(started)} runs started"
    logger.info(head)
    return page(
        head,
        [*found.skipped, *watch.problems],
        watch.waiting,
        watch.ledger.capacity(limits),
        watch.ledger.entries(),
    )


def _gpus(settings: Mapping[str, Any]) -> int:
    """GPUs of a distillation: those of the settings, or else those of the recipe."""
    gpus = int(settings.get("gpus", -1))
    config = recipes.get(settings.get("recipe", "edm-digits"))
    return gpus if gpus >= 0 else recipes.default_gpus(config)


def overdue(state: RunState, limits: RetrainLimits) -> str:
    """Why a run that is alive is to be stopped; empty if it is not."""
    if state.waiting > limits.pending:
        return f"has waited for its machine for {state.waiting / timedelta(hours=1):.0f} hours"
    if state.age > limits.run:
        return f"is still at work after {state.age / timedelta(hours=1):.0f} hours"
    return ""


def run_name(teacher: str, claim: Claim) -> str:
    """Name of the run of a claim. It contains the token, so no other run has it."""
    word = re.sub(r"[^a-zA-Z0-9.-]+", "-", name_of(teacher))[:40]
    return f"retrain-{word}-{claim.token}"


def _free(entry: LedgerEntry | None) -> bool:
    return entry is None or entry.state in FREE


def page(
    head: str,
    problems: Iterable[str],
    waiting: Mapping[str, int],
    capacity: Capacity,
    entries: Iterable[LedgerEntry],
) -> str:
    """What a watcher has found, as Markdown."""
    limits = capacity.limits
    days = limits.window / timedelta(days=1)
    spent = f"{capacity.gpu_hours:g} of at most {limits.gpu_hours:g} GPU-hours are spent or reserved in {days:g} days"
    lines = [f"{head}; {spent}.", ""]
    lines += [f"- problem: {' '.join(problem.split())}" for problem in problems]
    lines += [f"- {count} teachers wait: {reason}" for reason, count in waiting.items()]
    return "\n".join([*lines, "", table(entries)])


def table(entries: Iterable[LedgerEntry]) -> str:
    """The entries as a Markdown table: the quarantined ones first, then the newest."""
    newest = sorted(entries, key=lambda e: e.changed, reverse=True)
    rows = [
        (e.teacher, e.state, e.claims, e.counted_failures, e.run or "-", e.package or e.decision or e.reason or "-", f"{e.changed:%Y-%m-%d %H:%M}", e.work.key)
        for e in sorted(newest, key=lambda e: e.state != "quarantined")
    ]  # fmt: skip
    lines = [
        f"| {' | '.join(' '.join(str(cell).replace('|', '/').split()) for cell in row)} |" for row in rows
    ]
    head = "| teacher | state | claims | failures | run | package or reason | changed (UTC) | entry |"
    return "\n".join([head, "|---|---|--:|--:|---|---|---|---|", *lines]) + "\n"
