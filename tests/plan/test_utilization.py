"""Model FLOPs utilization: what is counted, and of which devices the peak is known."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dmd2 import recipes
from dmd2.models.family import make_family
from dmd2.plan.hardware import BY_DEVICE_NAME, GPUS
from dmd2.plan.prediction import make_plan
from dmd2.plan.traffic import MeshShape
from dmd2.plan.utilization import model_flops_per_step, peak_flops_per_s, training_throughput
from dmd2.training.metrics_log import Throughput
from tests.conftest import ALONE, MICRO


def test_model_flops_are_those_of_the_plan_whatever_is_recomputed() -> None:
    config = recipes.resolve("edm-digits", MICRO)
    recomputed = recipes.resolve("edm-digits", (*MICRO, "engine.activation_checkpointing=full"))
    plan = make_plan(config, make_family(config.family), "h100-80gb", MeshShape(1, 1, 1))
    for variant in (config, recomputed):
        counted = model_flops_per_step(variant, make_family(variant.family))
        assert counted == pytest.approx(sum(plan.flops.values()), rel=1e-9)


def test_mfu_is_the_share_of_the_peak() -> None:
    rates = Throughput(batch=8, flops_per_step=3e12, peak_flops_per_s=12e12).metrics(steps_per_s=2)
    assert rates == {"samples_per_s": 16, "mfu": 0.5}
    assert Throughput(batch=8).metrics(steps_per_s=2) == {"samples_per_s": 16}


def test_peaks_are_those_of_the_data_sheets_and_of_no_other_device() -> None:
    assert set(BY_DEVICE_NAME.values()) <= set(GPUS)
    assert peak_flops_per_s("NVIDIA H100 80GB HBM3", "bfloat16") == 989e12
    assert peak_flops_per_s("NVIDIA H100 80GB HBM3", "float32") == 494e12
    assert peak_flops_per_s("NVIDIA H100 PCIe", "bfloat16") == 0


def test_a_run_on_known_gpus_logs_its_mfu_on_the_main_process(monkeypatch: pytest.MonkeyPatch) -> None:
    config = recipes.resolve("edm-digits", MICRO)
    family = make_family(config.family)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    world = replace(ALONE, device=torch.device("cuda"), size=2)
    throughput = training_throughput(config, family, world)
    assert throughput.peak_flops_per_s == 2 * peak_flops_per_s("NVIDIA H200", config.distill.dtype)
    assert throughput.metrics(1.0)["mfu"] > 0
    other = training_throughput(config, family, replace(world, rank=1))
    assert other == Throughput(config.distill.batch), "other ranks write no log"


def test_nothing_is_counted_on_a_cpu() -> None:
    config = recipes.resolve("edm-digits", MICRO)
    assert training_throughput(config, make_family(config.family), ALONE) == Throughput(config.distill.batch)
