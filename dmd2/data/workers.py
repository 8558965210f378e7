"""Units of work in several processes, which are forked, so that the source does not have to be pickled."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from dmd2.data.units import ShardingJob, Task, Unit
from dmd2.errors import Interrupted
from dmd2.progress import Progress

_forked: tuple[Task, list[Unit], ShardingJob, Any] | None = None


def run_in_processes(
    label: str, task: Task, units: list[Unit], job: ShardingJob, workers: int
) -> Iterator[tuple[Unit, str]]:
    """Run the task for each unit in several processes; yield (unit, result) as they complete."""
    global _forked
    if not units:
        return
    sizes = [unit.size for unit in units]
    known = all(size is not None for size in sizes)
    total, word = (sum(size or 0 for size in sizes), "images") if known else (len(units), "archives")
    context = multiprocessing.get_context("fork")
    counts = context.Array("q", 2)
    _forked = task, units, job, counts
    with (
        Progress(label, total, word) as progress,
        ProcessPoolExecutor(
            min(workers, len(units)), context, initializer=_end_with_parent, initargs=(os.getpid(),)
        ) as pool,
    ):
        start, reported, finished, begun = time.monotonic(), 0, 0, 0
        waiting: dict[Future[str], Unit] = {}
        try:
            while waiting or begun < len(units):
                while (
                    begun < len(units) and len(waiting) < 2 * workers
                ):  # more would be looked at in every turn
                    waiting[pool.submit(_run_unit, begun)] = units[begun]
                    begun += 1
                done, _ = wait(waiting, timeout=0.5, return_when=FIRST_COMPLETED)
                finished += len(done)
                images, size = counts[:]
                speed = size / 1e6 / max(1e-9, time.monotonic() - start)
                reached = images if known else finished
                progress.advance(reached - reported, f"{images} images, {speed:.1f} MB/s")
                reported = reached
                for future in done:
                    yield waiting.pop(future), future.result()
        except BrokenProcessPool:
            raise Interrupted(
                "a worker was killed, perhaps because memory ran out; the same command goes on, and with fewer "
                "--workers it needs less",
                75,
            ) from None
        except BaseException:
            for process in list((pool._processes or {}).values()):
                process.terminate()
            raise


def _run_unit(number: int) -> str:
    assert _forked is not None
    task, units, job, counts = _forked

    def count(images: int, size: int) -> None:
        with counts.get_lock():
            counts[0] += images
            counts[1] += size

    return task(units[number], job, count)


def _end_with_parent(parent: int) -> None:
    """In a worker: ignore Ctrl-C, which the parent handles, and exit when the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
