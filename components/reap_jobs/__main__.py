"""`python -m components.reap_jobs`: delete the TrainJobs of the namespace that nobody follows any more."""

from __future__ import annotations

from datetime import timedelta

import tyro

from components.distill.kube import connect
from components.reap_jobs.reap import GRACE, KEPT, reap
from dmd2 import log
from dmd2.errors import one_sentence


def main(
    grace_minutes: float = GRACE / timedelta(minutes=1), kept_hours: float = KEPT / timedelta(hours=1)
) -> None:
    """Delete the TrainJobs of this pod's namespace that nobody follows any more.

    Args:
        grace_minutes: Time for which a launcher may still be at work after its Workflow has ended, and a Workflow not be seen yet.
        kept_hours: Time for which a TrainJob that has ended is kept, if its launcher has not deleted it.
    """
    reap(connect(), grace=timedelta(minutes=grace_minutes), kept=timedelta(hours=kept_hours))


if __name__ == "__main__":
    log.configure()
    with one_sentence():
        tyro.cli(main, prog="python -m components.reap_jobs")
