"""What a recipe takes on given hardware, before it is paid for: FLOPs, memory, collectives, seconds, cost.

What can be counted is counted. The recipe's networks and loss terms are built on tensors without data (FakeTensorMode),
each pass of a step is run once, and its FLOPs and bytes are counted; a step is a sum of such passes. Seconds are predicted:
counts divided by the peak rates of data sheets times an assumed efficiency. What the plan does not know, it says.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from dmd2.config import Config
from dmd2.errors import Refused, near_miss
from dmd2.plan.hardware import GPUS

if TYPE_CHECKING:
    from dmd2.models.family import ModelFamily
    from dmd2.plan.prediction import Check, Plan


def plan(
    config: Config, gpu: str, gpus_per_node: int = 8, nodes: int = 1, price: float = 0.0, teacher: str = ""
) -> Plan:
    """Predict memory, seconds, GPU-hours and cost of a distillation. Needs neither the GPUs nor the teacher's weights.

    Args:
        gpu: Kind of GPU: a100-40gb, a100-80gb, h100-80gb, h100-mega-80gb, h200-141gb, l4-24gb, l40s-48gb, a10-24gb.
        gpus_per_node: GPUs of a node.
        nodes: Number of nodes.
        price: Of a GPU for an hour, in any currency.
        teacher: Local folder of the teacher, for sd15 and sdxl of another size than the published networks.
    """
    from rich.console import Console

    from dmd2.plan.prediction import CHECKPOINTING
    from dmd2.plan.table import show

    made = predict(config, gpu, gpus_per_node, nodes, price, teacher, CHECKPOINTING)
    show(made, Console())
    return made


def predict(
    config: Config,
    gpu: str,
    gpus_per_node: int = 8,
    nodes: int = 1,
    price: float = 0.0,
    teacher: str = "",
    compared: Sequence[str] = (),
    check: Check = lambda plan: None,
) -> Plan:
    """The same as `plan`, without showing it, and with the alternatives of these ways of activation checkpointing only.

    Args:
        check: Called with what is known of the plan, before and after each pass is counted; see `prediction.make_plan`.
    """
    if gpu not in GPUS:
        raise Refused(f"unknown GPU {gpu!r}; {near_miss(gpu, list(GPUS))}")
    if price < 0:
        raise Refused(f"price is {price:g}; give what a GPU costs for an hour, or leave it out")
    with _without_garbage_collection():
        from dmd2.plan.prediction import make_plan
        from dmd2.plan.traffic import mesh_shape

        mesh = mesh_shape(config, nodes, gpus_per_node)
        return make_plan(config, _family(config, teacher), gpu, mesh, price, compared, check)


@contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """Every full collection goes through the half million objects that torch and diffusers make, and finds nothing: a fifth of the
    time of a plan, its imports included."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _family(config: Config, teacher: str) -> ModelFamily:
    from dmd2.models.family import make_family

    if teacher and not Path(teacher).is_dir():
        raise Refused(
            f"{teacher} is not a folder on this machine; give that of the teacher, or leave out --teacher"
        )
    return make_family(config.family, Path(teacher) if teacher else None)
