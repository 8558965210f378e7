"""What an average step takes, as a sum of passes: FLOPs, memory, messages, seconds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from dmd2.config import Config
from dmd2.errors import Refused
from dmd2.models.family import ModelFamily
from dmd2.parallel import sharding
from dmd2.plan.hardware import (
    CALL_S,
    EFFICIENCY,
    GB,
    KERNEL_S,
    LINK_EFFICIENCY,
    TERA,
    UPDATE_BYTES,
    USABLE,
    Gpu,
)
from dmd2.plan.rehearsal import (
    CRITIC,
    CRITIC_GAN,
    ROLLOUT,
    SCORE,
    STUDENT,
    STUDENT_GAN,
    TEACHER,
    Networks,
    Pass,
    Passes,
)
from dmd2.rng import draw_shared
from dmd2.training import memory


def calls(config: Config, students_turn: bool, stop: int) -> dict[str, int]:
    """How often a step makes each pass, for all of its rows, if its rollout ends at `stop`. With `continue_rollouts`, only the
    student's turn begins a rollout there."""
    settings = config.distill
    if settings.regression:
        return {STUDENT: 1}
    walks = settings.inputs == "rollout" and not (settings.continue_rollouts and not students_turn)
    found = {ROLLOUT: stop if walks else 0}
    if students_turn:
        found |= {STUDENT: 1} | ({TEACHER: 1, SCORE: 1} if settings.dmd else {})
        found |= {STUDENT_GAN: 1} if settings.gan else {}
    else:
        found[ROLLOUT] += 1
    found |= {CRITIC_GAN: 1} if settings.gan else {}
    return found | ({CRITIC: 1} if settings.dmd else {})


def calls_at(config: Config, step: int) -> dict[str, int]:
    """The same at a step of the run, with the stop that it draws."""
    settings = config.distill
    turn = step - step % settings.critic_updates if settings.continue_rollouts else step
    stop = draw_shared(config.seed, turn, len(settings.student_timesteps))
    return calls(config, step % settings.critic_updates == 0, stop)


def mean_calls(config: Config) -> dict[str, float]:
    """Of an average step, over turns and stops."""
    updates, stops = config.distill.critic_updates, range(len(config.distill.student_timesteps))
    turns = [(True, 1 / updates), (False, 1 - 1 / updates)]
    total: dict[str, float] = {}
    for turn, share in turns:
        for stop in stops:
            for name, count in calls(config, turn, stop).items():
                total[name] = total.get(name, 0) + share * count / len(stops)
    return total


def flops(passes: Passes, often: Mapping[str, float], rows: int) -> dict[str, float]:
    """FLOPs by part, of so many rows."""
    return {name: count * passes[name].at(rows).flops for name, count in often.items() if count}


@dataclass(frozen=True)
class Layout:
    """GPUs, and how they divide the weights."""

    gpus: int
    per_node: int
    shards: int

    @property
    def replicas(self) -> int:
        return self.gpus // self.shards

    def __str__(self) -> str:
        return f"{self.replicas} x {self.shards}"


def layout(config: Config, nodes: int, per_node: int) -> Layout:
    """The mesh that the recipe's engine makes of so many GPUs."""
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
    return Layout(gpus, per_node, shards)


@dataclass(frozen=True)
class Measured:
    """Passes at one number of rows, and at another one if the line between is known."""

    passes: Passes
    others: Passes | None = None

    def at(self, rows: int) -> Passes:
        return {
            name: one.at(rows, self.others[name] if self.others else None)
            for name, one in self.passes.items()
        }


def activations(passes: Passes, apart: bool = True) -> float:
    """Bytes at the fullest moment of a step: the student's graph waits while the terms look at its samples. `apart` leaves
    out gradients of weights."""
    student = passes[STUDENT]
    meanwhile = [passes[n].peak for n in (TEACHER, SCORE, STUDENT_GAN) if n in passes]
    before = 0 if apart else memory.FLOAT32 * (passes[CRITIC_GAN].reached if CRITIC_GAN in passes else 0)
    own = [n for n in (STUDENT, CRITIC_GAN, CRITIC) if n in passes]
    moments = [passes[n].peak if apart else passes[n].with_gradients for n in own]
    if CRITIC in passes and before:
        moments.append(int(before) + passes[CRITIC].peak)
    return max(student.kept + max(meanwhile, default=0), *moments)


