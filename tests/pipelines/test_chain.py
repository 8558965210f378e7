"""What a recipe needs before its own training: decided from the parameters alone, and run by KFP's local runner."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from components.prepare_run.parameters import STEP_REQUESTS, RunParameters, chain_outputs, check_parameters
from components.prepare_run.parameters import summary as steps
from dmd2.io import artifact
from dmd2.stages.networks import starting_weights
from pipelines.local_run import run_local
from tests.conftest import MICRO
from tests.pipelines.test_distill import STAGES, be_warm, outcome, tasks
from tests.tiny_sdxl import SMALL

SHARED: dict[str, Any] = {
    "source": "gs://b/images",
    "teacher": "gs://b/teacher",
    "prompts": "gs://b/prompts.txt",
}


def chosen(recipe: str, **parameters: Any) -> dict[str, Any]:
    """What the wiring is told, without what is empty."""
    outputs = chain_outputs(RunParameters(recipe=recipe, **SHARED | parameters), "gs://b/root")
    names = ("pairs_recipe", "pairs", "first_recipe", "first_overrides", "start")
    return {name: outputs[name] for name in names if outputs[name]}


def test_a_recipe_without_a_stage_before_it_is_run_alone() -> None:
    assert chosen("sdxl-4step") == {}
    assert chosen("sd15-1step") == {}


def test_the_stage_before_and_its_pairs_are_run_if_they_are_not_given() -> None:
    assert chosen("sd15-1step-gan") == {"first_recipe": "sd15-1step", "start": "gs://b/root/first"}
    warmup = {"pairs_recipe": "sdxl-1step-warmup", "pairs": "gs://b/root/pairs"}
    assert chosen("sdxl-1step-warmup") == warmup
    assert chosen("sdxl-1step") == warmup | {
        "first_recipe": "sdxl-1step-warmup",
        "start": "gs://b/root/first",
    }
    given = RunParameters(recipe="sdxl-1step", **SHARED)
    assert list(steps(given)) == [
        "pairs of sdxl-1step-warmup", "distillation of sdxl-1step-warmup", "distillation of sdxl-1step"
    ]  # fmt: skip


def test_what_is_given_is_not_made() -> None:
    assert chosen("sdxl-1step", start="gs://b/warm") == {"start": "gs://b/warm"}
    pairs = chosen("sdxl-1step", pairs="gs://b/pairs")
    assert pairs == {
        "pairs": "gs://b/pairs",
        "first_recipe": "sdxl-1step-warmup",
        "start": "gs://b/root/first",
    }
    assert chosen("sd15-1step-gan", overrides="distill.first_stage=teacher") == {}


def test_the_stage_before_has_the_overrides_that_are_not_about_the_distillation() -> None:
    given = RunParameters(
        recipe="edm-digits-longer", overrides="seed=3 distill.steps=7", first_overrides="distill.steps=5"
    )
    assert given.first
    assert (given.first.config.seed, given.first.config.distill.steps) == (3, 5)
    assert (given.last.config.seed, given.last.config.distill.steps) == (3, 7)
    assert given.first.config.distill.gan is None


def test_the_recipe_decides_the_number_of_gpus() -> None:
    assert chain_outputs(RunParameters(pool={"a": "b"}), "r")["gpus"] == 0
    assert chain_outputs(RunParameters(pool={"a": "b"}), "r")["pool"] == {}, "no node with GPUs is waited for"
    assert chain_outputs(RunParameters(recipe="sdxl-1step", **SHARED), "r")["gpus"] == 8
    twelve = RunParameters(recipe="sdxl-4step", overrides="distill.batch=12", **SHARED)
    assert chain_outputs(twelve, "r")["gpus"] == 4, "a divisor of the batch"
    assert chain_outputs(RunParameters(gpus=2), "r")["gpus"] == 2


def test_a_step_that_follows_a_trainjob_asks_for_less_than_one_that_trains() -> None:
    steps = [chain_outputs(RunParameters(), "r", where) for where in STEP_REQUESTS]
    assert [(step["step_cpu"], step["step_memory"]) for step in steps] == [("8", "32Gi"), ("500m", "2Gi")]


STILL = ("distill.student.lr=1e-12", "distill.critic.lr=1e-12")
"""Learning rates with which the second stage ends where it began, to rounding."""


def test_shared_stages_have_the_parts_that_are_asked_for(
    refusal: Callable[[Callable[[], object]], str],
) -> None:
    def parts_of(recipe: str, parts: int) -> list[list[str]]:
        outputs = chain_outputs(RunParameters(recipe=recipe, **SHARED | {"parts": parts}), "gs://b/root")
        return [outputs["parts"], outputs["encode_parts"]]

    assert parts_of("sdxl-4step", 1) == [[], []], "no pod more than without parts"
    assert parts_of("sdxl-4step", 3) == [["0/3", "1/3", "2/3"]] * 2
    assert parts_of("edm-imagenet64", 2) == [["0/2", "1/2"], []], "nothing is encoded"
    for parts in (0, -1, 10**6):
        given = RunParameters(recipe="sdxl-4step", **SHARED | {"parts": parts})
        assert "give 1 to 256 pods" in refusal(lambda given=given: check_parameters(given, False))  # type: ignore[misc]


def stages_in_order(root: Path) -> list[str]:
    """The steps that made something, in the order in which they ended."""
    made = {
        name: (root / name / artifact.MANIFEST).stat().st_mtime_ns
        for name in ("shards", "teacher", "latents", "pairs", "first", "run", "evaluation", "gate")
        if (root / name).is_dir()
    }
    return sorted(made, key=lambda name: made[name])


def assert_carried_over(root: Path, critic: bool = True) -> None:
    """The second stage, which learned nothing, has student and critic of the first."""
    first, run = (starting_weights(str(root / name), weights=True) for name in ("first", "run"))
    assert first
    assert run
    for name, weight in first.student.items():
        assert torch.allclose(run.student[name], weight, atol=1e-6), name
    assert (first.critic is not None) == critic
    for name, weight in (first.critic or {}).items():
        assert torch.allclose(run.critic[name], weight, atol=1e-6), name  # type: ignore[index]
    digest = artifact.read_manifest(root / "first", "run").digest
    assert artifact.read_manifest(root / "run", "run").inputs["start"] == digest


@pytest.fixture
def rejected(pictures: Path, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The root of a run in two stages, whose student is rejected."""
    be_warm(monkeypatch)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    short = [change for change in MICRO if change.startswith("distill.")]
    parameters = {
        "source": str(pictures), "teacher": str(made / "teacher"), "recipe": "edm-digits-longer",
        "overrides": " ".join([*MICRO, *STILL, "gate.factor=1e9"]), "first_overrides": " ".join(short), "gate": 1e-9,
        "destination": str(tmp_path / "models"),
    }  # fmt: skip
    run_local(parameters, tmp_path / "root")
    return tmp_path / "root"


