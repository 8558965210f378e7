"""Seconds that each phase of a training step takes on the device, measured without waiting for it."""

from __future__ import annotations

import time
from collections import defaultdict
from itertools import pairwise

import torch

CPU = torch.device("cpu")


class PhaseTimer:
    """`start("student")`, `start("critic")`, `stop()`: every call ends the phase before it.

    On CUDA the boundaries are events in the stream, and their times are read by `read` only. On other devices they are
    times of the host's clock.
    """

    def __init__(self, device: torch.device = CPU) -> None:
        self.device = device
        self._boundaries: list[tuple[str, torch.cuda.Event | float]] = []

    def start(self, phase: str) -> None:
        self._boundaries.append((phase, self._now()))

    def stop(self) -> None:
        self.start("")

    def read(self) -> dict[str, float]:
        """Total seconds by phase since the last call. Waits for the device to finish the phases. Call it after `stop`."""
        seconds: dict[str, float] = defaultdict(float)
        for (phase, begin), (_, end) in pairwise(self._boundaries):
            if phase:
                seconds[phase] += _elapsed_s(begin, end)
        self._boundaries.clear()
        return dict(seconds)

    def _now(self) -> torch.cuda.Event | float:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event


def _elapsed_s(begin: torch.cuda.Event | float, end: torch.cuda.Event | float) -> float:
    if isinstance(begin, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
        end.synchronize()
        return begin.elapsed_time(end) / 1e3
    assert isinstance(begin, float)
    assert isinstance(end, float)
    return end - begin
