"""What a training has cost up to now, over all its starts: GPU-hours, and money where a GPU has a price."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Spending:
    """The cost of a training while it goes on."""

    gpus: int = 0
    before_s: float = 0.0
    """Seconds of the starts before this one."""
    restarts: int = 0
    """Number of these starts."""
    price: float = 0.0
    """Price of a GPU for an hour, in any currency; 0 = unknown."""
    budget: float = 0.0
    """Largest number of GPU-hours of the whole run; 0 = no limit."""
    start: float = field(default_factory=time.monotonic)
    """When this start began, by the monotonic clock."""

    @property
    def gpu_hours(self) -> float:
        """From the start of the processes to their end, whatever they did: loading, saving and scoring too."""
        return (self.before_s + time.monotonic() - self.start) * self.gpus / 3600

    def sentences(self) -> list[str]:
        """What a page says about it; nothing for a training on the CPU."""
        if not self.gpus:
            return []
        hours, starts = self.gpu_hours, self.restarts + 1
        limit = f" of at most {self.budget:g}" if self.budget else ""
        cost = f", {hours * self.price:,.2f} at {self.price:g} an hour" if self.price else ""
        begun = f", over {starts} starts" if starts > 1 else ""
        return [f"{hours:.2f}{limit} GPU-hours of {self.gpus} GPUs so far{begun}{cost}."]


def training_seconds(metrics: Iterable[Mapping[str, float]], batch: int) -> float:
    """Seconds of the steps in a log of metrics, at least: each line holds the mean speed since the one before."""
    seconds, before = 0.0, 0
    for line in metrics:
        if speed := line.get("samples_per_s"):
            seconds += (int(line["step"]) - before) * batch / speed
            before = int(line["step"])
    return seconds
