"""The curves of the report: each metric of a training log is in its panel."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from dmd2.report import panel_metrics
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
