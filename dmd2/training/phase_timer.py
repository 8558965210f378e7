"""Seconds that each phase of a training step takes on the device, measured without waiting for it."""

from __future__ import annotations

import time
from collections import Counter
from itertools import pairwise

import torch

CPU = torch.device("cpu")


class PhaseTimer:
    """`start("student")`, `start("critic")`, `stop()`: every call ends the phase before it.

    On an accelerator the boundaries are events in its stream, and their times are read by `read` only. On a CPU the
    boundaries are times of the clock.
    """

    def __init__(self, device: torch.device = CPU) -> None:
        self.device = device
        self._boundaries: list[tuple[str, torch.Event | float]] = []

    def start(self, phase: str) -> None:
        if self.device.type == "cpu":
            self._boundaries.append((phase, time.perf_counter()))
            return
        event = torch.Event(self.device, enable_timing=True)
        event.record()
        self._boundaries.append((phase, event))

    def stop(self) -> None:
        self.start("")

    def read(self) -> dict[str, float]:
        """Total seconds by phase since the last call. Waits for the device to finish the phases. Call it after `stop`."""
        seconds: Counter[str] = Counter()
        for (phase, begin), (_, end) in pairwise(self._boundaries):
            if phase:
                seconds[phase] += _elapsed_s(begin, end)  # type: ignore[assignment]
        self._boundaries.clear()
        return dict(seconds)


def _elapsed_s(begin: torch.Event | float, end: torch.Event | float) -> float:
    if isinstance(begin, torch.Event) and isinstance(end, torch.Event):
        end.synchronize()
        return begin.elapsed_time(end) / 1e3
    assert isinstance(begin, float)
    assert isinstance(end, float)
    return end - begin
