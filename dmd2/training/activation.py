"""Activation checkpointing and compilation of a network, unit by unit and in place."""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
import tempfile
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from dmd2.models.family import ModelFamily
from dmd2.parallel import sharding

SAVED_OPERATORS = [
    torch.ops.aten.convolution.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
]
"""Operators whose outputs selective checkpointing keeps: those that take the most FLOPs for their bytes. Of SDXL they are a tenth of the
bytes, and a third of the FLOPs that `full` computes again; matrix products are another third, for four times these bytes."""
RECOMPILE_LIMIT = 256
"""Units share their code and differ in their shapes; beyond torch's default of 8, they would silently stay uncompiled."""


def apply_activation_checkpointing(fam: ModelFamily, network: nn.Module, how: str) -> None:
    """Recompute the activations of each innermost unit in the backward pass; see engine.activation_checkpointing for `how`."""
    contexts = partial(create_selective_checkpoint_contexts, SAVED_OPERATORS)
    # Dynamo refuses the default context where it is given.
    selective = {"context_fn": contexts} if how == "selective" else {}
    for unit in sharding.innermost(fam.blocks(network)):
        # The state of the generators is kept only where something draws: reading it makes the host wait.
        draws = any(isinstance(one, nn.Dropout) and one.p > 0 for one in unit.modules())
        settings = {"use_reentrant": False, "preserve_rng_state": draws, **selective}
        unit.forward = partial(checkpoint, unit.forward, **settings)


def missing_for_compiling(device: torch.device) -> str:
    """What torch.compile needs and this machine lacks; empty if nothing."""
    if device.type == "cuda" and not find_spec("triton"):
        return "triton"
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    if not compiler:
        return "a C compiler"
    works = builds_extensions(compiler)
    return "" if works else f"Python's headers and a C compiler that works (not {compiler})"


@cache
def builds_extensions(compiler: str) -> bool:
    """Whether the C compiler makes a library with Python's headers, as Triton lets it make those that launch kernels."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "empty.c"
        source.write_text("#include <Python.h>\nPyObject *nothing(void) { Py_RETURN_NONE; }\n")
        flags = ["-O3", "-shared", "-fPIC", "-Wno-psabi", f"-I{sysconfig.get_path('include')}"]
        command = [compiler, str(source), *flags, "-o", str(source.with_suffix(".so"))]
        try:
            return subprocess.run(command, capture_output=True, timeout=300, check=False).returncode == 0
        except (OSError, subprocess.SubprocessError):
            return False


def compile_units(fam: ModelFamily, network: nn.Module) -> None:
    """Compile each innermost unit, without the code around the units."""
    torch._dynamo.config.recompile_limit = max(RECOMPILE_LIMIT, torch._dynamo.config.recompile_limit)
    torch._dynamo.config.accumulated_recompile_limit = 16 * RECOMPILE_LIMIT
    for unit in sharding.innermost(fam.blocks(network)):
        unit.forward = torch.compile(unit.forward, dynamic=False)
