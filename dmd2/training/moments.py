"""AdamW's moments in eight bits: a code for each value and a float32 scale for each block of values.

From Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization": a value is its block's largest magnitude times a
level of a table, in which each decade has twice the levels of the one below it. Two things differ. A block is a part of one
row of a weight, so that sharding by rows cuts none, and a checkpoint can be loaded on any number of ranks. And a value is
rounded to one of the two levels beside it at random, so that the mean is kept: a second moment changes by about a thousandth
per step, and rounding to the nearest level would never let it fall.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Literal

import torch
from torch import Tensor, nn

from dmd2.parallel import sharding

Precision = Literal["float32", "8bit"]
BLOCK = 64
"""Values that share a scale."""
SMALLEST = 4096
"""Weights with fewer values, and those whose rows are not whole blocks, keep float32 moments."""
NAMES = ("exp_avg", "exp_avg_sq")
"""AdamW's first and second moment."""
SCALE = "_scale"
"""End of the name of the scales of a moment that is stored as codes."""
CHUNK = 2**24
"""Values that are decoded at a time: few kernels for many weights, and half a gigabyte of temporary memory."""
State = dict[str, Tensor]
"""AdamW's state of one weight: `step`, the moments and, where these are codes, their scales."""


def is_quantized(shape: Sequence[int]) -> bool:
    """Whether 8-bit moments of a weight of this shape are codes, not float32."""
    return len(shape) > 1 and math.prod(shape) >= SMALLEST and math.prod(shape[1:]) % BLOCK == 0


def zeros(parameter: nn.Parameter, precision: Precision) -> State:
    """The moments before the first step, sharded like the parameter."""
    shard = sharding.local_tensor(parameter).detach()
    if precision == "float32" or not is_quantized(parameter.shape):
        return {name: sharding.sharded_like(parameter, torch.zeros_like(shard)) for name in NAMES}
    blocks = math.prod(parameter.shape[1:]) // BLOCK
    made = {}
    for name in NAMES:
        codes, scales = torch.zeros_like(shard, dtype=torch.uint8), shard.new_zeros(len(shard), blocks)
        made[name] = sharding.sharded_like(parameter, codes)
        made[name + SCALE] = sharding.sharded_like(parameter, scales)
    return made


def num_bytes(module: nn.Module, precision: Precision) -> float:
    """Bytes of the moments of the weights of a module that learn."""
    sizes = [
        p.numel() * (1 + 4 / BLOCK if precision == "8bit" and is_quantized(p.shape) else 4)
        for p in module.parameters()
        if p.requires_grad
    ]
    return len(NAMES) * sum(sizes)


def chunks(shards: Sequence[tuple[Tensor, State]]) -> Iterator[Sequence[tuple[Tensor, State]]]:
    """The shards in parts of at most CHUNK values, or of one larger shard."""
    part: list[tuple[Tensor, State]] = []
    for one in shards:
        if part and sum(shard.numel() for shard, _ in part) + one[0].numel() > CHUNK:
            yield part
            part = []
        part.append(one)
    if part:
        yield part


def decode(states: Sequence[State], name: str) -> Tensor:
    """The values of a moment of several weights, float32 (blocks, BLOCK)."""
    codes, scales = _codes(states, name), _scales(states, name)
    return _levels(name, codes.device)[codes.int()] * scales


def views(values: Tensor, shards: Sequence[Tensor]) -> list[Tensor]:
    """The part of each shard in `values`, as a tensor of its shape on the same memory."""
    parts = values.view(-1).split([shard.numel() for shard in shards])
    return [part.view(shard.shape) for part, shard in zip(parts, shards, strict=True)]


def encode(
    values: Tensor, states: Sequence[State], name: str, skipped: Tensor, generator: torch.Generator
) -> None:
    """Store the values of a moment, as `decode` returns them. If `skipped` is 1, a scalar on the device, nothing changes."""
    levels = _levels(name, values.device)
    scales = values.abs().amax(-1, keepdim=True)
    x = values / scales.clamp_min(torch.finfo(torch.float32).tiny)
    low = torch.bucketize(x, levels, right=True, out_int32=True).sub_(1).clamp_(0, len(levels) - 2)
    below, above = levels[low], levels[low + 1]
    up = torch.rand(x.shape, generator=generator, device=x.device) * (above - below) < x - below
    codes = torch.where(skipped > 0, _codes(states, name), (low + up).to(torch.uint8))
    scales = torch.where(skipped > 0, _scales(states, name), scales)
    for one, stored in ((name, codes), (name + SCALE, scales)):
        kept = [sharding.local_tensor(state[one]) for state in states]
        torch._foreach_copy_(kept, views(stored, kept))


def _codes(states: Sequence[State], name: str) -> Tensor:
    return torch.cat([sharding.local_tensor(state[name]).view(-1, BLOCK) for state in states])


def _scales(states: Sequence[State], name: str) -> Tensor:
    return torch.cat([sharding.local_tensor(state[name + SCALE]).view(-1, 1) for state in states])


@cache
def _levels(name: str, device: torch.device) -> Tensor:
    """The levels of a moment, ascending, with 1 as the largest.

    The first has 127 of each sign and zero, over seven decades. The second has 255 over eight and no zero: the step is
    divided by its root.
    """
    if name == "exp_avg":
        positive = _decades(7)
        return torch.cat([-positive.flip(0), torch.zeros(1), positive]).to(device)
    return _decades(8).to(device)


def _decades(count: int) -> Tensor:
    """2^i levels at even distances in the i-th decade from below, the highest of which ends at 1."""
    found = [10.0 ** (i + 1 - count) * torch.linspace(0.1, 1, 2**i + 1)[1:] for i in range(count)]
    return torch.cat(found)
