"""Collectives of a training step of SDXL, counted on the real shapes without the hardware.

`python -m tests.bench.collectives` runs real steps with a fake process group on tensors without data. The reference's scheme
is the published one: every layer with at least 3,000 weights is an FSDP unit, gathered in float32 for every pass and
resharded after it, and the discriminator processes real and fake samples in two passes. Counted are a step of the student's
turn, the first critic step after it and a later one, with rollouts that stop after one and after two steps; their mean is
that over all stops.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from dmd2 import recipes
from dmd2.batch import Batch, Conditioning
from dmd2.config import Config
from dmd2.io.local import write_text
from dmd2.models.family import make_family
from dmd2.models.stable import Stable, published_pipeline
from dmd2.parallel import sharding
from dmd2.parallel.ranks import World
from dmd2.rng import draw_shared
from dmd2.training import build, rollout
from dmd2.training.terms import Adversarial, CriticPass, Losses
from dmd2.training.trainer import DMD2Trainer

OUT = Path("runs/bench/engine.json")
MACHINE = 8
SMALLEST = 3_000
"""The smallest unit, in weights, in the reference's configuration of May 2024."""


class CollectiveCounter(TorchDispatchMode):
    """Counts collectives and their bytes; a collective counts with the size of its whole tensor."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            flat = [t for a in args for t in (a if isinstance(a, list) else [a]) if isinstance(t, Tensor)]
            if flat:
                name = func.overloadpacket.__name__.strip("_").removesuffix("_base")
                self.calls[name] += 1
                self.bytes[name] += max(t.numel() * t.element_size() for t in flat)
        return func(*args, **(kwargs or {}))


class Meshed(World):
    """A world whose mesh was made outside FakeTensorMode, where meshes need real tensors."""

    def device_mesh(self, shards: int) -> DeviceMesh | None:
        return MESH[0]


MESH: list[DeviceMesh] = []


def reference_units(network: nn.Module) -> list[nn.Module]:
    """Size-based units, from the leaves up: every module with at least SMALLEST weights that are in no smaller unit."""
    found: list[nn.Module] = []

    def left(module: nn.Module) -> int:
        own = sum(p.numel() for p in module.parameters(recurse=False))
        rest = own + sum(left(child) for child in module.children())
        if rest < SMALLEST or isinstance(module, nn.ModuleList):
            return rest
        found.append(module)
        return 0

    left(network)
    return [unit for unit in found if unit is not network]


@contextmanager
def without_data() -> Iterator[None]:
    """While inside, tensors are fake and weights are not loaded. Fake tensors cannot be changed in place, so modules get new
    parameters where torch would change them."""

    def replaced(module: nn.Module, convert: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        for part in module.modules():
            for name, p in part._parameters.items():
                if p is not None:
                    part._parameters[name] = nn.Parameter(convert(p.detach()), p.requires_grad)
        return module

    before = nn.Module._apply, sharding.broadcast_state_dict
    nn.Module._apply, sharding.broadcast_state_dict = replaced, lambda network, weights, world: None  # type: ignore[method-assign]
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            yield
    finally:
        nn.Module._apply, sharding.broadcast_state_dict = before  # type: ignore[method-assign]


def made(config: Config, family: Stable, world: World, reference: bool) -> DMD2Trainer:
    if not reference:
        trainer = build.trainer(config, family, {}, world)
        assert isinstance(trainer, DMD2Trainer)
        return trainer
    shard = sharding.shard

    def in_float32(
        network: nn.Module, units: Sequence[nn.Module], mesh: DeviceMesh, *_: Any, **__: Any
    ) -> None:
        frozen = not any(p.requires_grad for p in network.parameters())
        dtype = torch.bfloat16 if frozen else torch.float32
        shard(network, reference_units(network), mesh, dtype, resident=False)
        sharding.RESIDENT.add(network)  # so that gradients are reduced once per step, as in the reference

    sharding.shard = in_float32
    try:
        trainer = build.trainer(config, family, {}, world)
    finally:
        sharding.shard = shard
    assert isinstance(trainer, DMD2Trainer)
    trainer.passes = discriminator_passes_apart(trainer)
    return trainer


def discriminator_passes_apart(trainer: DMD2Trainer) -> list[CriticPass]:
    """As in the published scheme, real and fake samples go through the discriminator in passes of their own."""
    matching, gan = trainer.terms
    assert isinstance(gan, Adversarial)

    def fake_loss(fake: Batch, real: Batch) -> Losses:
        return {gan.name: gan.fake_loss(gan.critic.features(*gan._add_noise(fake)))}

    of_gan = [CriticPass("fake", fake_loss, False), CriticPass("real", gan._real_loss, False)]
    return [*of_gan, *matching.critic_passes()]


def counted(
    config: Config, family: Stable, world: World, reference: bool
) -> tuple[Counter[str], Counter[str]]:
    """Calls and bytes of an average step by kind of collective."""
    calls: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    turns = config.distill.critic_updates
    try:
        with without_data():
            trainer = made(config, family, world, reference)
            rows = config.engine.micro_batch
            cond = Conditioning(
                text=torch.zeros(rows, 77, 2048), pooled=torch.zeros(rows, 1280), size=torch.ones(rows, 6)
            )
            sample = Batch(torch.zeros(rows, *family.shape), cond, cond)
            trainer.step(sample, 0)  # the first step gathers more, once
            for stop in (1, 2):
                setattr(rollout, "draw_shared", lambda *_, stop=stop: stop)  # noqa: B010
                for step, share in ((0, 1 / turns), (1, 1 / turns), (2, 1 - 2 / turns)):
                    counter = CollectiveCounter()
                    with counter:
                        trainer.step(sample, step)
                    for kind in counter.calls:
                        calls[kind] += counter.calls[kind] * share / 2  # type: ignore[assignment]
                        sizes[kind] += counter.bytes[kind] * share / 2  # type: ignore[assignment]
    finally:
        setattr(rollout, "draw_shared", draw_shared)  # noqa: B010
    return calls, sizes


def main(ranks: tuple[int, ...] = (8, 64), recipe: str = "sdxl-4step") -> None:
    """Count, print a table, and add to runs/bench/engine.json.

    Args:
        ranks: World sizes, with 8 ranks per node.
        recipe: Name of the recipe.
    """
    table = Table(title=f"{recipe}: collectives of an average step, per rank")
    for column in ("processes", "scheme", "calls", "GB", "by kind"):
        table.add_column(column, justify="left" if column in ("scheme", "by kind") else "right")
    figures: dict[str, dict[str, float]] = {"collective_calls_ratio": {}, "collective_bytes_ratio": {}}
    for size in ranks:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
        world = Meshed(torch.device("cpu"), 0, size, 0, MACHINE, dist.group.WORLD)
        MESH[:] = [World.device_mesh(world, MACHINE)]  # type: ignore[list-item]
        found = {}
        for scheme in ("reference", "resident"):
            settings = ["engine.weights=resident" if scheme == "resident" else "engine.weights=sharded"]
            config = recipes.resolve(recipe, settings)
            family = make_family(config.family, published_pipeline("sdxl"))
            assert isinstance(family, Stable)
            calls, sizes = counted(config, family, world, scheme == "reference")
            found[scheme] = sum(calls.values()), sum(sizes.values()) / 1e9
            kinds = ", ".join(f"{k} {calls[k]:.0f} ({sizes[k] / 1e9:.1f} GB)" for k in sorted(calls))
            table.add_row(str(size), scheme, f"{found[scheme][0]:.0f}", f"{found[scheme][1]:.1f}", kinds)
        for index, name in enumerate(figures):
            figures[name][str(size)] = round(found["reference"][index] / found["resident"][index], 2)
        dist.destroy_process_group()
    Console(width=150).print(table)
    print(figures)
    before = json.loads(OUT.read_text()) if OUT.is_file() else {}
    write_text(OUT, json.dumps(before | figures, indent=1) + "\n")


if __name__ == "__main__":
    tyro.cli(main)
