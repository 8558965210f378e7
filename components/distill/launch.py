"""Starting the training from its step of the pipeline, with signals passed on and the exit status passed back.

A small protocol, `Launcher`, and two implementations: a TrainJob over several machines (`trainjob.py`) and, here, torchrun
over the GPUs of this machine. `choose` says which one a training of some size gets. torchrun hides the exit status of its workers, and kills them half a minute after a signal. So it runs in a process of its own,
`python -m components.distill.launch`, which ends with the most specific exit status of its workers (`components.failure.severity`), and signals are
sent to the workers themselves, which finish their step, save and exit.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Literal, Protocol

from components.failure import severity
from dmd2 import log
from dmd2.errors import Refused
from dmd2.io.storage import join_uri

logger = logging.getLogger("components.distill.launch")

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
IN_A_POD = Path("/var/run/secrets/kubernetes.io/serviceaccount/token")
"""Where Kubernetes mounts the credentials of a pod's account."""
Where = Literal["trainjob", "here"]
GRACE_S = 900
"""Seconds that torchrun waits for the other workers after one has ended: they may be saving."""


@dataclass(frozen=True)
class JobSize:
    """Machines and GPUs of a training."""

    nodes: int = 1
    gpus: int = 0
    """GPUs of each node; 0 = one process on the CPU."""
    queue: str = ""
    """Kueue's LocalQueue of a TrainJob; empty = it is not queued."""

    def check(self) -> None:
        """Raise Refused if no training has this size."""
        if self.nodes < 1:
            raise Refused(f"nodes is {self.nodes}; give a number of machines, at least 1")
        if self.gpus < 0:
            raise Refused(f"gpus is {self.gpus}; give a number of GPUs, or 0 for the CPU")

    @property
    def processes(self) -> int:
        """Processes on each node."""
        return max(1, self.gpus)


@dataclass(frozen=True)
class Training:
    """A training of a run of the pipeline."""

    arguments: Sequence[str]
    """Of `dmd2`."""
    size: JobSize
    run_id: str
    root: str
    """Folder of the run."""
    folder: str
    """Folder in it that the training makes."""
    pool: Mapping[str, str]
    """Labels of its nodes."""

    @property
    def out(self) -> str:
        return join_uri(self.root, self.folder)


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
    """`dmd2 ARGUMENTS` in the processes of this machine, which are all, or one node's of a training on several."""

    arguments: Sequence[str]
    gpus: int
    """GPUs that this machine must have; 0 = the training is on the CPU."""
    processes: int
    process: subprocess.Popen[bytes] | None = None
    pending_signal: int = 0
    """A signal that arrived, to be sent again if the process has just been started."""

    def start(self) -> None:
        check_gpus(self.gpus)
        command = [sys.executable, "-m", __name__, str(self.processes), *self.arguments]
        # In a session of its own, so that Ctrl-C in a terminal reaches the workers once, through `send_signal`.
        on_cpu = {} if self.gpus else {"CUDA_VISIBLE_DEVICES": ""}
        self.process = subprocess.Popen(command, env=os.environ | on_cpu, start_new_session=True)
        if self.pending_signal:
            self.send_signal(self.pending_signal)

    def wait(self) -> None:
        assert self.process
        self.process.wait()

    def exit_status(self) -> int:
        assert self.process
        return _shell_status(self.process.returncode)

    def send_signal(self, number: int) -> None:
        self.pending_signal = number
        if self.process:
            for pid in _child_processes(self.process.pid) or [self.process.pid]:
                with suppress(ProcessLookupError):
                    os.kill(pid, number)


