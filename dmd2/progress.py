"""Progress of a stage: a bar with the remaining time on a terminal, a log record now and then anywhere else."""

from __future__ import annotations

import logging
import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Self

from dmd2 import log

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

logger = logging.getLogger(__name__)
RECORD_EVERY_S = 15.0
"""Seconds between log records."""


class Progress:
    """`with Progress("distill", 1000, "steps") as progress: progress.advance(note="...")`.

    Args:
        label: What is in progress.
        total: Number of units of the whole.
        unit: Name of a unit, in the plural.
        done: Units that were done by an earlier start.
        visible: False for all processes but the main one.
    """

    def __init__(self, label: str, total: int, unit: str, done: int = 0, visible: bool = True) -> None:
        self.label, self.total, self.unit, self.done, self.first = label, total, unit, done, done
        self.recorded = done
        self.start = self.last_record = time.monotonic()
        self.visible = visible
        self._bar = self._make_bar() if visible and sys.stderr.isatty() and not log.is_json() else None

    def __enter__(self) -> Self:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()
        elif time.monotonic() - self.start >= RECORD_EVERY_S and self.recorded < self.total:
            self._record("")

    def advance(self, count: int = 1, note: str = "") -> None:
        """Count units as done. The `note` stands behind the bar until the next one."""
        self.done += count
        if self._bar:
            task = self._bar.task_ids[0]
            self._bar.advance(task, count)
            if note:
                self._bar.update(task, note=note)
        elif time.monotonic() - self.last_record >= RECORD_EVERY_S:
            self._record(note)

    def leave_out(self, seconds: float) -> None:
        """Do not expect again what took these seconds, such as compiling, in the time that is left."""
        self.start += seconds

    @property
    def eta_s(self) -> float:
        """Seconds left at the mean speed so far."""
        elapsed = time.monotonic() - self.start
        return elapsed / max(1, self.done - self.first) * (self.total - self.done)

    def _record(self, note: str) -> None:
        self.last_record, self.recorded = time.monotonic(), self.done
        if not self.visible:
            return
        left = f"{self.eta_s:.0f} s left" if self.done < self.total else "done"
        known = [left] if self.done > self.first or self.done == self.total else []
        line = ", ".join(
            [f"{self.label}: {self.done}/{self.total} {self.unit}", *known, *([note] if note else [])]
        )
        fields = {"stage": self.label, "done": self.done, "total": self.total, "unit": self.unit}
        logger.info(line, extra=fields | {"eta_s": round(self.eta_s, 1), "note": note})

    def _make_bar(self) -> Bar:
        from rich import progress

        bar = progress.Progress(
            progress.TextColumn("[bold]{task.description}"),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TextColumn(self.unit),
            progress.TimeElapsedColumn(),
            progress.TextColumn("left"),
            progress.TimeRemainingColumn(),
            progress.TextColumn("{task.fields[note]}"),
            console=log.console(),
        )
        bar.add_task(self.label, total=self.total, completed=self.done, note="")
        return bar
