"""Activation checkpointing and compilation of a network, unit by unit and in place."""

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

SAVED_OPERATORS = [
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten.convolution.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
]
"""Operators whose outputs selective checkpointing keeps: those that take the most FLOPs for their bytes."""
RECOMPILE_LIMIT = 256
"""Units share their code and differ in their shapes; beyond torch's default of 8, they would silently stay uncompiled."""


def apply_activation_checkpointing(fam: ModelFamily, network: nn.Module, how: str) -> None:
    """Recompute the activations of each innermost unit in the backward pass; see engine.activation_checkpointing for `how`."""
    context = (
        partial(create_selective_checkpoint_contexts, SAVED_OPERATORS)
        if how == "selective"
        else noop_context_fn
    )
    for unit in sharding.innermost(fam.blocks(network)):
        unit.forward = partial(checkpoint, unit.forward, use_reentrant=False, context_fn=context)


def compile_units(fam: ModelFamily, network: nn.Module) -> None:
    """Compile each innermost unit, without the code around the units. Raises Refused where there is no C compiler."""
    torch._dynamo.config.recompile_limit = max(RECOMPILE_LIMIT, torch._dynamo.config.recompile_limit)
    torch._dynamo.config.accumulated_recompile_limit = 16 * RECOMPILE_LIMIT
    if not (os.environ.get("CC") or any(shutil.which(name) for name in ("cc", "gcc", "clang"))):
        raise Refused(
            "engine.compile is on, and torch.compile needs a C compiler; there is none here: leave it out, or make the image on a base "
            "that has one (make images BASE=...)"
        )
    for unit in sharding.innermost(fam.blocks(network)):
        unit.forward = torch.compile(unit.forward, dynamic=False)
