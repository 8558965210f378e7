"""A recipe and a mesh of GPUs -> all that is told of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from dmd2.config import Config
from dmd2.models.family import ModelFamily
from dmd2.plan.counts import (
    Layout,
    Measured,
    Traffic,
    checkpoint_bytes,
    flops,
    held,
    largest,
    learning,
    mean_calls,
    seconds,
    traffic,
)
from dmd2.plan.hardware import DISK_GB_S, GB, GPUS, TERA, USABLE, Gpu
from dmd2.plan.reference import REFERENCE_UNIT_S, Reference, reference
from dmd2.plan.rehearsal import Networks, Rehearsal, checkpointing, networks
from dmd2.training import memory


@dataclass(frozen=True)
class Choice:
    """One way to do it."""

    mesh: Layout
    resident: bool
    checkpointing: str
    gb: float
    seconds: float
    fits: bool


@dataclass(frozen=True)
class Plan:
    """All that is told, for programs."""

    config: Config
    gpu_name: str
    gpu: Gpu
    mesh: Layout
    price: float
    """Of a GPU for an hour."""
    weights: dict[str, int]
    """By network, and how many of them learn."""
    flops: dict[str, float]
    """Of an average step of the whole batch, by part."""
    memory: dict[str, float]
    """Bytes of a GPU by part."""
    resident: bool
    rows: int
    """At a time, through the networks of a GPU."""
    largest: int
    """Rows at a time that would fit, up to a GPU's share of the batch."""
    traffic: Traffic
    seconds: dict[str, float]
    """Of an average step."""
    checkpoint: int
    """Bytes of one."""
    choices: tuple[Choice, ...]
    reference: Reference | None

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
    def cost(self) -> float:
        return self.gpu_hours * self.price

    @property
    def memory_gb(self) -> float:
        return sum(self.memory.values()) / GB

    @property
    def fits(self) -> bool:
        return self.memory_gb <= USABLE * self.gpu.gb

    @property
    def checkpoint_s(self) -> float:
        """All machines write at once."""
        nodes = -(-self.mesh.gpus // self.mesh.per_node)
        return self.checkpoint / (DISK_GB_S * GB * nodes)

    @property
    def facts(self) -> dict[str, Any]:
        """The numbers a budget needs."""
        return {
            "gpus": self.mesh.gpus,
            "tflop_per_step": sum(self.flops.values()) / TERA,
            "memory_gb": self.memory_gb,
            "fits": self.fits,
            "largest_micro_batch": self.largest,
            "seconds_per_step": self.seconds_per_step,
            "hours": self.hours,
            "gpu_hours": self.gpu_hours,
            "cost": self.cost,
            "checkpoint_gb": self.checkpoint / GB,
            "checkpoint_s": self.checkpoint_s,
        }


MODES = ("none", "selective", "full")
SIZES = (1, 2)
"""Rows at which passes are run: what they keep is on a line through both."""


def planned(config: Config, fam: ModelFamily, gpu_name: str, mesh: Layout, price: float = 0.0) -> Plan:
    gpu, nets, sizes = GPUS[gpu_name], networks(config, fam), memory.sizes(config, fam)
    weights = _weights(config, nets)
    measured, reached = rehearsed(config, fam, nets)
    share = config.distill.batch // mesh.gpus
    rows = min(config.engine.micro_batch or share, share)

    def chosen(mesh: Layout) -> bool:
        """As `build.is_resident` would."""
        if config.engine.weights != "auto" or mesh.gpus == 1:
            return config.engine.weights != "sharded"
        found = memory.static(config, sizes, mesh.shards, True, memory.parts_of(config, mesh.shards))
        return sum(found.values()) <= memory.ROOM * gpu.gb * GB

    def timed(mesh: Layout, resident: bool, of: Measured) -> tuple[Traffic, dict[str, float]]:
        sent = traffic(config, fam, nets, mesh, resident, of.passes, rows)
        return sent, seconds(config, nets, mesh, gpu, of.passes, sent)

    def choice(mesh: Layout, resident: bool, how: str) -> Choice:
        of = measured[how]
        gb = sum(held(config, sizes, mesh, resident, of, rows).values()) / GB
        return Choice(
            mesh, resident, how, gb, sum(timed(mesh, resident, of)[1].values()), gb <= USABLE * gpu.gb
        )

    mine, resident = measured[config.engine.activation_checkpointing], chosen(mesh)
    sent, spent = timed(mesh, resident, mine)
    return Plan(
        config,
        gpu_name,
        gpu,
        mesh,
        price,
        weights,
        flops(mine.passes, mean_calls(config), config.distill.batch),
        held(config, sizes, mesh, resident, mine, rows),
        resident,
        rows,
        largest(config, sizes, mesh, resident, mine, gpu),
        sent,
        spent,
        checkpoint_bytes(config, nets),
        tuple(choice(*one) for one in _choices(mesh)),
        _compared(config, fam, nets, measured, reached) if config.recipe == "sdxl-4step" else None,
    )


def _choices(mesh: Layout) -> Iterator[tuple[Layout, bool, str]]:
    for shards in sorted({1, mesh.per_node, mesh.gpus}):
        for resident in (True, False) if shards > 1 else (True,):
            for how in MODES:
                yield Layout(mesh.gpus, mesh.per_node, shards), resident, how


def _compared(
    config: Config, fam: ModelFamily, nets: Networks, measured: Mapping[str, Measured], reached: set[int]
) -> Reference:
    """Ours on the GPUs of the reference, at its batch of two on each."""
    units, unit_calls, computing = reference(config, nets, measured["none"], reached)
    mesh, passes = Layout(64, 8, 8), measured["none"].passes
    sent = traffic(config, fam, nets, mesh, True, passes, config.distill.batch // mesh.gpus)
    ours = sum(seconds(config, nets, mesh, GPUS["a100-80gb"], passes, sent).values())
    return Reference(units, unit_calls, computing, unit_calls * REFERENCE_UNIT_S, ours_s=ours)


def rehearsed(config: Config, fam: ModelFamily, nets: Networks) -> tuple[dict[str, Measured], set[int]]:
    """The passes by checkpointing, the recipe's own at two sizes; and the weights that the GAN's gradient reaches, by id."""
    own = config.engine.activation_checkpointing
    found: dict[str, Measured] = {}
    for how in (own, *(mode for mode in MODES if mode != own)):
        with checkpointing(fam, nets, how):
            known = found[own].others if found else None
            high = Rehearsal(config, fam, nets, SIZES[1])
            passes = high.run(known)
            if how == own:
                reached = high.reached
                found[how] = Measured(Rehearsal(config, fam, nets, SIZES[0]).run(), passes)
            else:
                found[how] = Measured(passes)
    return found, reached


def _weights(config: Config, nets: Networks) -> dict[str, int]:
    learns = learning(config, nets)
    head = {"head": memory.count(nets.head)} if nets.head else {}
    critic = {} if config.distill.regression else {"critic": memory.count(nets.critic)}
    networks = {"teacher": memory.count(nets.teacher), "student": memory.count(nets.student)}
    return networks | critic | head | {"learn": sum(learns.values())}
