"""What a step of the published training scheme takes, to compare it with ours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from dmd2.plan.hardware import GPUS, TERA
from dmd2.plan.passes import ROLLOUT, FakeTrainer, PassCost, PassCosts, mean_calls, student_pass
from dmd2.plan.step_costs import seconds
from dmd2.plan.traffic import MeshShape, traffic
from dmd2.training import memory


@dataclass(frozen=True)
class PublishedScheme:
    """The published scheme on 64 A100 GPUs: FSDP with every layer as a unit, in float32, resharded after every call."""

    units: int
    """Of a network."""
    unit_calls: float
    """Per average step: gathers of units in either direction, and reductions."""
    computing_s: float
    overhead_s: float
    ours_s: float
    """Of our scheme on the same GPUs with the same batch."""
    published_s: float = 10.8

    @property
    def seconds(self) -> float:
        return self.computing_s + self.overhead_s


SECONDS_PER_UNIT_CALL = 1.2e-3
"""Overhead of a unit call. Inferred from the published training times themselves, by one of three differences between them
(the others give 0.7 and 1.5 ms), and never profiled. So it is no proof that the sum meets the published time; what it shows
is that the computing alone is far below it."""
MIN_UNIT_WEIGHTS = 3000
"""The smallest unit of the published wrapping policy, in weights."""
PUBLISHED_MESH, PUBLISHED_GPU = MeshShape(64, 8, 8), "a100-80gb"


def compare_with_published(fake: FakeTrainer, costs: PassCosts) -> PublishedScheme:
    """Both schemes on the published GPUs with two rows each. `costs` are those without activation checkpointing."""
    sent = traffic(fake, PUBLISHED_MESH, True, costs, fake.config.distill.batch // PUBLISHED_MESH.gpus)
    ours = sum(seconds(fake, PUBLISHED_MESH, GPUS[PUBLISHED_GPU], costs, sent).values())
    units = size_based_units(fake.nets.student, MIN_UNIT_WEIGHTS)
    calls = _unit_calls(fake, costs)
    return PublishedScheme(
        len(units), calls, _computing_seconds(fake, costs), calls * SECONDS_PER_UNIT_CALL, ours
    )


def _unit_calls(fake: FakeTrainer, costs: PassCosts) -> float:
    """Unit calls of an average step. The published scheme sends real and fake samples through the discriminator apart, in two
    passes instead of one."""
    units = [u for net in fake.nets.named().values() for u in size_based_units(net, MIN_UNIT_WEIGHTS)]
    twice = {one.name for one in fake.critic_passes if not one.reaches_output}
    return sum(
        often * (2 if name in twice else 1) * _unit_calls_of_pass(costs[name], units)
        for name, often in mean_calls(fake).items()
    )


def _unit_calls_of_pass(cost: PassCost, units: Sequence[nn.Module]) -> int:
    gathers = sum(cost.forward_calls.get(unit, 0) + cost.backward_calls.get(unit, 0) for unit in units)
    return gathers + sum(not cost.reached.isdisjoint(unit.parameters()) for unit in units)


def _computing_seconds(fake: FakeTrainer, costs: PassCosts) -> float:
    """Seconds of computing of an average step with two rows on an A100: rollouts and the critic's score in TF32, the rest in
    bfloat16."""
    calls, gpu = mean_calls(fake), GPUS[PUBLISHED_GPU]
    total = sum(often * costs[name].at(2).flops for name, often in calls.items())
    scores = sum(calls[student_pass(term)] for term in fake.terms if term.name == "dmd")
    in_tf32 = (calls[ROLLOUT] + scores) * costs[ROLLOUT].at(2).flops
    return (in_tf32 / gpu.tf32 + (total - in_tf32) / gpu.bf16) / (gpu.efficiency.eager * TERA)


def size_based_units(network: nn.Module, min_weights: int) -> list[nn.Module]:
    """The units of FSDP's size_based_auto_wrap_policy: from the leaves up, every module with `min_weights` that are in no
    smaller unit."""
    units: list[nn.Module] = []

    def wrapped_weights(module: nn.Module) -> int:
        size = memory.num_weights(module)
        if size < min_weights:
            return 0
        inner = sum(wrapped_weights(child) for child in module.children())
        if size - inner >= min_weights and not isinstance(module, nn.ModuleList | nn.ModuleDict):
            units.append(module)
            return size
        return inner

    for child in network.children():
        wrapped_weights(child)
    return units
