"""Bytes that weights, gradients and optimizer state take on each device between the passes of a step, by part."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from dmd2.config import Config, OptimizerConfig
from dmd2.parallel.sharding import outermost
from dmd2.training import moments
from dmd2.training.networks import DistillNetworks, gathers_in_compute_type
from dmd2.training.optim import NETWORK

MAX_STATIC_FRACTION = 0.6
"""Fraction of a device's memory that weights, gradients and moments may take; the rest is for activations."""
FLOAT32 = 4


@dataclass(frozen=True)
class Sizes:
    """Numbers of weights of a recipe."""

    network: int
    """Of a whole diffusion network."""
    student: int
    """Of the student's weights that learn."""
    critic: int
    """Of the critic's weights that learn, without the modules of loss terms."""
    term_modules: int
    """Of modules that loss terms train with the critic, such as a discriminator head."""
    outer_unit: int
    """Of the largest unit that no other one contains."""
    unit: int
    """Of the largest unit."""
    critic_passes: int
    """Backward passes of the critic per step and micro-batch."""
    moments: Mapping[str, float]
    """Bytes of AdamW's moments of student, critic and head."""
    merged: int = 0
    """Of the weights that a low-rank update of the student is merged into, for its calls without gradient."""


def sizes(
    config: Config,
    nets: DistillNetworks,
    critic_modules: nn.ModuleDict,
    units: Sequence[nn.Module],
    critic_passes: int,
) -> Sizes:
    """`units` are those of sharding, of the student."""
    outer, unit = (max(map(num_weights, some), default=0) for some in (outermost(units), units))
    heads = [module for name, module in critic_modules.items() if name != NETWORK]
    trained = num_trained(nets.student), num_trained(nets.critic)
    merged = sum(p.numel() for p in nets.merged.weights()) if nets.merged else 0
    added, states = sum(map(num_weights, heads)), moment_bytes(config, nets, heads)
    return Sizes(num_weights(nets.teacher), *trained, added, outer, unit, critic_passes, states, merged)


def moment_bytes(config: Config, nets: DistillNetworks, heads: Sequence[nn.Module]) -> dict[str, float]:
    """Bytes of AdamW's moments of student, critic and the modules that loss terms train with it."""
    student, critic = config.distill.student.moments, config.distill.critic.moments
    return {
        "student": moments.num_bytes(nets.student, student),
        "critic": moments.num_bytes(nets.critic, critic),
        "head": sum(moments.num_bytes(head, critic) for head in heads),
    }


def static(
    config: Config,
    of: Sizes,
    shards: int,
    resident: bool,
    micro_batches: int,
    early_weights: int | None = None,
) -> dict[str, float]:
    """Bytes by part on a device of a mesh with `shards` shards, if its rows of a batch are divided into `micro_batches`.

    `early_weights` is the number of the critic's weights that get a gradient before its last pass; None = not known, which
    counts as all.
    """
    settings, width, sharded = config.distill, compute_width(config), shards > 1
    low_rank = settings.lora is not None
    learned_width = gathered_width(config)
    in_transit = 2.0 * learned_width * (of.outer_unit if resident else of.unit)
    if config.engine.offload_teacher:
        found = {"teacher: units on the way from the host": 2.0 * width * of.unit}
    else:
        found = {"teacher": width * of.network / (1 if resident or low_rank else shards)}
    found["student: merged weights"] = float(width * of.merged)
    gathered = in_transit if sharded or not resident else 0.0
    for name, optimizer, trained in (
        ("student", settings.student, of.student),
        ("critic", settings.critic, of.critic),
    ):
        found |= _masters_and_moments(name, optimizer, trained, of.moments[name], shards)
        # Gathered in the type it is computed in; in float32 on one device, that is the weights themselves.
        copied = (sharded or learned_width < FLOAT32) and (resident or (low_rank and trained < of.network))
        gathered += learned_width * trained if copied else 0
    found |= _masters_and_moments("head", settings.critic, of.term_modules, of.moments["head"], shards)
    found["gathered weights"] = gathered + (FLOAT32 * of.term_modules if sharded else 0)
    # Student and critic free their gradients before the other one's turn.
    found["gradients"] = FLOAT32 * max(of.student, of.critic + of.term_modules) / shards
    # In a mesh of one shard a unit's waiting gradient is freed when its reduced one is made: they are not alive together.
    waiting = _unreduced_gradients(config, of, resident, micro_batches, early_weights)
    unreduced = waiting if sharded else 0
    found["unreduced gradients"] = unreduced + in_transit
    return {name: size for name, size in found.items() if size}


def _unreduced_gradients(
    config: Config, of: Sizes, resident: bool, micro_batches: int, early_weights: int | None
) -> float:
    """Bytes of whole float32 gradients that wait for a later pass to be reduced over the ranks: all of a micro-batch that is
    not the last, else those of the critic's passes before the last. Only resident networks let them wait."""
    student = of.student if resident or config.distill.lora else 0
    critic = of.critic if resident or of.critic < of.network else 0
    if micro_batches > 1:
        return FLOAT32 * max(student, critic)
    if of.critic_passes < 2:
        return 0
    return FLOAT32 * (critic if early_weights is None else min(critic, early_weights))


def total_gb(parts: Mapping[str, float]) -> float:
    """The sum of all parts in 1e9 bytes."""
    return sum(parts.values()) / 1e9


def micro_batches(config: Config, devices: int) -> int:
    """Micro-batches per step on each of so many devices."""
    rows = -(-config.distill.batch // devices)
    return -(-rows // (config.engine.micro_batch or rows))


def compute_width(config: Config) -> int:
    """Bytes of a weight in the type that the networks compute in."""
    return torch.finfo(getattr(torch, config.distill.dtype)).bits // 8


def gathered_width(config: Config) -> int:
    """Bytes of an all-gathered weight of student and critic."""
    return compute_width(config) if gathers_in_compute_type(config) else FLOAT32


def device_gb(device: torch.device) -> float:
    """Memory of the accelerator, or of this machine, in 1e9 bytes."""
    if device.type == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    return torch.accelerator.get_memory_info(device)[1] / 1e9


def num_weights(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def num_trained(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def _masters_and_moments(
    name: str, settings: OptimizerConfig, trained: int, moment_bytes: float, shards: int
) -> dict[str, float]:
    """Bytes of float32 master weights, moments and EMAs of a shard."""
    mine = trained / shards
    return {
        f"{name}: weights": FLOAT32 * mine,
        f"{name}: moments": moment_bytes / shards,
        f"{name}: EMAs": FLOAT32 * mine * len(settings.ema),
    }