def held(
    config: Config, sizes: memory.Sizes, mesh: Layout, resident: bool, measured: Measured, rows: int
) -> dict[str, float]:
    """Bytes by part, at the fullest moment of a step with so many rows at a time."""
    passes, parts = measured.at(rows), -(-config.distill.batch // mesh.gpus // rows)
    reached = passes[CRITIC_GAN].reached if CRITIC_GAN in passes else None
    found = memory.static(config, sizes, mesh.shards, resident, parts, reached)
    apart = mesh.gpus > 1
    if not apart:
        found.pop("gradients on their way", None)
        if memory.config_width(config) == memory.FLOAT32 and parts == 1:
            gradients = found.pop("gradients", 0.0)
            return found | {"activations and gradients": max(activations(passes, apart=False), gradients)}
    return found | {"activations": activations(passes)}


def largest(
    config: Config, sizes: memory.Sizes, mesh: Layout, resident: bool, measured: Measured, gpu: Gpu
) -> int:
    """Rows at a time that fit on a GPU, up to its share of the batch; 0 if none do."""
    share = config.distill.batch // mesh.gpus
    fit = (
        rows
        for rows in range(share, 0, -1)
        if sum(held(config, sizes, mesh, resident, measured, rows).values()) <= USABLE * gpu.gb * GB
    )
    return next(fit, 0)


Traffic = dict[str, tuple[float, float]]
"""Kind of collective -> calls, and bytes that a GPU receives, per average step."""
GATHER, SCATTER, REDUCE = "all-gather", "reduce-scatter", "all-reduce"


def owned(fam: ModelFamily, network: nn.Module, outermost: bool) -> dict[str, int]:
    """Weights that learn by unit, named by its place in the family's list; "" has what is left. None are left out."""
    units, mine, seen = list(fam.blocks(network)), {}, set()
    used = {id(unit) for unit in (sharding.outermost(units) if outermost else units)}
    named = [(str(i), unit) for i, unit in enumerate(units) if id(unit) in used]
    for name, unit in [*named, ("", network)]:
        fresh = [p for p in unit.parameters() if id(p) not in seen]
        seen |= {id(p) for p in fresh}
        mine[name] = sum(p.numel() for p in fresh if p.requires_grad)
    return {name: size for name, size in mine.items() if size}


def traffic(
    config: Config, fam: ModelFamily, nets: Networks, mesh: Layout, resident: bool, passes: Passes, rows: int
) -> Traffic:
    """What an average step sends. Resident networks are gathered, and their gradients added up, once per unit and update;
    others are gathered in each direction of each pass, and their gradients added up in each backward pass."""
    if mesh.gpus == 1:
        return {}
    settings, width = config.distill, memory.config_width(config)
    parts = -(-settings.batch // mesh.gpus // rows)
    rates = {"student": 1.0 if settings.regression else 1 / settings.critic_updates}
    rates |= {} if settings.regression else {"critic": 1.0}
    total, low_rank = _Sum(mesh), settings.lora is not None
    shared = bool(settings.lora and settings.lora.shared_base)
    whole = {"student": resident or low_rank, "critic": resident or shared, "teacher": resident or low_rank}
    for name, rate in rates.items():
        if whole[name]:
            units = owned(fam, getattr(nets, name), outermost=True).values()
            total.gather(list(units), width, rate)
            total.reduce(list(units), width, rate)
    if nets.head:
        size, reductions = (
            [memory.count(nets.head)],
            2 if settings.gan and settings.gan.reuse_denoising_pass else 1,
        )
        total.gather(size, memory.FLOAT32, 1)
        total.reduce(size, memory.FLOAT32, reductions)
    sizes = owned(fam, nets.critic, outermost=False)
    for name, often in mean_calls(config).items():
        if not whole[OF[name]]:
            one = passes[name]
            entered = [sizes[unit] for unit in (*one.entered, "") if unit in sizes]
            total.gather(entered, width, often * parts * (2 if one.backward else 1))
            total.reduce(entered, width, often * parts * bool(one.reached))
    norms = sum(rates.values()) if mesh.shards > 1 else 0
    total.add(REDUCE, norms, norms * memory.FLOAT32)
    return {kind: sums for kind, sums in total.sums.items() if sums[0]}


OF = {ROLLOUT: "student", STUDENT: "student", TEACHER: "teacher"}
OF |= dict.fromkeys((SCORE, STUDENT_GAN, CRITIC_GAN, CRITIC), "critic")
"""Whose passes they are."""


class _Sum:
    """Of calls and bytes by kind."""

    def __init__(self, mesh: Layout) -> None:
        self.mesh, self.sums = mesh, dict.fromkeys((GATHER, SCATTER, REDUCE), (0.0, 0.0))
        self.others = 1 - 1 / mesh.shards
        """Share of a tensor that other processes have."""

    def add(self, kind: str, calls: float, size: float) -> None:
        before = self.sums[kind]
        self.sums[kind] = before[0] + calls, before[1] + size

    def gather(self, units: Sequence[int], width: int, times: float) -> None:
        """Weights, each unit so many times."""
        if self.mesh.shards > 1:
            self.add(GATHER, times * len(units), times * sum(units) * width * self.others)

    def reduce(self, units: Sequence[int], width: int, times: float) -> None:
        """Gradients: among the shards as they come, then among the replicas in float32, there and back."""
        if self.mesh.shards > 1:
            self.add(SCATTER, times * len(units), times * sum(units) * width * self.others)
        if self.mesh.replicas > 1:
            size = 2 * (1 - 1 / self.mesh.replicas) * memory.FLOAT32 * sum(units) / self.mesh.shards
            self.add(REDUCE, times * len(units), times * size)


def seconds(
    config: Config, nets: Networks, mesh: Layout, gpu: Gpu, passes: Passes, sent: Traffic
) -> dict[str, float]:
    """Of an average step, by what takes them; nothing is assumed to overlap."""
    share = config.distill.batch // mesh.gpus
    rows = min(config.engine.micro_batch or share, share)
    computing = sum(
        often * share / rows * _computing(passes[name].at(rows), config, gpu)
        for name, often in mean_calls(config).items()
    )
    inside = mesh.shards <= mesh.per_node
    link = {GATHER: inside, SCATTER: inside, REDUCE: mesh.gpus <= mesh.per_node}
    sending = sum(
        size / (LINK_EFFICIENCY * (gpu.inside_gb_s if link[kind] else gpu.between_gb_s) * GB) + calls * CALL_S
        for kind, (calls, size) in sent.items()
    )
    return {"computing": computing, "sending": sending, "updating": _updating(config, nets, mesh, gpu)}


def _computing(one: Pass, config: Config, gpu: Gpu) -> float:
    """Of the device or of the host, whichever is longer. In float32, PyTorch lets convolutions use TF32, and matrix
    products not."""
    if config.distill.dtype == "bfloat16":
        rated = one.flops / gpu.bf16
    else:
        rated = one.convolutions / gpu.tf32 + (one.flops - one.convolutions) / gpu.fp32
    return max(rated / (EFFICIENCY * TERA), one.kernels * KERNEL_S)


def _updating(config: Config, nets: Networks, mesh: Layout, gpu: Gpu) -> float:
    settings = config.distill
    rates = {"student": 1.0 if settings.regression else 1 / settings.critic_updates, "critic": 1.0}
    sizes = learning(config, nets)
    moved = sum(
        rates[name] * sizes[name] * (UPDATE_BYTES + 12 * len(trainable.ema))
        for name, trainable in (("student", settings.student), ("critic", settings.critic))
    )
    return moved / mesh.shards / (gpu.memory_gb_s * GB)


def learning(config: Config, nets: Networks) -> dict[str, int]:
    """Weights that learn, by trainable; the critic's with its head."""
    mine = {
        name: sum(p.numel() for p in network.parameters() if p.requires_grad)
        for name, network in (("student", nets.student), ("critic", nets.critic))
    }
    mine["critic"] += memory.count(nets.head) if nets.head else 0
    return mine | ({"critic": 0} if config.distill.regression else {})


def checkpoint_bytes(config: Config, nets: Networks) -> int:
    """Masters, moments and averages, in float32."""
    settings, sizes = config.distill, learning(config, nets)
    return memory.FLOAT32 * sum(
        sizes[name] * (3 + len(trainable.ema))
        for name, trainable in (("student", settings.student), ("critic", settings.critic))
    )
