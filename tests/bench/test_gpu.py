"""The measurements for a GPU run at tiny size on a CPU, so that a change that breaks them is found without one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from dmd2.denoiser import tf32
from tests.bench import gpu

QUICK = ("environment", "edm-bfloat16", "sample-1step", "evaluation")


@pytest.mark.slow
def test_every_kind_of_measurement_runs_on_a_cpu_and_writes_its_file(tmp_path: Path) -> None:
    gpu.main(only=("edm-bfloat16",), out=tmp_path, tiny=True, predict="h100-80gb")
    gpu.main(only=(*QUICK, "same-losses", "sdxl-shared-fewer-calls"), out=tmp_path, tiny=True)
    rows = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    assert rows.keys() == {"plan", *QUICK, "same-losses", "sdxl-shared-fewer-calls"}
    assert not {name for name, row in rows.items() if "failed" in row}, rows
    assert rows["same-losses"]["ok"]
    with (
        tf32()
    ):  # as on a GPU between its trainings: torch tells the precision only while it was set in one way
        assert torch.get_float32_matmul_precision() == "high"
    assert rows["edm-bfloat16"]["finite"]
    assert rows["edm-bfloat16"]["plan GB"] > 0
    assert rows["edm-bfloat16"]["card"].startswith("CPU")


@pytest.mark.slow
def test_a_second_start_compiles_nothing_that_the_first_has_kept() -> None:
    """On a CPU the kernels are compiled again: the file has those of Triton only."""
    row = gpu.starts("edm-bfloat16-compile", tiny=True)
    first, second = row["first start"], row["second start"]
    assert (second["graphs found"], second["compiled"]) == (first["compiled"], 0)
    assert second["of the process"] < 0.5 * first["of the process"]
    assert row["file MB"] > 1
