"""Starting the training from its step of the pipeline, with signals passed on and the exit status passed back.

A small protocol, `Launcher`, and one implementation: torchrun over the GPUs of this machine. torchrun hides the exit status
of its workers, and kills them half a minute after a signal. So it runs in a process of its own,
`python -m components.distill.launch`, which ends with the exit status of the worker that failed first, and signals are
sent to the workers themselves, which finish their step, save and exit.
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
"""Seconds that torchrun waits for the other workers after one has ended: they may be saving."""


@dataclass(frozen=True)
class JobSize:
    """Machines and GPUs of a training."""

    nodes: int = 1
    gpus: int = 0
    """GPUs of each node; 0 = one process on the CPU."""
    queue: str = ""
    """Kueue's LocalQueue of a training on more than one node."""

    def check(self) -> None:
        """Raise Refused if a training of this size cannot be started."""
        if self.nodes != 1:
            raise Refused(
                f"nodes is {self.nodes}; a distillation runs on one machine for now, give it more GPUs instead"
            )
        if self.gpus < 0:
            raise Refused(f"gpus is {self.gpus}; give a number of GPUs, or 0 for the CPU")

    @property
    def processes(self) -> int:
        return max(1, self.gpus)


class Launcher(Protocol):
    def start(self) -> None:
        """Start the training."""

    def wait(self) -> None:
        """Wait for the end of the training; its output goes to this process's output."""

    def exit_status(self) -> int:
        """The exit status of the training, after `wait`."""

    def send_signal(self, number: int) -> None:
        """Send a signal to the processes of the training."""


@dataclass
class Torchrun:
    """`dmd2 ARGUMENTS` in one process per GPU of this machine."""

    arguments: Sequence[str]
    size: JobSize
    process: subprocess.Popen[bytes] | None = None
    pending_signal: int = 0
    """A signal that arrived, to be sent again if the process has just been started."""

    def start(self) -> None:
        self.size.check()
        _check_gpus(self.size.gpus)
        command = [sys.executable, "-m", __name__, str(self.size.processes), *self.arguments]
        # In a session of its own, so that Ctrl-C in a terminal reaches the workers once, through `send_signal`.
        self.process = subprocess.Popen(command, start_new_session=True)
        if self.pending_signal:
            self.send_signal(self.pending_signal)

    def wait(self) -> None:
        assert self.process
        self.process.wait()

    def exit_status(self) -> int:
        assert self.process
        status = self.process.returncode
        return status if status >= 0 else 128 - status

    def send_signal(self, number: int) -> None:
        self.pending_signal = number
        if self.process:
            for pid in _child_processes(self.process.pid) or [self.process.pid]:
                with suppress(ProcessLookupError):
                    os.kill(pid, number)


def run_to_end(launcher: Launcher) -> int:
    """Start the training, forward signals to it and wait for its end -> its exit status."""
    with _forward_signals(launcher):
        launcher.start()
        launcher.wait()
    return launcher.exit_status()


def torchrun(processes: int, arguments: Sequence[str]) -> int:
    """Run `python -m dmd2 ARGUMENTS` in several processes -> the exit status of the first that failed, or 0."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    settings = ["--standalone", f"--nproc-per-node={processes}", f"--shutdown-timeout={GRACE_S}"]
    try:
        run.main([*settings, "-m", "dmd2", *arguments])
    except ChildFailedError as failed:
        rank, first = failed.get_first_failure()
        logger.error("process %s of %d ended with %d", rank, processes, first.exitcode)
        return first.exitcode if first.exitcode >= 0 else 128 - first.exitcode
    except SignalException as stopped:  # it arrived before the workers were started
        return 128 + stopped.sigval
    return 0


def _child_processes(parent: int) -> list[int]:
    """The process ids of the running children of a process."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, above = stat.read_text().rpartition(")")[2].split()[:2]
            if int(above) == parent and state not in "ZX":
                found.append(int(stat.parent.name))
    return found


def _check_gpus(wanted: int) -> None:
    """Raise Refused if there are fewer GPUs, instead of training on the CPU when a driver is missing."""
    import torch

    if wanted > (found := torch.cuda.device_count()):
        raise Refused(
            f"gpus is {wanted}, and this machine shows {found}; ask for that many, or 0 for the CPU"
        )


@contextmanager
def _forward_signals(launcher: Launcher) -> Iterator[None]:
    def forward(number: int, frame: FrameType | None) -> None:
        launcher.send_signal(number)
        logger.info("%s: passed on to the training", signal.Signals(number).name)

    before = {number: signal.signal(number, forward) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    log.configure()
    sys.exit(torchrun(int(sys.argv[1]), sys.argv[2:]))
