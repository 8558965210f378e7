"""Limits for all entries of a ledger together: how many runs, and how many GPU-hours."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import NamedTuple

from components.find_teachers.entries import LedgerObject, WorkItem


class Reservation(LedgerObject):
    """The share of a claim in the limits: one run, and its GPU-hours."""

    teacher: str
    key: str
    claim: str
    gpu_hours: float
    at: datetime


class Reservations(LedgerObject):
    """Reservations of claims that hold, and of runs that ended within the window with what they have cost."""

    places: tuple[Reservation, ...] = ()


class RetrainLimits(NamedTuple):
    """Limits for all entries of a ledger together, and for the time of each run."""

    runs: int
    """Largest number of runs at a time."""
    gpu_hours: float
    """Largest sum of GPU-hours of the runs that were claimed within the window."""
    window: timedelta = timedelta(days=7)
    pending: timedelta = timedelta(days=1)
    """Longest time that a run, or a step of it, may wait for its machine."""
    run: timedelta = timedelta(days=7)
    """Longest time from the creation of a run to its end."""


@dataclass
class Capacity:
    """How much of the limits is used."""

    limits: RetrainLimits
    active: list[Reservation] = field(default_factory=list)
    """Reservations of claims that hold."""
    recent: list[Reservation] = field(default_factory=list)
    """Reservations of the window whose runs have ended."""

    @property
    def gpu_hours(self) -> float:
        """GPU-hours that are spent or reserved within the window."""
        return sum(reservation.gpu_hours for reservation in (*self.active, *self.recent))

    def refusal(self, work: WorkItem, gpu_hours: float) -> str:
        """The reason why a run may not start now; empty if it may."""
        if other := next(
            (reservation for reservation in self.active if reservation.teacher == work.teacher), None
        ):
            return f"entry {other.key} is at work on the same teacher"
        if len(self.active) >= self.limits.runs:
            return f"{len(self.active)} of at most {self.limits.runs} runs are at work"
        if self.gpu_hours + gpu_hours > self.limits.gpu_hours:
            days = self.limits.window / timedelta(days=1)
            return (
                f"{self.gpu_hours:g} of at most {self.limits.gpu_hours:g} GPU-hours are spent in {days:g} days, "
                f"a run takes {gpu_hours:g}"
            )
        return ""
