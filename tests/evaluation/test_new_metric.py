"""A metric that the package does not know goes through evaluation, gate, package, report and the components."""

from __future__ import annotations

import html
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import pytest
import torch
from kfp import dsl
from torch import Tensor

from components.evaluate.component import evaluate as evaluate_component
from components.finish_run.outcome import write_outcome
from dmd2 import recipes, stages
from dmd2.evaluation.metrics import METRICS, ImageBatch, Metric, Score
from dmd2.io.artifact import read_manifest
from pipelines.local_run import show, summarize
from tests.conftest import MICRO

NEIGHBOURS = 3


class PrecisionState:
    """Improved precision (Kynkaanniemi et al. 2019, eq. 2): the share of images whose features lie in the reference manifold, the
    union of balls around the reference features that reach to their third nearest neighbour."""

    def __init__(self) -> None:
        self.features: list[Tensor] = []

    def update(self, batch: ImageBatch) -> None:
        self.features.append(batch.features)

    def score(self, reference: Self) -> Score:
        fake, real = torch.cat(self.features), torch.cat(reference.features)
        radius = torch.cdist(real, real).kthvalue(NEIGHBOURS + 1).values
        inside = (torch.cdist(fake, real) <= radius).any(dim=1).double()
        error = (inside.var(unbiased=False) / len(inside)).sqrt().item()
        share = inside.mean().item()
        return Score(share, (max(0.0, share - 2 * error), min(1.0, share + 2 * error)))


PRECISION = Metric("own_precision", "Improved precision", "larger", PrecisionState, format="{:.1%}")
SETTINGS = ("evaluate.metrics=fid,own_precision", "gate.metric=own_precision", "gate.factor=1e6")


@pytest.fixture(scope="module")
def logged() -> dsl.Metrics:
    """What the component of the evaluation logs for the UI."""
    return dsl.Metrics()


