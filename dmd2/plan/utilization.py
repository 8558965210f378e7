"""Model FLOPs utilization (MFU): the FLOPs of a training step over what the devices could compute in its time.

Defined as in PaLM (arXiv 2204.02311, appendix B): FLOPs of the networks' passes, without those of recomputation.
"""

from __future__ import annotations

import torch

from dmd2.config import Config
from dmd2.models.family import ModelFamily
from dmd2.parallel.ranks import World
from dmd2.plan.hardware import BY_DEVICE_NAME, GPUS, TERA
from dmd2.plan.passes import fake_trainer, mean_calls, measure_passes
from dmd2.plan.step_costs import flops
from dmd2.training.metrics_log import Throughput


def training_throughput(config: Config, fam: ModelFamily, world: World) -> Throughput:
    """The throughput of a distillation, with MFU on the GPUs of the table. Counting takes seconds, once, on the main
    process; on other devices nothing is counted."""
    batch = config.distill.batch
    name = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else ""
    peak = peak_flops_per_s(name, config.distill.dtype)
    if not peak or not world.is_main:
        return Throughput(batch)
    return Throughput(batch, model_flops_per_step(config, fam), peak * world.size)


def peak_flops_per_s(device_name: str, dtype: str) -> float:
    """Peak of a device by its name in torch, without sparsity; 0 if it is not in the table. Of float32 that of TF32."""
    if device_name not in BY_DEVICE_NAME:
        return 0.0
    gpu = GPUS[BY_DEVICE_NAME[device_name]]
    return TERA * (gpu.bf16 if dtype == "bfloat16" else gpu.tf32)


def model_flops_per_step(config: Config, fam: ModelFamily) -> float:
    """FLOPs of all networks in a mean step of the whole batch, without recomputation of activations."""
    fake = fake_trainer(config, fam)
    return sum(flops(measure_passes(fake, rows=1), mean_calls(fake), config.distill.batch).values())
