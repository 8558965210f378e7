"""A process alone with an accelerator gathers its weights in bfloat16, as many processes do, instead of casting in autocast.

Shown on the CPU, with a mesh of one over gloo: it gives what autocast gives, within the noise of bfloat16, and resumes bit
for bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from dmd2 import recipes
from dmd2.config import Config
from dmd2.models.family import ModelFamily, make_family
from dmd2.parallel import sharding
from dmd2.parallel.ranks import World
from dmd2.plan import passes
from dmd2.training import build, checkpoint, networks
from dmd2.training.trainer import DMD2Trainer
from tests.conftest import ALONE, MICRO
from tests.tiny_sdxl import SMALL
from tests.worker import real


class MeshOfOne(World):
    """On the CPU what a single process on an accelerator is."""

    def device_mesh(self, shards: int) -> DeviceMesh:
        return self.mesh_of_one()


@pytest.fixture(scope="module")
def meshed() -> Iterator[World]:
    world = MeshOfOne(ALONE.device)
    yield world
    world.shutdown()


def test_a_mesh_of_one_leaves_no_process_group_behind() -> None:
    world = World(ALONE.device)
    world.mesh_of_one()
    world.shutdown()
    assert not dist.is_initialized()
    world.shutdown()


CASES = {
    "edm-digits": (*MICRO, "distill.critic_updates=2"),
    "sdxl-4step-emoji": (*SMALL, "distill.critic_updates=2"),
    "sdxl-4step-shared-emoji": (*SMALL, "distill.critic_updates=2"),
}
"""Recipe -> overrides."""


def made(recipe: str, pipeline: Path, *more: str) -> tuple[Config, ModelFamily]:
    config = recipes.resolve(recipe, (*CASES[recipe], *more))
    return config, make_family(config.family, pipeline if config.family.kind != "edm" else None)


def trainer_of(config: Config, family: ModelFamily, world: World) -> DMD2Trainer:
    torch.manual_seed(1)
    teacher = {name: 0.1 * torch.randn_like(p) for name, p in family.network().state_dict().items()}
    trainer = build.trainer(config, family, teacher, world)
    assert isinstance(trainer, DMD2Trainer)
    return trainer


def first_moments(trainer: DMD2Trainer) -> Tensor:
    """After the first step they are the clipped gradients, times one minus Adam's first beta."""
    objects = trainer.state()
    found = [
        sharding.local_tensor(value).flatten()
        for name in ("student.optimizer", "critic.optimizer")
        for key, value in objects[name].state_dict().items()
        if key.endswith(".exp_avg")
    ]
    return torch.cat(found)


@pytest.mark.parametrize(
    "recipe", [name if name == "edm-digits" else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
)
def test_losses_and_gradients_are_those_of_autocast_within_the_noise_of_bfloat16(
    recipe: str, pipeline: Path, meshed: World
) -> None:
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for name, dtype, world in (
        ("exact", "float32", ALONE),
        ("autocast", "bfloat16", ALONE),
        ("gathered", "bfloat16", meshed),
    ):
        config, family = made(recipe, pipeline, f"distill.dtype={dtype}")
        trainer = trainer_of(config, family, world)
        metrics = trainer.step(real(config, family, 0, world), 0)
        losses = torch.stack([v.detach() for k, v in metrics.items() if not k.endswith(("lr", "skipped"))])
        found[name] = losses, first_moments(trainer)
    (exact, _, gathered), gradients = zip(*found.values(), strict=True)
    assert ((gathered - exact).abs() < 0.02 * exact.abs() + 2e-4).all()
    exact, autocast, gathered = gradients
    assert (gathered - exact).norm() < 1.5 * (autocast - exact).norm() < 0.15 * exact.norm()


def test_a_teacher_in_the_hosts_memory_gives_the_same_bits(pipeline: Path, meshed: World) -> None:
    """FSDP gathers its units for their calls, as on a GPU; on the CPU there is nothing to copy."""
    found = []
    for on in (False, True):
        config, family = made(
            "edm-digits", pipeline, "distill.dtype=bfloat16", f"engine.offload_teacher={on}"
        )
        weights, mesh = family.network().state_dict(), meshed.mesh_of_one()
        nets = networks.on_device(config, family, weights, meshed, mesh, None, resident=True)
        assert sharding.is_sharded(nets.teacher.parameters()) == on
        trainer = trainer_of(config, family, meshed)
        found.append([trainer.step(real(config, family, step, meshed), step) for step in range(3)])
    assert found[0] == found[1]


def test_collectives_wait_longer_for_a_process_that_compiles(meshed: World) -> None:
    mesh = meshed.mesh_of_one()
    meshed.extend_collective_timeout(timedelta(hours=1), mesh)
    (group,) = mesh.get_all_groups()
    backend: Any = group._get_backend(meshed.device)
    assert backend.options._timeout == timedelta(hours=1)


def test_autocast_is_left_to_weights_that_are_gathered_in_float32(pipeline: Path) -> None:
    found = {}
    for how in ("same", "tf32"):
        config, family = made(
            "edm-digits", pipeline, "distill.dtype=bfloat16", f"distill.no_grad_dtype={how}"
        )
        fake = passes.fake_trainer(config, family)
        found[how] = passes.measure_passes(fake, 1)[passes.STUDENT]
    gathered, autocast = found["same"], found["tf32"]
    # What is left are the input, the time embedding and the output.
    assert gathered.cast_bytes < 0.05 * autocast.cast_bytes
    assert gathered.kernels < 0.8 * autocast.kernels
    assert gathered.flops == autocast.flops


@pytest.mark.parametrize(
    "recipe", ["edm-digits", pytest.param("sdxl-4step-shared-emoji", marks=pytest.mark.slow)]
)
def test_a_run_is_resumed_bit_for_bit(recipe: str, pipeline: Path, meshed: World, tmp_path: Path) -> None:
    """A low-rank student samples with merged weights, which no checkpoint has."""
    config, family = made(recipe, pipeline, "distill.dtype=bfloat16", "distill.student.ema=0.9")

    def steps(trainer: DMD2Trainer, some: range) -> list[dict[str, Tensor]]:
        return [trainer.step(real(config, family, step, meshed), step) for step in some]

    whole, first, second = (trainer_of(config, family, meshed) for _ in range(3))
    expected = steps(whole, range(6))[3:]
    steps(first, range(3))
    saved = checkpoint.Checkpoints(tmp_path, meshed, keep=1)
    saved.save_async(3, first.state())
    saved.wait_for_save()
    checkpoint.load(tmp_path, 3, second.state(), meshed)
    assert steps(second, range(3, 6)) == expected
    for name, thing in whole.state().items():
        theirs = second.state()[name].state_dict()
        for key, value in thing.state_dict().items():
            assert torch.equal(*(sharding.local_tensor(one) for one in (value, theirs[key]))), (name, key)
