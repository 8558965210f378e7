"""The benchmark's plain implementation of the algorithm comes to the same numbers as the engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dmd2 import recipes
from dmd2.batch import Batch, Conditioning
from dmd2.config import Config
from dmd2.models.family import ModelFamily, make_family
from dmd2.rng import Rng
from dmd2.training import build
from tests.bench.baseline import Baseline
from tests.conftest import ALONE
from tests.tiny_sdxl import SMALL

STEPS = 6
"""Two turns of the student."""


def test_on_an_edm_with_gan_it_ends_at_the_engines_weights(micro: Config) -> None:
    label = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])
    compare(micro, make_family(micro.family), Conditioning(label=label), Conditioning())


def test_on_an_sdxl_of_four_steps_with_guidance_and_gan_too(pipeline: Path) -> None:
    config = recipes.resolve("sdxl-4step-emoji", [*SMALL, "engine.micro_batch=0"])
    family = make_family(config.family, pipeline)
    compare(config, family, *family.condition(["a red square", "a green square", "a blue square", ""]))


def compare(config: Config, family: ModelFamily, cond: Conditioning, uncond: Conditioning) -> None:
    torch.manual_seed(0)
    teacher = family.network()
    for parameter in teacher.parameters():
        if not parameter.any():  # a branch that starts as nothing would hide what is behind it
            nn.init.normal_(parameter, std=0.1)
    engine: Any = build.trainer(config, family, teacher.state_dict(), ALONE)
    plain = Baseline(config, family, teacher.state_dict(), engine.critic.module["head"].state_dict())
    rows, device = range(config.distill.batch), torch.device("cpu")
    for step in range(STEPS):
        x = torch.randn(len(rows), *family.shape)
        mine, its = (
            trainer.step(Batch(x, cond, uncond, Rng.at(config.seed, step, rows, device)), step)
            for trainer in (plain, engine)
        )
        for name, value in mine.items():
            tolerance = 1e-4 if name.endswith("grad_norm") else 1e-5
            torch.testing.assert_close(
                torch.tensor(value), its[name], rtol=tolerance, atol=1e-7, msg=f"{name} of step {step}"
            )
    start = teacher.state_dict()
    for trainable, mine in ((engine.student, plain.students), (engine.critic, plain.critics)):
        its = [p.detach() for p in trainable.module.parameters()]
        assert apart(mine.parameters, its) < 1e-5
        assert apart(list(start.values()), its[: len(start)]) > 3e-4, "neither has learnt"
    (average,) = engine.student.emas
    assert apart(plain.students.emas[0], list(average.shadow.values())) < 1e-5


def apart(some: list[Any], others: list[Tensor]) -> float:
    """The distance of two lists of weights, as a share of the length of one."""
    distances = [(a.detach() - b).norm() for a, b in zip(some, others, strict=True)]
    return (torch.stack(distances).norm() / torch.stack([b.norm() for b in others]).norm()).item()
