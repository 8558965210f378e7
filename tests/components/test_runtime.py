"""Where a training runs follows from the TrainingRuntime of the cluster, here that of the manifests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from components.distill import kube as kubernetes
from components.distill import launch
from components.distill.kube import Kube
from components.distill.launch import JobSize, choose
from components.distill.trainjob import Runtime
from components.run_folder import run_folder
from manifests.__main__ import render
from tests.components.conftest import Answers

PATH = "/apis/trainer.kubeflow.org/v1alpha1/namespaces/dmd2/trainingruntimes/dmd2-torch"
WITHOUT_ROOT = run_folder("", "run-1", "gs://my-bucket/kfp/dmd2-distill/run-1/prepare-run/settings")


@pytest.fixture
def installed(kube: Kube, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], None]:
    """Be in a pod of a cluster with an overlay."""
    token = tmp_path / "token"
    token.touch()
    monkeypatch.setattr(launch, "IN_A_POD", token)
    monkeypatch.setattr(kubernetes, "connect", lambda: kube)

    def install(overlay: str) -> None:
        objects: list[dict[str, Any]] = list(yaml.safe_load_all(render(overlay)))
        (runtime,) = [one for one in objects if one["kind"] == "TrainingRuntime"]
        monkeypatch.setattr(Answers, "given", {PATH: (200, runtime)})

    return install


@pytest.mark.parametrize("nodes", [1, 2])
def test_a_trainjob_without_a_root_is_refused_where_its_pods_may_not_write_to_the_artifacts_of_kfp(
    nodes: int, installed: Callable[[str], None], refusal: Callable[..., str]
) -> None:
    installed("gke-a3-high")
    size = JobSize(nodes, gpus=8)
    said = refusal(lambda: choose(size, WITHOUT_ROOT))
    assert (
        f"the folder of the run is {WITHOUT_ROOT}, and the pods of a TrainJob may write below gs://my-bucket/runs only"
        in said
    )
    assert said.endswith("give as root a folder there, as gs://my-bucket/runs/first")
    assert choose(size, "gs://my-bucket/runs/first") == "trainjob"
    assert choose(JobSize(1, gpus=4), WITHOUT_ROOT) == "here", "no TrainJob has nodes of four GPUs"


def test_where_the_runtime_names_no_folder_a_trainjob_needs_no_root(installed: Callable[[str], None]) -> None:
    installed("dev")
    assert choose(JobSize(2), WITHOUT_ROOT) == "trainjob"


def test_a_folder_whose_name_begins_the_same_is_another(refusal: Callable[..., str]) -> None:
    runtime = Runtime(8, "gs://b/runs/")
    runtime.check_folder("gs://b/runs")
    assert "is gs://b/runs-old/a, and" in refusal(lambda: runtime.check_folder("gs://b/runs-old/a"))


def test_without_the_right_to_read_the_runtime_the_training_runs_in_its_own_pod(
    installed: Callable[[str], None], monkeypatch: pytest.MonkeyPatch, refusal: Callable[..., str]
) -> None:
    installed("dev")
    said = {
        "kind": "Status",
        "reason": "Forbidden",
        "message": "steps cannot get trainingruntimes",
        "code": 403,
    }
    monkeypatch.setattr(Answers, "given", {PATH: (403, said)})
    assert choose(JobSize(1), WITHOUT_ROOT) == "here"
    assert "takes a TrainJob, and steps cannot get trainingruntimes" in refusal(
        lambda: choose(JobSize(2), WITHOUT_ROOT)
    )
