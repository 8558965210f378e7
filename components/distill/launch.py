"""How the training is started from its step of the pipeline, and how its end is told.

One small interface, `Launch`, and for now one way to do it: torchrun over the GPUs of this very machine. torchrun hides
the exit status of its workers, and leaves them half a minute when it is told to stop. So it runs inside a process of
ours, `python -m components.distill.launch`, which ends with the status of the worker that failed first, and a signal
goes to the workers themselves, which end their step, save and leave.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Protocol

from dmd2 import log
from dmd2.errors import Refused

logger = logging.getLogger("components.distill.launch")

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
GRACE_S = 900
"""For how long torchrun waits for the rest of its workers once one has stopped: they may be saving."""


@dataclass(frozen=True)
class Size:
    """What a training asks for."""

    nodes: int = 1
    gpus: int = 0
    """Of each node; 0 = one process on the CPU."""
    queue: str = ""
    """Kueue's LocalQueue, for a training on more than one node."""

    def check(self) -> None:
        if self.nodes != 1:
            raise Refused(
                f"nodes is {self.nodes}; a distillation runs on one machine for now, give it more GPUs instead"
            )
        if self.gpus < 0:
            raise Refused(f"gpus is {self.gpus}; give a number of GPUs, or 0 for the CPU")

    @property
    def processes(self) -> int:
        return max(1, self.gpus)


class Launch(Protocol):
    def start(self) -> None: ...

    def follow(self) -> None:
        """Wait for its end; what it says is said here, too."""

    def result(self) -> int:
        """The exit status of the training, once it has ended."""

    def cancel(self, number: int) -> None:
        """Pass a signal on."""


@dataclass
class Torchrun:
    """`dmd2 WORDS` in a process for each GPU of this machine."""

    words: Sequence[str]
    size: Size
    process: subprocess.Popen[bytes] | None = None
    cancelled: int = 0
    """The signal that was passed on."""

    def start(self) -> None:
        self.size.check()
        _devices(self.size.gpus)
        command = [sys.executable, "-m", __name__, str(self.size.processes), *self.words]
        # In a session of its own: what a terminal sends to all reaches the workers once, through `cancel`.
        self.process = subprocess.Popen(command, start_new_session=True)
        if self.cancelled:
            self.cancel(self.cancelled)

    def follow(self) -> None:
        assert self.process
        self.process.wait()

    def result(self) -> int:
        assert self.process
        status = self.process.returncode
        return status if status >= 0 else 128 - status

    def cancel(self, number: int) -> None:
        self.cancelled = number
        if self.process:
            for pid in _children(self.process.pid) or [self.process.pid]:
                with suppress(ProcessLookupError):
                    os.kill(pid, number)


def through(launch: Launch) -> int:
    """Start, follow, pass signals on -> the exit status."""
    with _passed_on(launch):
        launch.start()
        launch.follow()
    return launch.result()


def torchrun(processes: int, words: Sequence[str]) -> int:
    """Run `python -m dmd2 WORDS` so many times -> the exit status of the one that failed first, or 0."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    settings = ["--standalone", f"--nproc-per-node={processes}", f"--shutdown-timeout={GRACE_S}"]
    try:
        run.main([*settings, "-m", "dmd2", *words])
    except ChildFailedError as failed:
        rank, first = failed.get_first_failure()
        logger.error("process %s of %d ended with %d", rank, processes, first.exitcode)
        return first.exitcode if first.exitcode >= 0 else 128 - first.exitcode
    except SignalException as stopped:  # before there was a worker to tell
        return 128 + stopped.sigval
    return 0


def _children(parent: int) -> list[int]:
    """The living processes that a process has started."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, above = stat.read_text().rpartition(")")[2].split()[:2]
            if int(above) == parent and state not in "ZX":
                found.append(int(stat.parent.name))
    return found


def _devices(wanted: int) -> None:
    """Nothing falls back to a CPU when a driver is missing."""
    import torch

    if wanted > (found := torch.cuda.device_count()):
        raise Refused(
            f"gpus is {wanted}, and this machine shows {found}; ask for that many, or 0 for the CPU"
        )


@contextmanager
def _passed_on(launch: Launch) -> Iterator[None]:
    def pass_on(number: int, frame: FrameType | None) -> None:
        launch.cancel(number)
        logger.info("%s: passed on to the training", signal.Signals(number).name)

    before = {number: signal.signal(number, pass_on) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    log.configure()
    sys.exit(torchrun(int(sys.argv[1]), sys.argv[2:]))
