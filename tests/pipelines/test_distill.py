"""The pipeline itself, through KFP's own local runner, one real process per stage; and its compiled form."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from kfp import compiler

from dmd2 import checkpoint
from dmd2.run import read_metrics
from pipelines.__main__ import COMPILED, run_local
from pipelines.distill import distill
from tests.conftest import MICRO
from tests.tiny_sdxl import SMALL


@pytest.fixture
def run(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Run the pipeline on the micro recipe -> its root."""

    def call(*overrides: str, **parameters: str) -> Path:
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        root = tmp_path / "root"
        text = " ".join([*MICRO, *overrides])
        run_local(root, **({"source": str(pictures), "overrides": text} | parameters))
        return root

    return call


def tasks(root: Path) -> set[str]:
    """Tasks that ran: the local runner makes a folder for each."""
    (latest,) = (root / "kfp").iterdir()
    return {path.name for path in latest.iterdir() if path.is_dir()}


def test_an_accepted_run_ends_with_a_package_a_report_and_a_summary(
    run: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    root = run("gate.factor=1e9")
    summary = json.loads((root / "summary.json").read_text())
    assert summary["gate"] == "accepted"
    assert Path(summary["package"]) == root / "package"
    assert "Accepted" in (root / "report.html").read_text()
    assert (summary["nfe_student"], summary["nfe_teacher"], summary["images"]) == (1, 5, 24)
    assert {"shard", "teach", "distill", "evaluate", "gate", "package", "total", "wall"} == summary[
        "seconds"
    ].keys()
    assert all(summary[name] > 0 for name in ("fid_student", "fid_teacher", "fid_teacher_1step"))
    ran = tasks(root)
    assert "package-model" in ran
    assert "report" in ran
    assert "report-2" not in ran
    shown = capsys.readouterr().out
    assert "accepted" in shown
    assert str(root / "package") in shown.replace("\n", "")


def test_a_rejected_run_ends_cleanly_with_its_reason_and_no_package(run: Callable[..., Path]) -> None:
    root = run("gate.factor=1e-9")
    summary = json.loads((root / "summary.json").read_text())
    assert (summary["gate"], summary["package"]) == ("rejected", None)
    assert "Rejected" in (root / "report.html").read_text()
    assert "is more than 1e-09 x" in summary["reason"]
    assert not (root / "package").exists()
    ran = tasks(root)
    assert "package-model" not in ran
    assert "report-2" in ran
    assert "report" not in ran


def test_text_to_image_runs_from_a_diffusers_folder_to_a_package_through_latents(
    run: Callable[..., Path], pipeline: Path, squares: Path
) -> None:
    root = run(
        source=str(squares), teacher=str(pipeline), recipe="sdxl-4step-emoji", overrides=" ".join(SMALL)
    )
    summary = json.loads((root / "summary.json").read_text())
    assert summary["gate"] == "accepted"
    assert {"shard", "teach", "encode", "distill", "evaluate", "gate", "package"} < summary["seconds"].keys()
    assert [(v["recipe"], v["steps"]) for v in summary["variants"]] == [
        ("sdxl-4step-emoji", 4), ("teacher", 2), ("teacher", 1), ("sdxl-4step-emoji", 1), ("teacher", 4)
    ]  # fmt: skip
    assert (root / "package" / "model_index.json").is_file()
    assert "encode-latents" in tasks(root)


def test_a_teacher_that_is_given_is_used(run: Callable[..., Path], made: Path) -> None:
    root = run("gate.factor=1e9", teacher=str(made / "teacher"))
    assert not (root / "teacher").exists()
    assert json.loads((root / "summary.json").read_text())["gate"] == "accepted"


def test_a_failing_stage_fails_the_run_with_its_sentence(
    run: Callable[..., Path], refusal: Callable[..., str], capfd: pytest.CaptureFixture[str]
) -> None:
    assert "shard-dataset" in refusal(lambda: run(source="/nowhere/at/all"))
    told = capfd.readouterr()
    assert "/nowhere/at/all does not exist" in told.out + told.err


def test_the_committed_pipeline_is_the_current_one(tmp_path: Path) -> None:
    assert "DMD2_IMAGE" not in os.environ
    compiler.Compiler().compile(distill, str(tmp_path / "distill.yaml"))
    assert (tmp_path / "distill.yaml").read_text() == (COMPILED / "distill.yaml").read_text(), (
        "run make compile"
    )


@pytest.fixture(scope="module")
def compiled() -> dict[str, Any]:
    return next(yaml.safe_load_all((COMPILED / "distill.yaml").read_text()))


def test_artifacts_are_typed_so_that_the_ui_shows_them(compiled: dict[str, Any]) -> None:
    outputs = {
        name: {
            o: a["artifactType"]["schemaTitle"]
            for o, a in c.get("outputDefinitions", {}).get("artifacts", {}).items()
        }
        for name, c in compiled["components"].items()
    }
    assert outputs["comp-shard-dataset"] == {"shards": "system.Dataset"}
    assert outputs["comp-resolve-teacher"] == {"resolved": "system.Model"}
    assert outputs["comp-encode-latents"] == {"samples": "system.Dataset"}
    assert outputs["comp-distill"] == {"run": "system.Model"}
    assert outputs["comp-evaluate"]["metrics"] == "system.Metrics"
    assert outputs["comp-package-model"] == {"package": "system.Model"}
    assert outputs["comp-report"] == {"page": "system.HTML"}


def test_every_parameter_but_the_root_has_a_default_and_all_are_described(compiled: dict[str, Any]) -> None:
    parameters = compiled["root"]["inputDefinitions"]["parameters"]
    assert {name for name, p in parameters.items() if "defaultValue" not in p} == {"root"}
    assert all(p["description"] for p in parameters.values())


def test_nothing_is_cached_and_nothing_is_installed_at_run_time(compiled: dict[str, Any]) -> None:
    dags = [compiled["root"]["dag"], *(c["dag"] for c in compiled["components"].values() if "dag" in c)]
    tasks = {
        name: task
        for dag in dags
        for name, task in dag["tasks"].items()
        if "dag" not in compiled["components"][task["componentRef"]["name"]]
    }
    assert len(tasks) == 9
    assert not any(task["cachingOptions"].get("enableCache") for task in tasks.values())
    for executor in compiled["deploymentSpec"]["executors"].values():
        assert "pip install" not in " ".join(executor["container"]["command"])


def test_ctrl_c_stops_the_whole_run_and_the_same_command_resumes_it(pictures: Path, tmp_path: Path) -> None:
    """As a terminal does it: SIGINT to every process of the group, at some step of the distillation."""
    root = tmp_path / "root"
    overrides = " ".join((*MICRO, "gate.factor=1e9", "distill.steps=600", "distill.save_every=600"))
    command = [sys.executable, "-m", "pipelines", "run-local", "--root", str(root), "--source", str(pictures)]
    command += ["--overrides", overrides]
    process = subprocess.Popen(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip
    unfinished = root / ".run.partial"
    while process.poll() is None and not (unfinished / "metrics.jsonl").exists():
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    told, _ = process.communicate(timeout=120)
    assert process.returncode == 130, told
    assert "Traceback" not in told
    while not (saved := checkpoint.steps(unfinished / "checkpoints")):
        time.sleep(0.05)
    assert 0 < saved[0] < 600
    run_local(root, source=str(pictures), overrides=overrides)
    assert json.loads((root / "summary.json").read_text())["gate"] == "accepted"
    steps = [int(line["step"]) for line in read_metrics(root / "run")]
    assert saved[0] in steps, "the line of the interruption"
    assert steps == sorted(set(steps))
    assert steps[-1] == 600
