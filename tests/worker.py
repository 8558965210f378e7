"""Trains a few steps on random samples with every mesh of its world size, and saves losses and weights.

`test_processes.py` starts it by torchrun, and calls `played` directly for the single process to compare with.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from dmd2 import recipes
from dmd2.batch import Batch, Conditioning
from dmd2.config import Config
from dmd2.models.family import ModelFamily, make_family
from dmd2.parallel import ranks, sharding
from dmd2.rng import Rng
from dmd2.training import build, checkpoint
from dmd2.training.trainer import DMD2Trainer
from tests.conftest import MICRO
from tests.tiny_sdxl import SMALL

TWO_STEPS = "distill.student_timesteps=999,499"
TURNS = "distill.critic_updates=2"
CASES = {
    "edm": ("edm-digits", (*MICRO, TURNS, "distill.student.ema=0.9"), 3),
    "parts": ("edm-digits", (*MICRO, TURNS, "engine.micro_batch=1"), 3),
    "fast": (
        "edm-digits",
        (*MICRO, TURNS, TWO_STEPS, "distill.continue_rollouts=True", "distill.gan.reuse_denoising_pass=True"),
        3,
    ),
    "sdxl": ("sdxl-4step-emoji", (*SMALL, TURNS, "engine.micro_batch=0"), 3),
    "shared-base": ("sdxl-4step-shared-emoji", (*SMALL, TURNS), 3),
    "bfloat16": ("edm-digits", (*MICRO, TURNS, "distill.dtype=bfloat16", "engine.micro_batch=1"), 3),
    "offload": ("edm-digits", (*MICRO, TURNS, "engine.offload_teacher=True"), 3),
    "8bit": (
        "edm-digits",
        (
            *MICRO,
            TURNS,
            "family.network.channels=64",
            "distill.student.moments=8bit",
            "distill.critic.moments=8bit",
        ),
        3,
    ),
    "bfloat16-tf32": (
        "edm-digits",
        (*MICRO, TURNS, "distill.dtype=bfloat16", "engine.micro_batch=1", "distill.no_grad_dtype=tf32"),
        3,
    ),
}
"""Recipe, overrides, steps: each divides passes, micro-batches or gradients in another way. The student learns at every second
step, so that a step of the critic alone lies between two of its own."""
WORLDS = {
    2: ("sdxl 2 resident", "sdxl 2 sharded", "shared-base 2 resident", "edm 1 resident", "edm 2 sharded", "fast 2 resident", "bfloat16-tf32 2 sharded",
        "offload 2 resident", "8bit 2 sharded"),
    4: (
        "edm 1 sharded", "edm 2 resident", "edm 2 sharded", "edm 4 resident", "edm 4 sharded", "parts 2 resident",
        "fast 4 sharded", "bfloat16 2 resident", "bfloat16 4 sharded", "bfloat16 1 resident",
    ),
}  # fmt: skip
"""{world size: "case, shards, engine.weights" of the runs}: DDP, HSDP and FSDP."""


def played(
    config: Config,
    family: ModelFamily,
    steps: int,
    world: ranks.World,
    prepare: Callable[[DMD2Trainer], None] = lambda trainer: None,
) -> dict[str, Tensor]:
    """Metrics of each step, and the trained and inference weights after it, from a teacher with random weights."""
    torch.manual_seed(1)
    teacher = {name: 0.1 * torch.randn_like(p) for name, p in family.network().state_dict().items()}
    trainer = build.trainer(config, family, teacher if world.is_main else {}, world)
    assert isinstance(trainer, DMD2Trainer)
    prepare(trainer)
    found: dict[str, Tensor] = {}
    for step in range(steps):
        for name, value in trainer.step(real(config, family, step, world), step).items():
            found[f"{step:02d} {name}"] = world.all_reduce_mean(value.detach().float().clone())
    for trainable in (trainer.student, trainer.critic):
        weights = sharding.gather_full_tensors(trainable.state()[trainable.name].state_dict(), world)
        found |= {f"{trainable.name}: {name}": w.clone() for name, w in weights.items()}
        averages = sharding.gather_full_tensors(trainable.inference_weights(), world)
        found |= {f"{trainable.name}, used: {name}": w.clone() for name, w in averages.items()}
    return found


def saved(root: Path, step: int, trainer: DMD2Trainer, world: ranks.World) -> dict[str, Tensor]:
    """Save a checkpoint, and return what it holds."""
    checkpoints = checkpoint.Checkpoints(root, world, keep=1)
    checkpoints.save_async(step, trainer.state())
    checkpoints.wait_for_save()
    return state_of(trainer, world)


def state_of(trainer: DMD2Trainer, world: ranks.World) -> dict[str, Tensor]:
    """All that a checkpoint holds, as full tensors."""
    objects = trainer.state().items()
    tensors = {f"{name}/{key}": value for name, thing in objects for key, value in thing.state_dict().items()}
    return sharding.gather_full_tensors(tensors, world)


def real(config: Config, family: ModelFamily, step: int, world: ranks.World) -> Batch:
    """The rows of a batch of random samples that this rank works on."""
    batch = config.distill.batch
    rows = world.local_rows(batch)
    drawn = Rng.at(7, step, range(batch), world.device)
    x, label = drawn.normal(*family.shape)[list(rows)], torch.tensor([row % 3 for row in rows])
    rng = Rng.at(config.seed, step, rows, world.device)
    if config.family.kind == "edm":
        return Batch(x, Conditioning(label=label), Conditioning(), rng)
    cond, uncond = family.condition([("a red square", "a green square", "a blue square")[i] for i in label])
    return Batch(x, cond, uncond, rng)


def resolved(case: str, pipeline: Path, *more: str) -> tuple[Config, ModelFamily, int]:
    recipe, overrides, steps = CASES[case]
    config = recipes.resolve(recipe, (*overrides, *more))
    return config, make_family(config.family, pipeline if config.family.kind != "edm" else None), steps


def main(out: Path, pipeline: Path) -> None:
    torch.set_num_threads(1)
    world = ranks.init_distributed()
    for run in WORLDS[world.size]:
        case, shards, weights = run.split()
        mesh = f"engine.shards={shards}", f"engine.weights={weights}"
        kept: list[DMD2Trainer] = []
        config, family, steps = resolved(case, pipeline, *mesh)
        found = played(config, family, steps, world, kept.append)
        if case == "8bit":
            found |= saved(out / "checkpoints", steps, kept[0], world)
        if world.is_main:
            torch.save(found, out / f"{run}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