def choose(size: JobSize, folder: str) -> Where:
    """Where a training of this size runs: in a TrainJob where this pod may make one of that size, or else in the pod itself.

    Args:
        folder: Folder of the run.

    Raises:
        Refused: It needs several machines, and there is no TrainJob; or the pods of a TrainJob may not write to the folder.
    """
    size.check()
    missing = _why_no_trainjob(size, folder)
    if not missing:
        return "trainjob"
    if size.nodes > 1:
        raise Refused(
            f"nodes is {size.nodes}, which takes a TrainJob, and {missing}; give 1, or see manifests/README.md"
        )
    logger.info("the training runs in the pod of its own step: %s", missing)
    return "here"


def _why_no_trainjob(size: JobSize, folder: str) -> str:
    """Why there is no TrainJob for a training of this size; empty if there is one, which may write to the folder of the run."""
    if not IN_A_POD.exists():
        return "there is no cluster"
    from components.distill.kube import connect  # the client takes a second to import
    from components.distill.trainjob import find_runtime

    found = find_runtime(connect())
    if isinstance(found, str):
        return found
    if found.gpus != size.gpus:
        return f"gpus is {size.gpus} while a node of the TrainingRuntime has {found.gpus}"
    found.check_folder(folder)
    return ""


def launcher(training: Training, where: Where) -> Launcher:
    if where == "here":
        size = training.size
        return Torchrun(training.arguments, size.gpus, size.processes)
    from components.distill.kube import connect
    from components.distill.trainjob import TrainJob

    kube = connect()
    return TrainJob(training, kube, kube.this_pod())


def run_to_end(launcher: Launcher) -> int:
    """Start the training, forward signals to it and wait for its end -> its exit status."""
    with _forward_signals(launcher):
        launcher.start()
        launcher.wait()
    return launcher.exit_status()


def torchrun(processes: int, arguments: Sequence[str]) -> int:
    """Run `python -m dmd2 ARGUMENTS` in several processes -> the most specific exit status, or 0.

    On several machines torchrun takes their number and addresses from PET_*, where Kubeflow Trainer puts them.
    """
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    alone = [] if "PET_NNODES" in os.environ else ["--standalone"]
    settings = [*alone, f"--nproc-per-node={processes}", f"--shutdown-timeout={GRACE_S}"]
    try:  # after "--", or torchrun would read --start as an abbreviation of its own --start-method
        run.main([*settings, "-m", "--", "dmd2", *arguments])
    except ChildFailedError as failed:
        failures = sorted(
            (severity(_shell_status(one.exitcode)), one.timestamp, rank)
            for rank, one in failed.failures.items()
        )
        rank = failures[0][2]
        status = _shell_status(failed.failures[rank].exitcode)
        logger.error("process %s of %d on this machine ended with %d", rank, processes, status)
        return status
    except SignalException as stopped:  # it arrived before the workers were started
        return 128 + stopped.sigval
    return 0


def _shell_status(code: int) -> int:
    """The exit status as a shell says it: 128 and the signal for a process that was killed."""
    return code if code >= 0 else 128 - code


def _child_processes(parent: int) -> list[int]:
    """The process ids of the running children of a process."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, above = stat.read_text().rpartition(")")[2].split()[:2]
            if int(above) == parent and state not in "ZX":
                found.append(int(stat.parent.name))
    return found


def check_gpus(wanted: int) -> None:
    """Raise Refused if there are fewer GPUs, instead of training on the CPU when a driver is missing or too old for torch."""
    import torch

    from dmd2.parallel.ranks import check_driver

    if wanted > (found := torch.cuda.device_count()):
        raise Refused(
            f"gpus is {wanted}, and this machine shows {found}; ask for that many, or 0 for the CPU"
        )
    if wanted:
        check_driver()


@contextmanager
def _forward_signals(launcher: Launcher) -> Iterator[None]:
    def forward(number: int, frame: FrameType | None) -> None:
        launcher.send_signal(number)
        logger.info("%s: passed on to the training", signal.Signals(number).name)

    before = {number: signal.signal(number, forward) for number in SIGNALS}
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # see `node`
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    log.configure()
    sys.exit(torchrun(int(sys.argv[1]), sys.argv[2:]))
