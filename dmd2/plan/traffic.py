"""The collectives of an average step: how many, and how many bytes a GPU receives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from dmd2.config import Config
from dmd2.errors import Refused
from dmd2.plan.passes import FakeTrainer, PassCost, PassCosts, mean_calls
from dmd2.training import memory


@dataclass(frozen=True)
class MeshShape:
    """How many GPUs there are, and among how many of them the weights are sharded."""

    gpus: int
    gpus_per_node: int
    shards: int

    @property
    def replicas(self) -> int:
        return self.gpus // self.shards

    def __str__(self) -> str:
        return f"{self.replicas} x {self.shards}"


def mesh_shape(config: Config, nodes: int, per_node: int) -> MeshShape:
    """The mesh that a training of this recipe makes of the GPUs. Raises Refused where they do not divide batch or mesh."""
    gpus, batch = nodes * per_node, config.distill.batch
    if nodes < 1 or per_node < 1:
        raise Refused(f"{nodes} nodes of {per_node} GPUs are none; give at least one of each")
    if batch % gpus:
        raise Refused(
            f"a batch of {batch} images cannot be divided among {gpus} GPUs; choose a divisor, or another --distill.batch"
        )
    shards = config.engine.shards or per_node
    if gpus % shards:
        raise Refused(f"engine.shards is {shards}, which does not divide the {gpus} GPUs; choose a divisor")
    return MeshShape(gpus, per_node, shards)


Traffic = dict[str, tuple[float, float]]
"""Kind of collective -> calls, and bytes that a GPU receives, per average step."""
GATHER, SCATTER, REDUCE = "all-gather", "reduce-scatter", "all-reduce"


def update_rates(config: Config) -> dict[str, float]:
    """Updates per step of student and critic."""
    settings = config.distill
    return (
        {"student": 1.0} if settings.regression else {"student": 1 / settings.critic_updates, "critic": 1.0}
    )


def traffic(fake: FakeTrainer, mesh: MeshShape, resident: bool, costs: PassCosts, rows: int) -> Traffic:
    """Collectives of an average step, with micro-batches of `rows`.

    A resident network is gathered once per update, and its gradients are reduced once. Another is gathered by every forward
    and backward call of a unit, and its gradients are reduced after every backward call.
    """
    if mesh.gpus == 1:
        return {}
    config, width = fake.config, memory.gathered_width(fake.config)
    widths = {"teacher": memory.compute_width(config)}
    micro_batches = -(-config.distill.batch // mesh.gpus // rows)
    rates, calls, total = update_rates(config), mean_calls(fake), _Sum(mesh)
    networks, unsharded = fake.nets.named(), _gathered_once(config, resident)
    for name, rate in rates.items():
        if name in unsharded:
            sizes = [_numel(mine) for _, mine in fake.outer_units[name]]
            total.gather(sizes, width, rate)
            total.reduce(sizes, width, rate)
    for module in fake.term_modules:
        weights = set(module.parameters())
        total.gather([memory.num_weights(module)], memory.FLOAT32, 1)
        reductions = sum(bool(weights & costs[one.name].reached) for one in fake.critic_passes)
        total.reduce([memory.num_weights(module)], memory.FLOAT32, reductions)
    for name in (name for name in networks if name not in unsharded):
        for one, often in calls.items():
            for unit, weights_of_unit in fake.units[name]:
                times = often * micro_batches
                _add_unit_calls(total, costs[one], unit, weights_of_unit, widths.get(name, width), times)
    norms = sum(rates.values()) if mesh.shards > 1 else 0
    total.add(REDUCE, norms, norms * memory.FLOAT32)
    return {kind: sums for kind, sums in total.sums.items() if sums[0]}


def copied_from_host(fake: FakeTrainer, mesh: MeshShape, costs: PassCosts, rows: int) -> float:
    """Bytes of the teacher's weights that are copied to a GPU in an average step, if they wait in the host's memory."""
    if not fake.config.engine.offload_teacher:
        return 0.0
    micro_batches = -(-fake.config.distill.batch // mesh.gpus // rows)
    copied = sum(
        often * costs[one].forward_calls.get(unit, 0) * _numel(weights)
        for one, often in mean_calls(fake).items()
        for unit, weights in fake.units["teacher"]
    )
    return micro_batches * copied * memory.compute_width(fake.config) / mesh.shards


def _gathered_once(config: Config, resident: bool) -> set[str]:
    """The networks that no pass gathers: resident ones, and those whose frozen weights are whole on every process."""
    lora = config.distill.lora
    whole = {"teacher", "student"} if lora else set()
    whole |= {"critic"} if lora and lora.shared_base else set()
    whole = {"teacher", "student", "critic"} if resident else whole
    return whole - {"teacher"} if config.engine.offload_teacher else whole


def _add_unit_calls(
    total: _Sum, cost: PassCost, unit: nn.Module, weights: Sequence[nn.Parameter], width: int, often: float
) -> None:
    forward, backward = cost.forward_calls.get(unit, 0), cost.backward_calls.get(unit, 0)
    total.gather([_numel(weights)], width, often * (forward + backward))
    if not cost.reached.isdisjoint(weights):
        total.reduce([_numel(weights)], width, often * backward)


def _numel(weights: Sequence[nn.Parameter]) -> int:
    return sum(p.numel() for p in weights)


class _Sum:
    """Calls and received bytes by kind of collective."""

    def __init__(self, mesh: MeshShape) -> None:
        self.mesh, self.sums = mesh, dict.fromkeys((GATHER, SCATTER, REDUCE), (0.0, 0.0))
        self.received = 1 - 1 / mesh.shards
        """Fraction of a sharded tensor that other ranks hold."""

    def add(self, kind: str, calls: float, size: float) -> None:
        before = self.sums[kind]
        self.sums[kind] = before[0] + calls, before[1] + size

    def gather(self, units: Sequence[int], width: int, times: float) -> None:
        """All-gathers of the weights of units with these numbers of weights, `times` each."""
        if self.mesh.shards > 1:
            self.add(GATHER, times * len(units), times * sum(units) * width * self.received)

    def reduce(self, units: Sequence[int], width: int, times: float) -> None:
        """Reductions of gradients: reduce-scatter among the shards, then float32 all-reduce among the replicas."""
        if self.mesh.shards > 1:
            self.add(SCATTER, times * len(units), times * sum(units) * width * self.received)
        if self.mesh.replicas > 1:
            size = 2 * (1 - 1 / self.mesh.replicas) * memory.FLOAT32 * sum(units) / self.mesh.shards
            self.add(REDUCE, times * len(units), times * size)
