"""What the published scheme takes, for comparison."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from dmd2.config import Config
from dmd2.plan.counts import Measured, mean_calls
from dmd2.plan.hardware import EFFICIENCY, GPUS, TERA
from dmd2.plan.rehearsal import CRITIC, CRITIC_GAN, ROLLOUT, SCORE, STUDENT, STUDENT_GAN, Networks
from dmd2.training import memory


@dataclass(frozen=True)
class Reference:
    """The published scheme on its 64 GPUs: every layer a unit of its own, in float32, nothing kept gathered."""

    units: int
    unit_calls: float
    """Per average step; of a unit a gather in each direction, and a reduction."""
    computing_s: float
    overhead_s: float
    published_s: float = 10.8
    ours_s: float = 0.0

    @property
    def seconds(self) -> float:
        return self.computing_s + self.overhead_s


REFERENCE_UNIT_S = 1.2e-3
"""Seconds of overhead per unit call: inferred from the published run times themselves, by one of three differences
between them (the others give 0.7 and 1.5 ms), and never profiled. That the sum meets the published time is therefore no
proof; that the computing alone does not come near it is what this shows."""
REFERENCE_UNIT_WEIGHTS = 3000
"""The smallest unit of its wrapping policy, in weights."""


def reference(
    config: Config, nets: Networks, measured: Measured, reached: set[int]
) -> tuple[int, float, float]:
    """Units of a network, unit calls and seconds of computing of an average step, at two rows per A100: rollouts and the
    critic's score in TF32, the rest in bfloat16; the head sees real and fake apart."""
    units = wrapped(nets.critic, REFERENCE_UNIT_WEIGHTS)
    encoder = sum(any(id(p) in reached for p in unit.parameters()) for unit in units)
    sizes = {
        STUDENT_GAN: 2 * encoder,
        CRITIC_GAN: 2 * 3 * encoder,
        STUDENT: 3 * len(units),
        CRITIC: 3 * len(units),
    }
    often, gpu = mean_calls(config), GPUS["a100-80gb"]
    unit_calls = sum(count * sizes.get(name, len(units)) for name, count in often.items())
    computing = sum(
        count * measured.passes[name].at(2).flops / (gpu.tf32 if name in (ROLLOUT, SCORE) else gpu.bf16)
        for name, count in often.items()
    )
    return len(units), unit_calls, computing / (EFFICIENCY * TERA)


def wrapped(network: nn.Module, least: int) -> list[nn.Module]:
    """The units of FSDP's size_based_auto_wrap_policy: from the leaves up, what has so many weights left to it."""
    units: list[nn.Module] = []

    def taken(module: nn.Module) -> int:
        size = memory.count(module)
        if size < least:
            return 0
        inner = sum(taken(child) for child in module.children())
        if size - inner >= least and not isinstance(module, nn.ModuleList | nn.ModuleDict):
            units.append(module)
            return size
        return inner

    for child in network.children():
        taken(child)
    return units