def test_digits_longer_runs_its_first_stage_continues_its_student_and_critic_and_is_rejected(
    rejected: Path,
) -> None:
    root = rejected
    assert stages_in_order(root) == ["shards", "first", "run", "evaluation", "gate"]
    assert not (root / "teacher").exists(), "the one that was given is used"
    assert_carried_over(root)
    first = artifact.read_manifest(root / "first", "run").config
    assert first
    assert (first.recipe, first.distill.gan) == ("edm-digits-no-gan", None)
    page = (root / "report.html").read_text()
    assert "<h2>First stage</h2><p>edm-digits-no-gan, 10 steps.</p>" in page
    assert page.index("First stage") < page.index("<h2>Training</h2><p>edm-digits-longer, 10 steps.</p>")
    assert "Rejected" in page
    summary = json.loads((root / "summary.json").read_text())
    assert {"first stage", "distill"} < summary["seconds"].keys()
    assert (summary["gate"], summary["package"]) == ("rejected", None)
    assert "is more than 1e-09 x" in summary["reason"]
    assert not (root / "package").exists()
    assert not (root.parent / "models").exists()
    assert tasks(root) == STAGES | {"report-2"}
    assert (outcome(root)["state"], outcome(root)["decision"]) == ("SUCCEEDED", "rejected")
    assert outcome(root)["folders"].keys() == {"shards", "first", "run", "evaluation", "gate"}


TEXT = (
    *SMALL, "evaluate.features=efficientnet", "evaluate.teacher_guidance=2", "distill.dtype=float32", "distill.guidance=2",
)  # fmt: skip
"""Overrides with which the published recipes of text-to-image take seconds."""


def run_texts(root: Path, recipe: str, teacher: Path, source: Path, *first: str) -> None:
    """The pipeline on captioned pictures, with a file of prompts; the second stage learns nothing."""
    prompts = root.parent / "prompts.txt"
    prompts.write_text("a red square\na green square\na blue square\n")
    short = [change for change in TEXT if change.startswith("distill.")]
    parameters = {
        "source": str(source), "teacher": str(teacher), "recipe": recipe, "prompts": str(prompts),
        "overrides": " ".join([*TEXT, *STILL]), "first_overrides": " ".join([*short, *first]),
    }  # fmt: skip
    run_local(parameters, root)


@pytest.mark.slow
def test_sd15_with_the_gan_runs_the_stage_without_it_before(
    stable15: Path, squares: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    be_warm(monkeypatch)
    run_texts(tmp_path / "root", "sd15-1step-gan", stable15, squares)
    assert stages_in_order(tmp_path / "root") == [
        "shards", "teacher", "latents", "first", "run", "evaluation", "gate"
    ]  # fmt: skip
    assert_carried_over(tmp_path / "root")
    manifest = artifact.read_manifest(tmp_path / "root" / "first", "run")
    assert manifest.config
    assert manifest.config.recipe == "sd15-1step"
    assert "prompts" in manifest.inputs


@pytest.mark.slow
def test_sdxl_in_one_step_runs_pairs_and_warm_up_before_and_the_same_root_continues(
    pipeline: Path, squares: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    be_warm(monkeypatch)
    root = tmp_path / "root"
    run_texts(
        root, "sdxl-1step", pipeline, squares, "distill.regression.metric=mse", "distill.regression.decoder="
    )
    order = ["shards", "teacher", "latents", "pairs", "first", "run", "evaluation", "gate"]
    assert stages_in_order(root) == order
    assert_carried_over(root, critic=False)  # a warm-up has none
    first, pairs = (
        artifact.read_manifest(root / "first", "run"),
        artifact.read_manifest(root / "pairs", "pairs"),
    )
    assert first.inputs["pairs"] == pairs.digest
    assert "prompts" in pairs.inputs
    page = (root / "report.html").read_text()
    assert "First stage" in page
    assert "<td>pairs</td>" in page
    for name in {"run", "evaluation", "gate", "package"} & {path.name for path in root.iterdir()}:
        shutil.rmtree(root / name)
    made = {name: (root / name / artifact.MANIFEST).stat().st_mtime_ns for name in order[:5]}
    run_texts(
        root, "sdxl-1step", pipeline, squares, "distill.regression.metric=mse", "distill.regression.decoder="
    )
    assert stages_in_order(root) == order
    assert made == {name: (root / name / artifact.MANIFEST).stat().st_mtime_ns for name in order[:5]}
