"""What only a GPU shows: the same losses, no wait of the host in a step, and the memory that the plan predicts."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from dmd2.plan.hardware import BY_DEVICE_NAME
from tests.bench import gpu

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU; there is none here")
DEVICE = torch.device("cuda")


def test_first_losses_are_those_of_the_cpu() -> None:
    found = gpu.same_losses(DEVICE)
    assert found["ok"], found["off"]


@pytest.mark.parametrize("name", ["edm-float32", "edm-bfloat16", "sdxl-shared"])
def test_a_step_is_finite_never_waits_for_the_device_and_takes_the_memory_of_the_plan(name: str) -> None:
    case, card = gpu.TRAININGS[name], BY_DEVICE_NAME.get(torch.cuda.get_device_name(), "h100-80gb")
    row: dict[str, Any] = gpu.train(case, DEVICE, tiny=False, plan=gpu.predicted(case, False, card))
    assert row["finite"]
    assert not row["host waits at"]
    assert row["peak GB"] == pytest.approx(row["plan GB"], rel=0.1)


def test_a_teacher_in_the_hosts_memory_changes_no_loss() -> None:
    whole = gpu.TRAININGS["sdxl-whole-8bit"]
    there = dataclasses.replace(whole, overrides=whole.overrides + " engine.offload_teacher=True")
    kept, copied = (gpu.train(case, DEVICE, tiny=True, plan={}) for case in (whole, there))
    assert copied["losses"] == pytest.approx(kept["losses"], rel=1e-3)
    assert not copied["host waits at"]


@pytest.mark.parametrize("how", ["selective", "full"])
def test_checkpointing_changes_no_loss(how: str) -> None:
    kept, again = (
        gpu.train(gpu.TRAININGS[name], DEVICE, tiny=True, plan={})["losses"]
        for name in ("sdxl-shared", f"sdxl-shared-{how}")
    )
    assert again == pytest.approx(kept, rel=1e-2)


@pytest.mark.parametrize("how", ["none", "selective", "full"])
def test_compiling_changes_no_loss(how: str) -> None:
    case = gpu.TRAININGS["edm-float32"]
    changed = f"{case.overrides} engine.activation_checkpointing={how}"
    kept, compiled = (
        gpu.train(
            dataclasses.replace(case, overrides=changed + mode, profiled=False), DEVICE, tiny=True, plan={}
        )["losses"]
        for mode in ("", gpu.COMPILE)
    )
    assert compiled == pytest.approx(kept, rel=1e-3)
