"""A page about a training while it goes on, rewritten at one address: curves, previews, time left, GPU-hours so far."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from dmd2.parallel.ranks import World
from dmd2.stages.output_file import local_output
from dmd2.training.metrics_log import read_metrics
from dmd2.training.spending import Spending

logger = logging.getLogger(__name__)
EVERY_S = 120.0
"""Seconds between two versions of the page at least: one takes a second or two, for which all ranks wait."""


@dataclass
class ProgressPage:
    """The page of the main process. A later version that cannot be written is a warning: the training goes on."""

    out: str
    """Address of the HTML file; empty for none."""
    title: str
    folder: Path
    """Folder with the metrics and previews of the training."""
    steps: int
    spending: Spending
    world: World
    _next: float = 0.0

    def update(self, step: int, eta_s: float) -> None:
        """Rewrite the page if the last version is old enough. Called after a line of metrics was written."""
        if time.monotonic() >= self._next:
            self._try_to_write(f"{self._done(step)}, {timedelta(seconds=round(eta_s))} left")

    @contextmanager
    def from_start_to_end(self) -> Iterator[None]:
        """Write the first version, and the last when the block ends, with the reason if that is an error.

        Raises:
            OSError, Refused: The first version cannot be written.
        """
        self._write(f"{self._done(self._last_step())}, starting")
        try:
            yield
        except BaseException as error:
            self._try_to_write(f"{self._done(self._last_step())}, ended by: {error or type(error).__name__}")
            raise
        self._try_to_write(f"{self._done(self.steps)}, finished")

    def _last_step(self) -> int:
        return max((int(line["step"]) for line in read_metrics(self.folder)), default=0)

    def _done(self, step: int) -> str:
        return f"Step {step:,} of {self.steps:,} ({step / self.steps:.0%})"

    def _try_to_write(self, status: str) -> None:
        try:
            self._write(status)
        except Exception as error:  # of the plots too: a page is no reason to lose a training
            logger.warning("the page %s was not written: %s", self.out, error, exc_info=True)

    def _write(self, status: str) -> None:
        if not self.out or not self.world.is_main:
            return
        from dmd2.report import write_progress  # slow to import

        self._next = time.monotonic() + EVERY_S
        with local_output(self.out) as path:
            write_progress(path, self.title, [f"{status}.", *self.spending.sentences()], self.folder)
