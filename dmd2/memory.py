"""What a distillation holds on each device between its passes, in bytes by part; activations are not here."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import nn

from dmd2.config import Config
from dmd2.config import Player as PlayerConfig
from dmd2.models.family import ModelFamily
from dmd2.parallel import outermost

ROOM = 0.6
"""Share of a device that weights, gradients and moments may take; the rest is for activations."""
FLOAT32 = 4
MOMENTS = 2 * FLOAT32


def static(config: Config, fam: ModelFamily, shards: int, resident: bool) -> dict[str, float]:
    """Bytes by part, on a device of a mesh with so many shards."""
    settings = config.distill
    width = torch.finfo(getattr(torch, settings.dtype)).bits // 8
    with torch.device("meta"):
        body, head = fam.network(), fam.head() if settings.gan else nn.Identity()
    whole, unit = count(body), max(map(count, outermost(fam.blocks(body))), default=0)
    base_shards = 1 if resident or settings.lora else shards
    parts = {"teacher": width * whole / base_shards}
    learns = {"student": _learning(config, body), "critic": 0}
    if not settings.regression:
        shared = settings.lora is not None and settings.lora.shared_base
        learns["critic"] = learns["student"] if shared else whole
    gathered = 0.0
    for name, player in (("student", settings.student), ("critic", settings.critic)):
        parts |= _player(name, player, learns[name], shards)
        # Gathered in the type it is computed in; in float32 on one device, that is the weights themselves.
        copy = width * learns[name] if shards > 1 or width < FLOAT32 else 0
        gathered += copy if resident else 0
    if not resident:
        gathered = 2 * width * unit
    parts["gathered weights"] = gathered
    biggest = max(learns.values())
    accumulates = resident and 0 < config.engine.micro_batch < settings.batch
    parts["gradients on their way"] = (FLOAT32 if accumulates else width) * (
        biggest if accumulates else 2 * unit
    )
    parts |= _player("head", settings.critic, count(head), shards) if settings.gan else {}
    return {name: size for name, size in parts.items() if size}


def static_gb(config: Config, fam: ModelFamily, shape: Sequence[int], resident: bool) -> float:
    """Their sum in 1e9 bytes, on a mesh of (replicas, shards)."""
    return sum(static(config, fam, shape[1], resident).values()) / 1e9


def device_gb(device: torch.device) -> float:
    """Memory of the accelerator, or of this machine, in 1e9 bytes."""
    if device.type == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    return torch.accelerator.get_memory_info(device)[1] / 1e9


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _player(name: str, settings: PlayerConfig, weights: int, shards: int) -> dict[str, float]:
    """Float32 masters and gradients, moments, running averages: divided among the shards."""
    mine = weights / shards
    return {
        f"{name}: weights": FLOAT32 * mine,
        f"{name}: gradients": FLOAT32 * mine,
        f"{name}: moments": MOMENTS * mine,
        f"{name}: averages": FLOAT32 * mine * len(settings.ema),
    }


def _learning(config: Config, body: nn.Module) -> int:
    """Weights of the student that learn."""
    if not config.distill.lora:
        return count(body)
    from dmd2.models import lora

    network = lora.updated(body, config.distill.lora)
    return sum(p.numel() for p in network.parameters() if p.requires_grad)
