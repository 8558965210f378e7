"""One run of the watcher: record the end of runs that could not do so, then start a run for each new teacher.

It may be killed at any point, and any number of watchers may work at once: every decision is a compare-and-swap in the
ledger, and a run without a valid claim stops by itself. The name of a run contains the token of its claim, so a run whose
watcher died before it could record the run's id is found by its name.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from components.find_teachers.ledger import FREE, Claim, Ledger, LedgerEntry, RetrainLimits, WorkItem, digest
from components.find_teachers.runs import PipelineRuns, RunState, UploadedPipeline
from components.find_teachers.sources import AnnouncedTeacher, find
from dmd2.errors import Refused
from dmd2.io.storage import join_uri, open_store

logger = logging.getLogger(__name__)

RESULT_SETTINGS = ("recipe", "overrides", "source", "gate")
"""The pipeline parameters that decide the result; with other values, the same teacher is another work item."""
RUN_SETTINGS = {"teacher", "root", "claim"}
"""The pipeline parameters that are set for each run."""


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

    def reconcile(self) -> None:
        """Find the runs of claims whose watcher died, and record the end of runs that could not do so themselves."""
        for entry in self.ledger.entries():
            self._reconcile_entry(entry)

    def _reconcile_entry(self, entry: LedgerEntry) -> None:
        claim = self._claim_of(entry)
        if self.ledger.lease_expired(entry):
            self._find_run(entry, claim)
        elif entry.state == "running":
            self._reconcile_run(claim, entry.run, self.runs.state(entry.run))

    def _find_run(self, entry: LedgerEntry, claim: Claim) -> None:
        if run := self.runs.find(run_name(entry.teacher, claim)):
            self._record_run(claim, run)
            logger.info(f"{entry.work.key}: run {run} was started by watcher {entry.owner}, which died")
        else:
            reason = f"watcher {entry.owner} died before it started a run"
            self.ledger.release(claim, reason)
            logger.info(f"{entry.work.key}: {reason}")

    def _reconcile_run(self, claim: Claim, run: str, state: RunState) -> None:
        if state.health == "alive":
            return
        try:
            if state.health == "succeeded":
                self.ledger.done(claim, run, "unknown", "")
            else:
                self.ledger.failed(claim, run, state.reason, for_good=state.health == "cancelled")
        except Refused as error:  # the run has recorded its end meanwhile
            logger.info(str(error))
        else:
            logger.info(f"{claim.key}: run {run}: {state.reason}")

    def start(self, teachers: Iterable[AnnouncedTeacher]) -> list[str]:
        """Start a run for each teacher that is new or has failed before, within the limits -> the ids of the runs."""
        entries = {entry.work.key: entry for entry in self.ledger.entries()}
        todo = [
            (teacher, work) for teacher in teachers if _free(entries.get((work := self.work(teacher)).key))
        ]
        todo.sort(
            key=lambda pair: _failures(entries.get(pair[1].key))
        )  # teachers that have failed less often come first
        started, capacity = [], self.ledger.capacity(self.limits)
        for teacher, work in todo:
            if refusal := capacity.refusal(work, self.gpu_hours):
                logger.info(f"{teacher.name}: waits, {refusal}")
                continue
            if claim := self.ledger.claim(work, teacher.address, self.owner, self.gpu_hours, self.limits):
                started.append(self._start(teacher, claim))
            capacity = self.ledger.capacity(self.limits)
        return started

    def work(self, teacher: AnnouncedTeacher) -> WorkItem:
        """The work item of distilling this teacher with the settings of this watcher."""
        shared = {name: self.settings.get(name) for name in RESULT_SETTINGS}
        return WorkItem(teacher=teacher.digest, recipe=digest(shared), image=self.runs.image)

    def _start(self, teacher: AnnouncedTeacher, claim: Claim) -> str:
        name = run_name(teacher.address, claim)
        own = {"teacher": teacher.address, "root": join_uri(self.root, claim.key), "claim": claim.text}
        try:
            run = self.runs.start(name, {**self.settings, **own})
        except Refused as error:
            self.ledger.release(claim, str(error))
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
) -> str:
    """Run the watcher once -> the ledger as Markdown, the output of the component."""
    limits = RetrainLimits(max_runs, max_gpu_hours)
    if limits.runs < 1 or gpu_hours <= 0 or limits.gpu_hours < gpu_hours:
        raise Refused(
            f"max_runs is {limits.runs}, gpu_hours {gpu_hours:g}, max_gpu_hours {limits.gpu_hours:g}; no distillation "
            "could start: allow at least one run, and the GPU-hours of one"
        )
    if owns := settings.keys() & RUN_SETTINGS:
        raise Refused(f"settings has {min(owns)!r}, which retraining sets for each run; leave it out")
    runs = UploadedPipeline(pipeline, service_account, api)
    runs.check({**settings, **dict.fromkeys(RUN_SETTINGS, "")})
    watch = Watcher(Ledger(open_store(ledger)), runs, settings, root, gpu_hours, limits, owner)
    watch.reconcile()  # before the sources, which may fail
    found = find(teachers)
    for sentence in found.skipped:
        logger.warning(sentence)
    started = watch.start(found.teachers)
    logger.info("%d teachers found, %d runs started", len(found.teachers), len(started))
    return table(watch.ledger.entries())


def run_name(teacher: str, claim: Claim) -> str:
    """Name of the run of a claim. It contains the token, so no other run has it."""
    word = re.sub(r"[^a-zA-Z0-9.-]+", "-", teacher.rstrip("/").rpartition("/")[2])[:40]
    return f"retrain-{word}-{claim.token}"


def _free(entry: LedgerEntry | None) -> bool:
    return entry is None or entry.state in FREE


def _failures(entry: LedgerEntry | None) -> int:
    return len(entry.failures) if entry else 0


def table(entries: Iterable[LedgerEntry]) -> str:
    """The entries as a Markdown table, newest first."""
    rows = [
        (e.teacher, e.state, e.claims, len(e.failures), e.run or "-", e.package or e.decision or e.reason or "-", f"{e.changed:%Y-%m-%d %H:%M}")
        for e in sorted(entries, key=lambda e: e.changed, reverse=True)
    ]  # fmt: skip
    lines = [
        f"| {' | '.join(' '.join(str(cell).replace('|', '/').split()) for cell in row)} |" for row in rows
    ]
    head = "| teacher | state | claims | failures | run | package or reason | changed (UTC) |"
    return "\n".join([head, "|---|---|--:|--:|---|---|---|", *lines]) + "\n"
