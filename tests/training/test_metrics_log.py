"""What a line of the metrics log says of the steps since the line before."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from dmd2.training.metrics_log import MetricsLog, Throughput, read_metrics
from tests.conftest import ALONE

PINNED = Path(__file__).parents[1] / "pinned"


@pytest.fixture
def log(tmp_path: Path) -> MetricsLog:
    throughput = Throughput(batch=8, flops_per_step=1e9, peak_flops_per_s=1e15)
    return MetricsLog(tmp_path, first_step=0, throughput=throughput, world=ALONE)


def test_a_line_has_means_of_finite_losses_the_last_learning_rate_and_the_number_of_skips(
    log: MetricsLog,
) -> None:
    losses, rates, skips = (1.0, math.nan, 3.0), (0.1, 0.2, 0.3), (0.0, 1.0, 0.0)
    for step, (loss, lr, skipped) in enumerate(zip(losses, rates, skips, strict=True)):
        values = {"critic/dmd": loss, "critic/lr": lr, "critic/skipped": skipped}
        log.append(step, {name: torch.tensor(value) for name, value in values.items()})
    note = log.flush({"critic": 1.5}, eta_s=60)
    (line,) = read_metrics(log.folder)
    expected = {
        "step": 3,
        "critic/dmd": 2,
        "critic/lr": 0.3,
        "critic/skipped": 1,
        "time/critic_s": 0.5,
        "eta_s": 60,
    }
    assert {name: line[name] for name in expected} == pytest.approx(expected)
    assert line["mfu"] == pytest.approx(line["samples_per_s"] / 8 * 1e9 / 1e15, rel=1e-4)
    assert 0 < line["peak_memory_gb"] < 1000
    assert note.startswith("critic/dmd 2 ")
    assert "MFU" in note
    assert "lr" not in note


def test_nothing_is_written_if_no_step_was_made(log: MetricsLog) -> None:
    assert log.flush({}, eta_s=0) == ""
    assert read_metrics(log.folder) == []


def test_logs_of_an_earlier_version_are_read_under_todays_names() -> None:
    lines = read_metrics(PINNED / "stopped")
    assert lines
    assert all({"samples_per_s", "time/data_s", "critic/dmd"} <= line.keys() for line in lines)
    assert not any({"images_per_s", "loader/wait_s", "student/dmd_gradient"} & line.keys() for line in lines)
    assert any("student/dmd_grad_l1" in line for line in lines)
