"""The number of processors that this process may use: those of its affinity, but no more than the quotas of its control groups.

The limit of a pod or container is such a quota, `cpu.max` (version 2) or `cpu.cfs_quota_us` and `cpu.cfs_period_us`
(version 1), while `os.cpu_count()` is the number of processors of the whole node.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path


def usable_processors(root: Path = Path("/")) -> int:
    """At least 1; a quota of a fraction is rounded up.

    Args:
        root: Where `proc` and `sys` are.
    """
    affinity = getattr(os, "sched_getaffinity", None)  # Linux only
    there = len(affinity(0)) if affinity else os.cpu_count() or 1
    return max(1, min([there, *map(math.ceil, _quotas(root))]))


def _quotas(root: Path) -> Iterator[float]:
    """Quotas in processors, of the control groups of this process and of those above them."""
    for group in _groups(root):
        try:
            quota, period = _quota_and_period(group)
        except (OSError, ValueError):  # no controller of processors in this group
            continue
        if quota > 0 and period > 0:
            yield quota / period


def _quota_and_period(group: Path) -> tuple[int, int]:
    """Microseconds of processor time in each period; a quota of 0 or less is none."""
    if (group / "cpu.max").is_file():
        quota, period = (group / "cpu.max").read_text().split()
        return 0 if quota == "max" else int(quota), int(period)
    return int((group / "cpu.cfs_quota_us").read_text()), int((group / "cpu.cfs_period_us").read_text())


def _groups(root: Path) -> Iterator[Path]:
    """Folders of the control groups of this process, from its own to the topmost that can be seen.

    A container that does not see the path of its group has the group itself mounted at the top.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        for mount in _mounts(root / "sys/fs/cgroup", controllers):
            below = Path(os.path.normpath(path).lstrip("/"))
            yield from (mount / part for part in (below, *below.parents))


def _mounts(top: Path, controllers: str) -> list[Path]:
    """Where a hierarchy is mounted: all of version 2, which has no names, or the one of version 1 with the processors."""
    if not controllers:
        return [top, top / "unified"]
    return [top / controllers, top / "cpu"] if "cpu" in controllers.split(",") else []
