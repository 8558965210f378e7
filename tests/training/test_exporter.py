"""The metrics of a training for Prometheus, asked for over HTTP while it goes on and read by prometheus_client's parser."""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import socket
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from dmd2 import stages
from dmd2.config import Config
from dmd2.errors import Interrupted
from dmd2.stages.progress_page import ProgressPage
from dmd2.training.exporter import PORT, Exporter, metrics_endpoint
from dmd2.training.metrics_log import METRICS
from dmd2.training.spending import Spending

Refusal = Callable[[Callable[[], object]], str]
Values = dict[tuple[str, ...], float]


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        number = int(free.getsockname()[1])
    monkeypatch.setenv(PORT, str(number))
    return number


def scrape(port: int) -> dict[str, Metric]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        assert answer.headers["Content-Type"].startswith("text/plain; version=")
        return {found.name: found for found in text_string_to_metric_families(answer.read().decode())}


def values(metric: Metric) -> Values:
    """{labels without the recipe: value}."""
    assert {one.labels.get("recipe") for one in metric.samples} <= {"edm-digits"}
    return {tuple(v for k, v in one.labels.items() if k != "recipe"): one.value for one in metric.samples}


def test_a_training_is_scraped_while_it_goes_on(
    micro: Config, made: Path, tmp_path: Path, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = list[dict[str, Metric]]()
    monkeypatch.setattr(ProgressPage, "update", lambda self, step, eta_s: seen.append(scrape(port)))
    begun = time.time()
    stages.distill(micro, str(made / "shards"), str(made / "teacher"), str(tmp_path / "run"))
    first, *_, last = ({name: values(one) for name, one in each.items()} for each in seen)
    assert first["dmd2_steps_done"][()] < last["dmd2_steps_done"][()] < last["dmd2_steps"][()] == 10
    assert {("student", "dmd"), ("student", "gan"), ("critic", "dmd"), ("critic", "gan")} == set(
        last["dmd2_loss"]
    )
    assert begun <= last["dmd2_last_progress_timestamp_seconds"][()] <= time.time()
    assert last["dmd2_samples_per_second"][()] > 0
    assert last["dmd2_step_phase_seconds"][("data",)] > 0
    assert last["dmd2_skipped_steps"] == {("critic",): 0, ("student",): 0}
    assert last["dmd2_restarts"][()] == 0
    assert last["dmd2_gpu_hours"][()] == 0, "it is on the CPU"
    assert math.isnan(last["dmd2_gpu_hours_budget"][()])
    with pytest.raises(OSError, match="refused"):
        scrape(port)


def test_a_port_that_is_taken_ends_no_training(
    tmp_path: Path, port: int, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        socket.create_server(("0.0.0.0", port)),
        caplog.at_level(logging.WARNING),
        metrics_endpoint(exporter(tmp_path), is_main=True),
    ):
        assert f"port {port} cannot be opened" in caplog.text


def test_only_the_main_process_listens_and_only_if_it_is_told_to(
    tmp_path: Path, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with metrics_endpoint(exporter(tmp_path), is_main=False), pytest.raises(OSError, match="refused"):
        scrape(port)
    monkeypatch.delenv(PORT)
    with metrics_endpoint(exporter(tmp_path), is_main=True), pytest.raises(OSError, match="refused"):
        scrape(port)


@pytest.mark.parametrize("text", ["http", "0", "65536", "-1", "94 00"])
def test_what_is_no_port_is_refused(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refusal: Refusal
) -> None:
    monkeypatch.setenv(PORT, text)

    def serve() -> None:
        with metrics_endpoint(exporter(tmp_path), is_main=True):
            raise AssertionError

    assert f"{PORT} is {text!r}; give the number of a port" in refusal(serve)


def exporter(folder: Path, **spending: float) -> Exporter:
    return Exporter("edm-digits", folder, 10, Spending(**spending))  # type: ignore[arg-type]


def collected(one: Exporter) -> Iterator[tuple[str, Values]]:
    return ((found.name, values(found)) for found in one.collect())


def test_a_loss_that_is_no_longer_finite_disappears_and_its_skipped_steps_are_counted(tmp_path: Path) -> None:
    lines = [
        {"step": 2, "critic/dmd": 1.0, "critic/skipped": 0, "student/dmd_grad_l1": 3.0, "samples_per_s": 8, "mfu": 0.25},
        {"step": 4, "critic/skipped": 2, "samples_per_s": 8, "peak_memory_gb": 2, "eta_s": 5},
        {"step": 4, "checkpoint/fid": 7.5},
    ]  # fmt: skip
    (tmp_path / METRICS).write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 6, "cri')
    found = dict(collected(exporter(tmp_path)))
    assert found["dmd2_loss"] == {}
    assert found["dmd2_skipped_steps"] == {("critic",): 2, ("student",): 0}
    assert found["dmd2_checkpoint_fid"] == {(): 7.5}
    assert found["dmd2_mfu_ratio"] == {(): 0.25}
    assert found["dmd2_peak_memory_bytes"] == {(): 2e9}


def test_a_training_that_is_started_again_counts_its_restarts(
    micro: Config, made: Path, tmp_path: Path, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(page: ProgressPage, step: int, eta_s: float) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    places = (str(made / "shards"), str(made / "teacher"), str(tmp_path / "run"))
    monkeypatch.setattr(ProgressPage, "update", stop)
    with pytest.raises(Interrupted):
        stages.distill(micro, *places)
    seen = list[Values]()
    monkeypatch.setattr(ProgressPage, "update", lambda *_: seen.append(values(scrape(port)["dmd2_restarts"])))
    stages.distill(micro, *places)
    assert seen[0] == {(): 1}
    assert not list((tmp_path / "run").glob(".*"))
