"""From a recipe and a mesh of GPUs to a plan: what was counted, and what is predicted from it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from functools import cached_property, reduce
from itertools import product
from typing import Any, TypeVar

from dmd2.config import Config, Section
from dmd2.models.family import ModelFamily
from dmd2.plan.evaluation import Seconds, evaluation_seconds
from dmd2.plan.hardware import DISK_GB_S, GB, GPUS, HIGH, LIKELY, LOW, TERA, USABLE, Gpu
from dmd2.plan.passes import (
    ROLLOUT,
    FakeTrainer,
    PassCost,
    PassCosts,
    activation_checkpointing,
    fake_trainer,
    mean_calls,
    measure_passes,
    pass_names,
)
from dmd2.plan.published_scheme import PublishedScheme, compare_with_published
from dmd2.plan.step_costs import (
    MeasuredCosts,
    checkpoint_bytes,
    device_memory,
    flops,
    largest_micro_batch,
    seconds,
)
from dmd2.plan.traffic import MeshShape, Traffic, traffic
from dmd2.progress import Progress
from dmd2.training import memory, networks
from dmd2.training.optim import NETWORK


@dataclass(frozen=True)
class Alternative:
    """Another way to run the same recipe on the same GPUs."""

    mesh: MeshShape
    resident: bool
    checkpointing: str
    """The value of engine.activation_checkpointing."""
    gb: float
    """Memory of a GPU, in 1e9 bytes."""
    seconds: float
    """Predicted, of an average step."""
    fits: bool


@dataclass(frozen=True)
class Remedy:
    """Settings with which a recipe that does not fit runs on the same GPUs."""

    settings: tuple[str, ...]
    """Overrides of the recipe, `field=value`."""
    gb: float
    """Memory of a GPU, in 1e9 bytes."""
    seconds: float
    """Predicted, of an average step."""


@dataclass(frozen=True)
class Plan:
    """What a recipe takes on given GPUs. Weights, FLOPs, bytes and calls are counted; seconds and cost are predicted."""

    config: Config
    gpu_name: str
    gpu: Gpu
    mesh: MeshShape
    price: float
    """Of a GPU for an hour, in any currency."""
    weights: dict[str, int]
    """Numbers of weights by network, and of all that learn."""
    flops: dict[str, float]
    """Of an average step of the whole batch, by pass."""
    memory: dict[str, float]
    """Bytes of a GPU by part."""
    resident: bool
    """Whether every GPU keeps the gathered networks."""
    rows: int
    """Rows of a micro-batch on a GPU."""
    largest_micro_batch: int | None
    """The most rows at a time that fit, up to a GPU's rows of the batch; 0 if none fit; None if it was not looked for."""
    traffic: Traffic
    seconds: dict[str, float]
    """Predicted, of an average step, by activity."""
    range_s: tuple[float, float]
    """Predicted, of an average step: low and high."""
    checkpoint: int
    """Bytes of a checkpoint."""
    alternatives: tuple[Alternative, ...]
    remedies: tuple[Remedy, ...]
    """What makes it fit, the fastest first, if it does not fit as it is and they were looked for."""
    published: PublishedScheme | None
    """For the recipe whose published training time is known."""
    family: ModelFamily = field(compare=False)
    rollout: PassCost = field(compare=False)
    """A call of the student without gradient."""

    @property
    def seconds_per_step(self) -> float:
        return sum(self.seconds.values())

    @property
    def hours(self) -> float:
        return self.config.distill.steps * self.seconds_per_step / 3600

    @property
    def gpu_hours(self) -> float:
        return self.hours * self.mesh.gpus

    @property
    def gpu_hours_range(self) -> tuple[float, float]:
        """Low and high."""
        low, high = (one / self.seconds_per_step * self.gpu_hours for one in self.range_s)
        return low, high

    @property
    def cost(self) -> float:
        return self.gpu_hours * self.price

    @cached_property
    def evaluation(self) -> Seconds:
        """Predicted seconds of a GPU by part of the evaluation."""
        return evaluation_seconds(self.config, self.family, self.rollout, self.gpu)

    @property
    def evaluation_gpu_hours(self) -> float:
        """Predicted, of the first student of a teacher; later ones find the teacher's scores."""
        return sum(self.evaluation.values()) / 3600

    @property
    def memory_gb(self) -> float:
        return sum(self.memory.values()) / GB

    @property
    def fits(self) -> bool:
        return self.memory_gb <= USABLE * self.gpu.gb

    @property
    def checkpoint_s(self) -> float:
        """Predicted seconds to write a checkpoint, all machines at once."""
        nodes = -(-self.mesh.gpus // self.mesh.gpus_per_node)
        return self.checkpoint / (DISK_GB_S * GB * nodes)

    @property
    def host_memory(self) -> dict[str, float]:
        """Bytes of a machine's memory by part, beside what data loading and libraries take."""
        copies = min(self.mesh.gpus, self.mesh.gpus_per_node) / self.mesh.shards
        found = {"checkpoint that is written": copies * self.checkpoint}
        if self.config.engine.offload_teacher:
            found["teacher"] = copies * memory.compute_width(self.config) * self.weights["teacher"]
        return found

    @property
    def host_memory_gb(self) -> float:
        return sum(self.host_memory.values()) / GB

    @property
    def facts(self) -> dict[str, Any]:
        """The numbers for a budget, as JSON values."""
        return {
            "gpus": self.mesh.gpus,
            "tflop_per_step": sum(self.flops.values()) / TERA,
            "memory_gb": self.memory_gb,
            "fits": self.fits,
            "fits_with": " ".join(self.remedies[0].settings) if self.remedies else "",
            "largest_micro_batch": self.largest_micro_batch,
            "seconds_per_step": self.seconds_per_step,
            "hours": self.hours,
            "gpu_hours": self.gpu_hours,
            "gpu_hours_low": self.gpu_hours_range[0],
            "gpu_hours_high": self.gpu_hours_range[1],
            "cost": self.cost,
            "evaluation_gpu_hours": self.evaluation_gpu_hours,
            "checkpoint_gb": self.checkpoint / GB,
            "checkpoint_s": self.checkpoint_s,
            "host_memory_gb": self.host_memory_gb,
        }


CHECKPOINTING = ("none", "selective", "full")
"""The values of engine.activation_checkpointing."""
Check = Callable[[Plan], None]
"""Raises Refused for a plan that shall not be run."""


def make_plan(
    config: Config,
    fam: ModelFamily,
    gpu_name: str,
    mesh: MeshShape,
    price: float = 0.0,
    compared: Sequence[str] = CHECKPOINTING,
    check: Check = lambda plan: None,
) -> Plan:
    """Count and predict.

    Args:
        compared: Ways of activation checkpointing that the alternatives have; each takes as long to count as the recipe's own. Without
            any, the largest micro-batch is not looked for either.
        check: Called before the first pass is counted and after each, with the plan of a training whose other passes take nothing:
            what that plan exceeds, the whole one exceeds too.
    """
    planner = _Planner(config, fam, gpu_name, mesh, price)
    fake, own, rows = planner.fake, config.engine.activation_checkpointing, planner.rows
    check(planner.plan({}))
    hows = [how for how in compared if how != own]
    with Progress("plan", len(pass_names(fake)) * (1 + bool(compared) + len(hows)), "passes") as progress:

        def counted(costs: PassCosts) -> None:
            progress.advance()
            check(planner.plan(costs))

        def count(_: PassCosts) -> None:
            progress.advance()

        with activation_checkpointing(fake, own):
            costs = measure_passes(fake, rows, counted=counted)
            others = measure_passes(fake, 1 if rows > 1 else 2, counted=count) if compared else None
        made = planner.plan(costs)
        if others is None:
            return made
        measured: dict[str, PassCosts] = {own: costs}
        for how in hows:
            with activation_checkpointing(fake, how):
                measured[how] = measure_passes(fake, rows, costs, counted=count)
    return replace(
        made,
        largest_micro_batch=planner.largest_micro_batch(MeasuredCosts(costs, others)),
        alternatives=tuple(
            planner.alternative(mesh, resident, how, measured[how])
            for mesh, resident, how in _alternatives(mesh, compared)
        ),
        remedies=() if made.fits else tuple(remedies(planner, measured, others)),
        published=compare_with_published(fake, measured["none"]) if config.recipe == "sdxl-4step" else None,
    )


class _Planner:
    """From costs of passes to a plan. A pass without costs takes nothing."""

    def __init__(
        self, config: Config, fam: ModelFamily, gpu_name: str, mesh: MeshShape, price: float
    ) -> None:
        self.fam, self.gpu_name, self.mesh, self.price = fam, gpu_name, mesh, price
        self.gpu, self.fake = GPUS[gpu_name], fake_trainer(config, fam)
        self.sizes = self.fake.sizes
        self.weights, self.calls = _weights(self.fake), mean_calls(self.fake)
        self._settle(config)

    def _settle(self, config: Config) -> None:
        self.config = config
        self.resident = _is_resident(config, self.sizes, self.mesh, self.gpu)
        share = config.distill.batch // self.mesh.gpus
        self.rows = min(config.engine.micro_batch or share, share)

    def with_settings(self, settings: Sequence[str]) -> _Planner:
        """The planner of the recipe with other settings of optimizers and engine."""
        other = copy(self)
        config = reduce(_with_setting, settings, self.config)
        other.fake = replace(self.fake, config=config)
        states = memory.moment_bytes(config, self.fake.nets, self.fake.term_modules)
        other.sizes = replace(self.sizes, moments=states)
        other._settle(config)
        return other

    def plan(self, costs: PassCosts) -> Plan:
        costs = dict.fromkeys(pass_names(self.fake), PassCost(self.rows, 0)) | costs
        sent = traffic(self.fake, self.mesh, self.resident, costs, self.rows)
        spent, low, high = (
            seconds(self.fake, self.mesh, self.gpu, costs, sent, assumed) for assumed in (LIKELY, LOW, HIGH)
        )
        return Plan(
            self.config,
            self.gpu_name,
            self.gpu,
            self.mesh,
            self.price,
            self.weights,
            flops(costs, self.calls, self.config.distill.batch),
            self._memory(self.mesh, self.resident, costs),
            self.resident,
            self.rows,
            None,
            sent,
            spent,
            (sum(low.values()), sum(high.values())),
            checkpoint_bytes(self.fake),
            (),
            (),
            None,
            self.fam,
            costs[ROLLOUT],
        )

    def alternative(self, mesh: MeshShape, resident: bool, how: str, costs: PassCosts) -> Alternative:
        gb = memory.total_gb(self._memory(mesh, resident, costs))
        spent = self._average_step(mesh, resident, costs)
        return Alternative(mesh, resident, how, gb, spent, gb <= USABLE * self.gpu.gb)

    def remedy(self, settings: tuple[str, ...], costs: PassCosts) -> Remedy | None:
        """What the settings of this planner take; None if it does not fit."""
        gb = memory.total_gb(self._memory(self.mesh, self.resident, costs))
        if gb > USABLE * self.gpu.gb:
            return None
        return Remedy(settings, gb, self._average_step(self.mesh, self.resident, costs))

    def largest_micro_batch(self, measured: MeasuredCosts) -> int:
        return largest_micro_batch(self.fake, self.sizes, self.mesh, self.resident, measured, self.gpu)

    def _average_step(self, mesh: MeshShape, resident: bool, costs: PassCosts) -> float:
        """Its likely seconds."""
        sent = traffic(self.fake, mesh, resident, costs, self.rows)
        return sum(seconds(self.fake, mesh, self.gpu, costs, sent, LIKELY).values())

    def _memory(self, mesh: MeshShape, resident: bool, costs: PassCosts) -> dict[str, float]:
        return device_memory(self.fake, self.sizes, mesh, resident, MeasuredCosts(costs), self.rows)


MAX_REMEDIES = 5


def remedies(planner: _Planner, measured: Mapping[str, PassCosts], others: PassCosts | None) -> list[Remedy]:
    """The fastest combinations of settings that make a training fit, none of which contains another.

    Args:
        measured: By way of activation checkpointing, the costs of the passes for the planner's rows.
        others: For another number of rows, with the recipe's own way of activation checkpointing.
    """
    own = planner.config.engine.activation_checkpointing
    found: list[Remedy] = []
    combinations = (sum(chosen, ()) for chosen in product(*_remedial_settings(planner, list(measured))))
    for settings in sorted(combinations, key=len):
        if any(set(one.settings) <= set(settings) for one in found):
            continue
        changed = planner.with_settings(settings)
        how = changed.config.engine.activation_checkpointing
        costs = MeasuredCosts(measured[how], others if how == own else None).at(changed.rows)
        found += [one] if (one := changed.remedy(settings, costs)) else []
    return sorted(found, key=lambda one: one.seconds)[:MAX_REMEDIES]


def _remedial_settings(planner: _Planner, compared: Sequence[str]) -> list[list[tuple[str, ...]]]:
    """Settings that save memory: for each kind its values, the first of which changes nothing."""
    config, rows = planner.config, planner.rows
    settings, engine = config.distill, config.engine
    learning = {"student": settings.student} | ({} if settings.regression else {"critic": settings.critic})
    eight_bits = tuple(f"distill.{n}.moments=8bit" for n, one in learning.items() if one.moments != "8bit")
    hows = [how for how in compared if how != engine.activation_checkpointing]
    return [
        [(), *((f"engine.micro_batch={rows >> i}",) for i in range(1, rows.bit_length()))],
        [(), *((f"engine.activation_checkpointing={how}",) for how in hows)],
        [(), *([("engine.weights=sharded",)] if engine.weights != "sharded" else [])],
        [(), *([eight_bits] if eight_bits else [])],
        [(), *([] if settings.lora or engine.offload_teacher else [("engine.offload_teacher=True",)])],
    ]


S = TypeVar("S", bound=Section)


def _with_setting(section: S, setting: str) -> S:
    """A section with another value of a field, `field=value`, which may be in a section inside."""
    path, value = setting.split("=")
    head, _, rest = path.partition(".")
    inner = _with_setting(getattr(section, head), f"{rest}={value}") if rest else value
    return type(section).model_validate({**dict(section), head: inner})


def _is_resident(config: Config, sizes: memory.Sizes, mesh: MeshShape, gpu: Gpu) -> bool:
    """What `build.is_resident` decides on GPUs of this kind."""
    if config.engine.weights != "auto" or (mesh.gpus == 1 and not networks.gathers_alone(config)):
        return config.engine.weights != "sharded"
    micro_batches = memory.micro_batches(config, mesh.shards)
    needed = memory.total_gb(memory.static(config, sizes, mesh.shards, True, micro_batches))
    return needed <= memory.MAX_STATIC_FRACTION * gpu.gb


def _alternatives(mesh: MeshShape, compared: Sequence[str]) -> Iterator[tuple[MeshShape, bool, str]]:
    for shards in sorted({1, mesh.gpus_per_node, mesh.gpus}):
        for resident in (True, False) if shards > 1 else (True,):
            for how in compared:
                yield MeshShape(mesh.gpus, mesh.gpus_per_node, shards), resident, how


def _weights(fake: FakeTrainer) -> dict[str, int]:
    """Numbers of weights by network, and of all that learn."""
    added = {name: module for name, module in fake.critic_modules.items() if name != NETWORK}
    counted = {name: memory.num_weights(module) for name, module in (fake.nets.named() | added).items()}
    return counted | {"learn": sum(fake.trained.values())}
