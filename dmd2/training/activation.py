"""Activation checkpointing and compilation of the units of a network, in place."""

from __future__ import annotations

import os
import shutil
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts, noop_context_fn

from dmd2.errors import Refused
from dmd2.models.family import ModelFamily
from dmd2.parallel import sharding


def checkpointed(fam: ModelFamily, network: nn.Module, how: str) -> None:
    """Let each of the family's units, but those that hold others, compute its activations again when they are needed."""
    kept = partial(create_selective_checkpoint_contexts, KEPT) if how == "selective" else noop_context_fn
    for unit in sharding.innermost(fam.blocks(network)):
        unit.forward = partial(checkpoint, unit.forward, use_reentrant=False, context_fn=kept)


KEPT = [
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten.convolution.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
]
"""What selective checkpointing does not compute again: the results that cost the most for their size."""


def compiled(fam: ModelFamily, network: nn.Module) -> None:
    """Compile each of the family's units, but those that hold others; what is around them, and their sharding, is not."""
    torch._dynamo.config.recompile_limit = max(RECOMPILED, torch._dynamo.config.recompile_limit)
    torch._dynamo.config.accumulated_recompile_limit = 16 * RECOMPILED
    if not (os.environ.get("CC") or any(shutil.which(name) for name in ("cc", "gcc", "clang"))):
        raise Refused(
            "engine.compile is on, and torch.compile needs a C compiler; there is none here: leave it out, or make the image on a base "
            "that has one (make images BASE=...)"
        )
    for unit in sharding.innermost(fam.blocks(network)):
        unit.forward = torch.compile(unit.forward, dynamic=False)


RECOMPILED = 256
"""Units share their code and differ in their shapes; beyond torch's usual 8, they would silently not be compiled."""
