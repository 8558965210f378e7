"""What a recipe takes on given hardware, before it is paid for: work, memory, messages, seconds, money.

Nothing is guessed that can be counted. The recipe's networks are made without memory (FakeTensorMode), each kind of
pass that a step consists of is run once through the very terms of the training, and what it computes and keeps is
counted; a step is a sum of such passes. Seconds are a prediction: counts over the peak rates of data sheets, times a
stated efficiency. What is not known is said.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from dmd2.config import Config
from dmd2.errors import Refused, near_miss
from dmd2.plan.hardware import GPUS

if TYPE_CHECKING:
    from dmd2.models.family import ModelFamily
    from dmd2.plan.prediction import Plan


def plan(
    config: Config, gpu: str, gpus_per_node: int = 8, nodes: int = 1, price: float = 0.0, teacher: str = ""
) -> Plan:
    """Say what a distillation would take: memory, seconds, GPU-hours, cost. Needs neither the GPUs nor the teacher's weights.

    Args:
        gpu: Kind of GPU: a100-40gb, a100-80gb, h100-80gb, h100-mega-80gb, h200-141gb, l4-24gb, l40s-48gb, a10-24gb.
        gpus_per_node: GPUs of a machine.
        nodes: Machines.
        price: Of a GPU for an hour, in any currency.
        teacher: Local folder of the teacher, for sd15 and sdxl of another size than the published networks.
    """
    from rich.console import Console

    from dmd2.plan.counts import layout
    from dmd2.plan.prediction import planned
    from dmd2.plan.table import show

    if gpu not in GPUS:
        raise Refused(f"unknown GPU {gpu!r}; {near_miss(gpu, list(GPUS))}")
    if price < 0:
        raise Refused(f"price is {price:g}; give what a GPU costs for an hour, or leave it out")
    fam, mesh = _family(config, teacher), layout(config, nodes, gpus_per_node)
    made = planned(config, fam, gpu, mesh, price)
    show(made, Console())
    return made


def _family(config: Config, teacher: str) -> ModelFamily:
    from dmd2.models.family import make_family

    if teacher and not Path(teacher).is_dir():
        raise Refused(
            f"{teacher} is not a folder on this machine; give that of the teacher, or leave out --teacher"
        )
    return make_family(config.family, Path(teacher) if teacher else None)
