"""What a run is expected to cost, by the plan of the library, before it is started."""

from __future__ import annotations

from functools import lru_cache

from components.prepare_run.parameters import RunParameters, Training
from dmd2.errors import Refused

ACCELERATOR = "cloud.google.com/gke-accelerator"
"""Label of GKE's nodes that names their GPU."""


def gpu_kind(given: RunParameters) -> str:
    """The GPU of the run's nodes as the plan names it; empty if the pool does not say."""
    return str(given.pool.get(ACCELERATOR, "")).removeprefix("nvidia-")


def planned_gpu_hours(given: RunParameters) -> float:
    """GPU-hours of all trainings of a run; 0 on the CPU. Latents, pairs and the evaluation are not included."""
    if not given.chosen_gpus:
        return 0.0
    kind = gpu_kind(given)
    if not kind:
        raise Refused(
            f"pool has no label {ACCELERATOR}, so there is no plan; add it, or give the GPU-hours by hand"
        )
    return sum(_gpu_hours(training, kind, given.chosen_gpus, given.nodes) for training in given.trainings)


@lru_cache
def _gpu_hours(training: Training, kind: str, gpus: int, nodes: int) -> float:
    from dmd2.plan import predict  # imports torch

    return predict(training.config, kind, gpus, nodes).gpu_hours
