"""Bytes that a distillation holds on each device between its passes, by part."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from dmd2.config import Config, OptimizerConfig
from dmd2.models.family import ModelFamily
from dmd2.parallel.sharding import outermost

ROOM = 0.6
"""Share of a device that weights, gradients and moments may take; the rest is for activations."""
FLOAT32 = 4
MOMENTS = 2 * FLOAT32


@dataclass(frozen=True)
class Sizes:
    """Numbers of weights."""

    whole: int
    """Of a network."""
    head: int
    student: int
    """Those that learn."""
    critic: int
    outer: int
    """Of the largest of the outermost units."""
    unit: int
    """Of the largest unit."""


def sizes(config: Config, fam: ModelFamily) -> Sizes:
    with torch.device("meta"):
        body, head = fam.network(), fam.head() if config.distill.gan else nn.Identity()
    units = fam.blocks(body)
    outer, unit = (max(map(count, some), default=0) for some in (outermost(units), units))
    whole, learns = count(body), _learning(config, fam, body)
    return Sizes(whole, count(head), learns["student"], learns["critic"], outer, unit)


def static(
    config: Config, of: Sizes, shards: int, resident: bool, parts: int = 1, reached: int | None = None
) -> dict[str, float]:
    """Bytes by part, on a device of a mesh with so many shards, for a batch that is divided into `parts` on each device.
    `reached` are the weights that the GAN's gradient reaches; not known, it is all of them."""
    settings, width = config.distill, config_width(config)
    low_rank, divided = settings.lora is not None, shards > 1
    coming = 2.0 * width * (of.outer if resident else of.unit)
    found = {"teacher": width * of.whole / (1 if resident or low_rank else shards)}
    gathered = coming if divided or not resident else 0.0
    for name, trainable, learns in (
        ("student", settings.student, of.student),
        ("critic", settings.critic, of.critic),
    ):
        found |= _trainable(name, trainable, learns, shards)
        # Gathered in the type it is computed in; in float32 on one device, that is the weights themselves.
        copied = (divided or width < FLOAT32) and (resident or (low_rank and learns < of.whole))
        gathered += width * learns if copied else 0
    found |= _trainable("head", settings.critic, of.head, shards)
    found["gathered weights"] = gathered + (FLOAT32 * of.head if divided else 0)
    # A trainable forgets its gradients before the other one's turn.
    found["gradients"] = FLOAT32 * max(of.student, of.critic + of.head) / shards
    found["gradients on their way"] = _kept(config, of, resident, parts, reached) + coming
    return {name: size for name, size in found.items() if size}


def _kept(config: Config, of: Sizes, resident: bool, parts: int, reached: int | None) -> float:
    """Bytes of whole gradients, in float32, that wait for a later pass to be added up over the processes: all of a part
    that is not the last, else those of the critic's first pass. Only what is resident lets them wait."""
    student = of.student if resident or config.distill.lora else 0
    critic = of.critic if resident or of.critic < of.whole else 0
    if parts > 1:
        return FLOAT32 * max(student, critic)
    two_passes = config.distill.gan and config.distill.dmd
    return FLOAT32 * min(critic, reached or critic) if two_passes else 0


def static_gb(config: Config, fam: ModelFamily, shape: Sequence[int], resident: bool) -> float:
    """Their sum in 1e9 bytes, on a mesh of (replicas, shards)."""
    parts = parts_of(config, shape[0] * shape[1])
    return sum(static(config, sizes(config, fam), shape[1], resident, parts).values()) / 1e9


def parts_of(config: Config, devices: int) -> int:
    """Into how many parts a device's share of the batch is divided."""
    share = -(-config.distill.batch // devices)
    return -(-share // (config.engine.micro_batch or share))


def config_width(config: Config) -> int:
    """Bytes of a weight as it is computed with."""
    return torch.finfo(getattr(torch, config.distill.dtype)).bits // 8


def device_gb(device: torch.device) -> float:
    """Memory of the accelerator, or of this machine, in 1e9 bytes."""
    if device.type == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    return torch.accelerator.get_memory_info(device)[1] / 1e9


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _trainable(name: str, settings: OptimizerConfig, weights: int, shards: int) -> dict[str, float]:
    """Float32 masters, moments, running averages: divided among the shards."""
    mine = weights / shards
    return {
        f"{name}: weights": FLOAT32 * mine,
        f"{name}: moments": MOMENTS * mine,
        f"{name}: averages": FLOAT32 * mine * len(settings.ema),
    }


def _learning(config: Config, fam: ModelFamily, body: nn.Module) -> dict[str, int]:
    """Weights of student and critic that learn. Changes `body`."""
    whole, settings = count(body), config.distill
    if not settings.lora:
        return {"student": whole, "critic": 0 if settings.regression else whole}
    from dmd2.models import lora

    network = lora.add_low_rank_update(body, fam.lora_targets, settings.lora)
    update = sum(p.numel() for p in network.parameters() if p.requires_grad)
    critic = update if settings.lora.shared_base else whole
    return {"student": update, "critic": 0 if settings.regression else critic}
