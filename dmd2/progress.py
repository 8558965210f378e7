"""How far a stage is: a bar with an ETA on a terminal, a plain line now and then anywhere else."""

from __future__ import annotations

import sys
import time
from contextlib import suppress
from types import TracebackType
from typing import Self

from rich import progress as bars
from rich.console import Console

LINE_EVERY_S = 15.0
"""Seconds between plain lines."""


class Progress:
    """`with Progress("distill", 1000, "steps") as progress: progress.advance(note="...")`."""

    def __init__(self, what: str, total: int, unit: str, done: int = 0, shown: bool = True) -> None:
        self.what, self.total, self.unit, self.done, self.first = what, total, unit, done, done
        self.start = self.last_line = time.monotonic()
        self.console = Console(file=sys.stderr, quiet=not shown)
        self.shown = shown
        columns = (
            bars.TextColumn("[bold]{task.description}"),
            bars.BarColumn(),
            bars.MofNCompleteColumn(),
            bars.TextColumn(unit),
            bars.TimeElapsedColumn(),
            bars.TextColumn("left"),
            bars.TimeRemainingColumn(),
            bars.TextColumn("{task.fields[note]}"),
        )
        self.bar = bars.Progress(
            *columns, console=self.console, disable=not (shown and self.console.is_terminal)
        )
        self.task = self.bar.add_task(what, total=total, completed=done, note="")

    def __enter__(self) -> Self:
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()
        if not self.console.is_terminal and time.monotonic() - self.start >= LINE_EVERY_S:
            self._line("")

    def advance(self, count: int = 1, note: str = "") -> None:
        self.done += count
        if note:
            self.bar.update(self.task, advance=count, note=note)
        else:
            self.bar.update(self.task, advance=count)
        if not self.console.is_terminal and time.monotonic() - self.last_line >= LINE_EVERY_S:
            self._line(note)

    @property
    def eta_s(self) -> float:
        """Seconds left at the mean speed so far."""
        elapsed = time.monotonic() - self.start
        return elapsed / max(1, self.done - self.first) * (self.total - self.done)

    def _line(self, note: str) -> None:
        self.last_line = time.monotonic()
        if not self.shown:
            return
        left = f"{self.eta_s:.0f} s left" if self.done < self.total else "done"
        line = f"{self.what}: {self.done}/{self.total} {self.unit}, {left}{', ' if note else ''}{note}"
        with suppress(BrokenPipeError):  # nobody listens any more; the work goes on, to its next checkpoint
            print(line, file=sys.stderr, flush=True)
