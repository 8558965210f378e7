"""`python -m components.reap_jobs`: delete the TrainJobs of the namespace that nobody follows any more."""

from __future__ import annotations

from components.distill.kube import connect
from components.reap_jobs.reap import reap
from dmd2 import log
from dmd2.errors import one_sentence

if __name__ == "__main__":
    log.configure()
    with one_sentence():
        reap(connect())
