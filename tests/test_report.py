"""The curves of the report: each metric of a training log is in its panel."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from dmd2.io.artifact import Manifest, read_manifest
from dmd2.report import panel_metrics, write_report
from dmd2.training.metrics_log import read_metrics

PINNED = Path(__file__).parent / "pinned"


@pytest.mark.parametrize(
    ("metric", "title"),
    [
        ("checkpoint/fid", "FID to training samples, at the checkpoints"),
        ("student/lr", "Learning rate"),
        ("student/dmd", "Losses of the student"),
        ("student/dmd_grad_l1", "L1 norm of the gradient at the samples, by term"),
        ("student/dmd_gradient", "L1 norm of the gradient at the samples, by term"),
        ("critic/gan", "Losses of the critic (dmd = denoising)"),
        ("critic/grad_norm", "Gradient norm of the weights, before clipping"),
        ("critic/skipped", "Skipped updates"),
        ("samples_per_s", "Samples per second"),
        ("mfu", "Model FLOPs utilization (MFU)"),
        ("peak_memory_gb", "Peak memory, in GB"),
        ("time/data_s", "Time of a mean step by phase, in seconds"),
        ("something/new", "Other metrics"),
    ],
)
def test_a_metric_is_in_its_panel(metric: str, title: str) -> None:
    found = panel_metrics([{"step": 1, metric: 0.5, "eta_s": 3.0}])
    assert {panel.title: names for panel, names in found.items()} == {title: [metric]}


def test_a_log_of_an_earlier_version_has_all_its_curves(tmp_path: Path) -> None:
    shutil.copy(PINNED / "stopped" / "metrics.jsonl", tmp_path)
    found = {panel.title: names for panel, names in panel_metrics(read_metrics(tmp_path)).items()}
    assert {"Losses of the student", "Learning rate", "Samples per second"} - found.keys() == {
        "Learning rate"
    }
    assert "student/dmd" in found["Losses of the student"]
    assert "Other metrics" not in found


def test_a_current_log_has_all_its_curves(made: Path) -> None:
    found = {panel.title: names for panel, names in panel_metrics(read_metrics(made / "run")).items()}
    assert "Other metrics" not in found
    assert {"student/lr", "critic/lr"} <= {*found["Learning rate"]}
    assert "Time of a mean step by phase, in seconds" in found


def test_the_page_shows_what_became_of_the_source(made: Path, tmp_path: Path) -> None:
    kinds = ("shards", "teacher", "run", "evaluation", "gate")
    manifests = {kind: read_manifest(made / kind, kind) for kind in kinds}
    write_report(tmp_path / "report.html", manifests, made / "run", made / "evaluation")
    assert "<h2>Data</h2>" in (page := (tmp_path / "report.html").read_text())
    assert "<li>used: images 60</li>" in page
    manifests["shards"].facts.pop("account")  # shards of version 0.1
    write_report(tmp_path / "report.html", manifests, made / "run", made / "evaluation")
    assert "<h2>Data</h2>" not in (tmp_path / "report.html").read_text()


def test_nothing_of_a_manifest_becomes_a_part_of_the_page(made: Path, tmp_path: Path) -> None:
    folders = {
        "shards": "shards",
        "teacher": "teacher",
        "run": "run",
        "evaluation": "evaluation",
        "gate": "gate",
    }
    manifests = {kind: read_manifest(made / name, kind) for kind, name in folders.items()}
    manifests = {kind: manifest.model_copy(update=poisoned(manifest)) for kind, manifest in manifests.items()}
    write_report(tmp_path / "report.html", manifests, made / "run", made / "evaluation")
    page = (tmp_path / "report.html").read_text()
    assert "<script" not in page
    assert '" onload' not in page
    assert "&lt;script" in page


def poisoned(manifest: Manifest) -> dict[str, Any]:
    """The texts of a manifest that nothing computes with, each with a script."""
    script = '"><script>alert(1)</script><b class="" onload="'

    def poison(value: Any, name: str = "") -> Any:
        if isinstance(value, dict):
            return {key: poison(each, key) for key, each in value.items()}
        if isinstance(value, list):
            return [poison(each, name) for each in value]
        computed = {"name", "format", "better", "file", "split"}
        return value + script if isinstance(value, str) and name not in computed else value

    return {
        "facts": poison(manifest.facts),
        "versions": {name + script: script for name in manifest.versions},
    }