@pytest.fixture(scope="module")
def root(made: Path, logged: dsl.Metrics, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders of a run that was scored by FID and precision, and gated by precision."""
    root = tmp_path_factory.mktemp("metric")
    for name in ("shards", "teacher", "run"):
        (root / name).symlink_to(made / name)
    inputs = {name: dsl.Artifact(metadata={"uri": str(root / name)}) for name in ("shards", "teacher", "run")}
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(METRICS, PRECISION.name, PRECISION)
        evaluate_component.python_func(
            recipe="edm-digits",
            overrides=" ".join((*MICRO, *SETTINGS, f"evaluate.baselines=twin={made / 'run'}")),
            root=str(root),
            part="",
            scores="",
            **inputs,
            evaluation=dsl.Artifact(uri=str(root / "pointer")),
            metrics=logged,
        )
    # From here on the table does not have the metric: what follows reads the manifest.
    config = recipes.resolve("edm-digits", (*MICRO, *SETTINGS))
    stages.gate(config, str(root / "evaluation"), str(root / "gate"))
    stages.package(*(str(root / name) for name in ("run", "evaluation", "gate", "package")))
    folders = {name: str(root / name) for name in ("teacher", "run", "evaluation", "gate", "package")}
    stages.report(data=str(root / "shards"), **folders, out=str(root / "report.html"))
    return root


@pytest.fixture(scope="module")
def facts(root: Path) -> dict[str, Any]:
    return read_manifest(root / "evaluation", "evaluation").facts


def score_text(facts: dict[str, Any], name: str = "student") -> str:
    """The score as people read it."""
    value, low, high = (facts["scores"][name]["own_precision"][key] for key in ("value", "low", "high"))
    return f"{value:.1%} ({low:.1%} to {high:.1%})"


def test_the_evaluation_scores_every_set_by_every_metric(facts: dict[str, Any]) -> None:
    assert list(facts["metrics"]) == list(facts["scores"]["student"]) == ["fid", "own_precision"]
    assert facts["scores"]["real"]["fid"]["low"] is None or facts["scores"]["real"]["fid"]["low"] >= 0
    for name in ("student", "teacher", "teacher_1step", "real"):
        assert facts[f"fid_{name}"] > 0
        assert 0 <= facts[f"own_precision_{name}"] <= 1
    assert facts["own_precision_real"] > 0.5, "training images are like held-out images"


def test_the_digest_of_an_evaluation_covers_its_scores(root: Path, made: Path) -> None:
    """Pictures are the same whatever is computed of them; a gate must not take one evaluation for the other."""
    one, other = (read_manifest(folder / "evaluation", "evaluation") for folder in (root, made))
    pictures = [
        {file.path: file.sha256 for file in made.files if file.path.endswith("png")} for made in (one, other)
    ]
    assert pictures[0].items() > pictures[1].items()
    assert one.digest != other.digest


def test_a_baseline_is_one_more_row_of_every_table(
    root: Path, facts: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "240")
    assert facts["scores"]["twin"] == facts["scores"]["student"]
    summary = summarize(root, 1.0)
    assert summary["fid_twin"] == summary["fid_student"]
    show(summary)
    for text in (capsys.readouterr().out, (root / "package" / "README.md").read_text()):
        assert "twin in 1 step" in text
    assert "Twin in 1 step, 1 network call" in html.unescape((root / "report.html").read_text())


def test_the_gate_compares_the_metric_in_its_direction(root: Path, facts: dict[str, Any]) -> None:
    gate = read_manifest(root / "gate", "gate").facts
    assert gate["decision"] == "accepted"
    assert gate["reason"].startswith(
        f"Improved precision of the student {score_text(facts)} is at least 1e-06 x the teacher's {score_text(facts, 'teacher')} = "
    )


def test_report_and_model_card_show_value_title_and_direction(root: Path, facts: dict[str, Any]) -> None:
    page = html.unescape((root / "report.html").read_text())
    card = (root / "package" / "README.md").read_text()
    for text in (page, card):
        for wanted in ("Improved precision (larger is better)", "FID (smaller is better)"):
            assert wanted in text
        for name in ("student", "teacher", "teacher_1step", "real"):
            assert score_text(facts, name) in text
    assert (
        read_manifest(root / "package", "package").facts["own_precision_student"]
        == facts["own_precision_student"]
    )


def test_the_component_logs_value_title_and_direction(logged: dsl.Metrics, facts: dict[str, Any]) -> None:
    assert logged.metadata["own_precision_student"] == facts["own_precision_student"]
    assert logged.metadata["own_precision"] == "Improved precision (larger is better)"
    assert logged.metadata["fid_student"] == facts["fid_student"]


def test_summary_and_terminal_show_value_title_and_direction(
    root: Path, facts: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "240")
    summary = json.loads(json.dumps(summarize(root, 1.0)))
    assert summary["own_precision_student"] == facts["own_precision_student"]
    assert summary["scores"] == json.loads(json.dumps(facts["scores"]))
    show(summary)
    printed = capsys.readouterr().out
    assert "Improved precision (larger is better)" in printed
    assert score_text(facts, "teacher_1step") in printed


def test_the_outcome_of_a_run_has_the_scores(root: Path, facts: dict[str, Any]) -> None:
    page = write_outcome(str(root), "a", "SUCCEEDED", "")
    assert f"| student | 1 | 1 | {facts['fid_student']:.2f} " in page
    assert score_text(facts) in page
    assert json.loads((root / "outcome.json").read_text())["scores"] == facts["scores"]


def test_an_unknown_metric_is_refused_before_anything_is_read(
    tmp_path: Path, refusal: Callable[..., str]
) -> None:
    config = recipes.resolve("edm-digits", (*MICRO, "evaluate.metrics=fid,precison"))
    missing = [str(tmp_path / name) for name in ("shards", "teacher", "run", "evaluation")]
    assert "'precison'" in refusal(lambda: stages.evaluate(config, *missing))


def test_a_gate_needs_a_metric_that_was_computed(
    made: Path, root: Path, tmp_path: Path, refusal: Callable[..., str]
) -> None:
    assert "add it to them" in refusal(
        lambda: recipes.resolve("edm-digits", (*MICRO, "gate.metric=own_precision"))
    )
    config = recipes.resolve("edm-digits", (*MICRO, *SETTINGS))
    sentence = refusal(lambda: stages.gate(config, str(made / "evaluation"), str(tmp_path / "gate")))
    assert "has no 'own_precision', only fid" in sentence
