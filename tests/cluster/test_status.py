"""Trainer's alpha feature TrainJobStatus: the progress of a training in the status of its TrainJob."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.cluster.conftest import LONG, Cluster, Run


@pytest.fixture
def told(cluster: Cluster) -> Iterator[None]:
    """Trainer with the feature on."""
    cluster.bed.restart_trainer(with_status=True)
    yield
    cluster.bed.restart_trainer(with_status=False)


def test_the_status_of_a_trainjob_tells_how_far_its_training_is(
    cluster: Cluster, told: None, new_training: Callable[..., Run]
) -> None:
    run = new_training(LONG)
    pod = run.start()
    assert run.wait(pod) == 0, cluster.log(pod)
    status = run.record()["trainjob"]["status"]["trainerStatus"]
    assert (status["progressPercentage"], status["estimatedRemainingSeconds"]) == (100, 0)
    metrics = {one["name"]: float(one["value"]) for one in status["metrics"]}
    assert metrics["step"] == 40
    assert metrics["samples_per_s"] > 0
