"""`python -m components.distill.node GPUS VERB ...`: process 1 of a pod of a training on several machines.

It starts torchrun over this machine's part of the training, whose size and rank Kubeflow Trainer puts into the environment
(PET_*). Signals go to the training's processes, and the pod ends with the most specific of their exit statuses.
"""

from __future__ import annotations

import logging
import os
import signal
import sys

if __name__ == "__main__":
    # The kernel drops a signal to process 1 that has no handler. Until `run_to_end` has one, after the imports, they wait.
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGINT, signal.SIGHUP))

from components.distill.launch import Torchrun, run_to_end
from dmd2.errors import EXIT_RANK_LOST, EXIT_RESTARTABLE, one_sentence

logger = logging.getLogger("components.distill.node")

BECAUSE_OF_ANOTHER = (EXIT_RANK_LOST, EXIT_RESTARTABLE)
"""Exit statuses of a node that was not told to stop itself: another one was, or has failed."""
LINGER_S = 10.0
"""Seconds that such a node waits before it ends. The first pod that ends decides how its gang is restarted, so the one that
knows the reason has to be seen first."""


def run_node(gpus: int, arguments: list[str]) -> int:
    """Train on this machine's GPUs, or in PET_NPROC_PER_NODE processes on its CPU -> the exit status of the pod."""
    processes = int(os.environ.get("PET_NPROC_PER_NODE", max(1, gpus)))
    training = Torchrun(arguments, gpus, processes)
    status = run_to_end(training)
    if status in BECAUSE_OF_ANOTHER and not training.pending_signal:
        _linger()
    return status


def _linger() -> None:
    """Wait, but not longer than Kubernetes lets this pod."""
    logger.info("it ends because of another node, whose pod should end first: waiting for %g s", LINGER_S)
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM,))
    signal.sigtimedwait((signal.SIGTERM,), LINGER_S)


if __name__ == "__main__":
    with one_sentence():
        sys.exit(run_node(int(sys.argv[1]), sys.argv[2:]))
