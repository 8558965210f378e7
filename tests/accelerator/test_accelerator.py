"""The library on a device that is not the CPU: processes of the command line on a simulated accelerator, which is built once."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.accelerator.device import build
from tests.conftest import MICRO, flags

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (shutil.which("g++") and shutil.which("ninja")), reason="needs g++ and ninja"),
]
TRAININGS = ("edm-bfloat16", "sdxl-shared", "sdxl-whole")
MIXED = """
import torch
from tests.accelerator.device import count_waits
there = torch.ones(4, device="simulated")
with count_waits() as waits:
    print(there.sum().item(), dict(waits))
    print(there + torch.ones(4))
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Start a process on the accelerator."""
    folder = tmp_path_factory.mktemp("accelerator")
    build(folder)
    environment = os.environ | {"PYTHONPATH": f"{folder}{os.pathsep}.", "OMP_NUM_THREADS": "1"}
    return partial(subprocess.run, env=environment, text=True, capture_output=True, check=False, timeout=500)


@pytest.fixture(scope="module")
def seen(run: Any) -> dict[str, Any]:
    ended = run([sys.executable, "-m", "tests.accelerator.steps", *TRAININGS])
    assert not ended.returncode, ended.stderr[-3000:]
    found: dict[str, Any] = json.loads(ended.stdout)
    return found


def test_an_operator_on_tensors_of_both_devices_fails_and_a_read_of_the_host_is_counted(run: Any) -> None:
    ended = run([sys.executable, "-c", MIXED])
    assert ended.stdout.startswith("4.0 {'aten::_local_scalar_dense")
    assert "Expected all tensors to be on the same device" in ended.stderr


@pytest.mark.parametrize("name", TRAININGS)
def test_a_step_never_waits_for_the_device_and_takes_the_memory_of_the_plan(
    seen: dict[str, Any], name: str
) -> None:
    assert seen[name]["finite"]
    assert not seen[name]["waits"]
    assert seen[name]["GB"] == pytest.approx(seen[name]["plan GB"], rel=0.05)


def test_the_first_losses_are_those_of_the_cpu(seen: dict[str, Any]) -> None:
    assert seen["same-losses"]["off"]["float32"] < 1e-5
    assert seen["same-losses"]["ok"]


def test_a_student_is_distilled_on_one_and_two_devices_evaluated_packaged_and_drawn_with(
    run: Any, tmp_path: Path
) -> None:
    def dmd2(*words: object, processes: int = 1) -> None:
        launched = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "--", "dmd2")
        start = launched if processes == 2 else ("-m", "dmd2")
        ended = run([sys.executable, *start, *map(str, words)])
        assert not ended.returncode, ended.stderr[-3000:]

    names = "shards", "teacher", "run", "two", "evaluation", "gate", "package"
    shards, teacher, student, two, evaluation, gate, package = (tmp_path / name for name in names)
    settings = [
        *flags((*MICRO, "family.network.classes=10", "distill.dtype=bfloat16", "gate.factor=1e9")),
        "--gate.teacher",
        "fid<=1e9",
    ]
    dmd2("shard", "edm-digits", *settings, "--source", "digits", "--out", shards)
    dmd2("teach", "edm-digits", *settings, "--data", shards, "--out", teacher)
    given = "--data", shards, "--teacher", teacher
    dmd2("distill", "edm-digits", *settings, *given, "--out", two, processes=2)
    dmd2("distill", "edm-digits", *settings, *given, "--out", student)
    dmd2("evaluate", "edm-digits", *settings, *given, "--run", student, "--out", evaluation)
    dmd2("gate", "edm-digits", *settings, "--evaluation", evaluation, "--out", gate)
    dmd2("package", "--run", student, "--evaluation", evaluation, "--gate", gate, "--out", package)
    dmd2("verify", "--package", package)
    dmd2("sample", "--package", package, "--out", tmp_path / "drawn.png")
    with Image.open(tmp_path / "drawn.png") as drawn:
        assert len(set(drawn.convert("L").tobytes())) > 1
