"""Moments of AdamW in eight bits: the mean is kept, a skipped step changes nothing, training goes as with float32, and resumes bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dmd2 import recipes
from dmd2.config import Config, OptimizerConfig
from dmd2.models.family import make_family
from dmd2.plan import hardware
from dmd2.training import build, checkpoint, memory, moments
from dmd2.training.optim import OptimizerState, Trainable, trainable
from dmd2.training.trainer import DMD2Trainer
from tests.conftest import ALONE, MICRO
from tests.worker import real

WIDE = (
    *MICRO,
    "family.network.channels=64",
    "distill.critic_updates=2",
    "distill.student.lr=1e-3",
    "distill.critic.lr=1e-3",
)
EIGHT_BITS = ("distill.student.moments=8bit", "distill.critic.moments=8bit")
GENERATOR = torch.Generator().manual_seed(1)
TAKEN = torch.zeros(())


def coded(values: Tensor, name: str) -> moments.State:
    state = moments.zeros(nn.Parameter(values), "8bit")
    moments.encode(values.view(-1, moments.BLOCK).clone(), [state], name, TAKEN, GENERATOR)
    return state


@pytest.mark.parametrize("name", moments.NAMES)
def test_a_value_is_stored_as_one_of_the_two_levels_beside_it(name: str) -> None:
    drawn = torch.randn(64, 64, generator=GENERATOR)
    values = drawn if name == "exp_avg" else drawn.square()
    state = coded(values, name)
    decoded = moments.decode([state], name).view_as(values)
    scale = state[name + moments.SCALE].repeat_interleave(moments.BLOCK, 1)
    # Levels of the uppermost decade are 0.9 / 64 and 0.9 / 128 apart, and lower ones nearer.
    apart = 0.9 / 64 if name == "exp_avg" else 0.9 / 128
    assert ((decoded - values).abs() <= 1.001 * apart * scale).all()
    assert state[name].dtype == torch.uint8


def test_the_mean_of_many_roundings_is_the_value() -> None:
    values = torch.linspace(0.3, 1, 64).repeat(64, 1)
    decoded = [moments.decode([coded(values, "exp_avg_sq")], "exp_avg_sq") for _ in range(30)]
    error = torch.stack(decoded).view(-1, 64).mean(0) - values[0]
    assert error.abs().max() < 5 * 0.9 / 128 / 2 / (30 * 64) ** 0.5


def test_a_second_moment_without_gradient_falls_by_its_decay() -> None:
    """By a thousandth per step, a seventh of the distance of two levels; the nearest level would always be the old one."""
    state = coded(torch.linspace(0.5, 1, 64).repeat(64, 1), "exp_avg_sq")
    for _ in range(300):
        moments.encode(0.999 * moments.decode([state], "exp_avg_sq"), [state], "exp_avg_sq", TAKEN, GENERATOR)
    fallen = moments.decode([state], "exp_avg_sq").mean() / 0.75
    assert float(fallen) == pytest.approx(0.999**300, rel=0.02)


def test_a_second_moment_is_never_rounded_to_zero_beside_larger_ones() -> None:
    values = torch.cat([torch.ones(64, 1), torch.full((64, 63), 1e-12)], 1)
    assert float(moments.decode([coded(values, "exp_avg_sq")], "exp_avg_sq").min()) == pytest.approx(1e-7)


def linear(precision: moments.Precision, clip: float = 1.0) -> Trainable:
    torch.manual_seed(0)
    settings = OptimizerConfig(lr=0.01, moments=precision, max_grad_norm=clip)
    return trainable("student", nn.Linear(128, 64), settings, 10, seed=3)


def update(student: Trainable, step: int, gradient: float = 1.0) -> dict[str, Tensor]:
    for p in student.module.parameters():
        p.grad = gradient * torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
    student.update(step)
    objects = student.state()
    return {f"{o}/{k}": v.clone() for o, one in objects.items() for k, v in one.state_dict().items()}


def test_a_step_with_a_gradient_that_is_not_finite_changes_no_bit() -> None:
    student = linear("8bit")
    before, after = update(student, 0), update(student, 1, float("nan"))
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_the_same_step_rounds_alike_and_another_does_not() -> None:
    one, same = update(linear("8bit"), 5), update(linear("8bit"), 5)
    assert all(torch.equal(same[name], value) for name, value in one.items())
    codes = []
    for seed in (3, 4):
        student = linear("8bit")
        student.seed = seed
        codes.append(update(student, 5)["student.optimizer/weight.exp_avg"])
    assert not torch.equal(*codes)


def test_small_weights_and_broken_rows_keep_float32() -> None:
    module = nn.ModuleDict({"small": nn.Linear(64, 63), "odd": nn.Linear(65, 64), "coded": nn.Linear(64, 64)})
    student = trainable("student", module, OptimizerConfig(lr=0.1, moments="8bit"), 10)
    kinds = {
        k: v.dtype
        for k, v in OptimizerState(student.optimizer).state_dict().items()
        if k.endswith("weight.exp_avg")
    }
    float32 = dict.fromkeys(("small.weight.exp_avg", "odd.weight.exp_avg"), torch.float32)
    assert kinds == float32 | {"coded.weight.exp_avg": torch.uint8}
    state = OptimizerState(student.optimizer).state_dict()
    held = sum(v.nbytes for k, v in state.items() if not k.endswith("step"))
    assert held == moments.num_bytes(module, "8bit")


def wide(*more: str) -> Config:
    return recipes.resolve("edm-digits", (*WIDE, *more))


def trainer_of(config: Config) -> DMD2Trainer:
    family = make_family(config.family)
    torch.manual_seed(1)
    teacher = {name: 0.1 * torch.randn_like(p) for name, p in family.network().state_dict().items()}
    trainer = build.trainer(config, family, teacher, ALONE)
    assert isinstance(trainer, DMD2Trainer)
    return trainer


def steps(trainer: DMD2Trainer, config: Config, some: range) -> list[dict[str, Tensor]]:
    family = make_family(config.family)
    return [trainer.step(real(config, family, step, ALONE), step) for step in some]


def test_a_distillation_goes_as_with_float32_moments() -> None:
    """Its distance to that after the same steps is small beside the way that both have gone."""
    ends = []
    for more in ((), EIGHT_BITS):
        trainer = trainer_of(config := wide(*more))
        begin = nn.utils.parameters_to_vector(trainer.critic.module.parameters()).detach().clone()
        steps(trainer, config, range(12))
        ends.append(nn.utils.parameters_to_vector(trainer.critic.module.parameters()).detach() - begin)
    assert 0 < (ends[1] - ends[0]).norm() < 0.1 * ends[0].norm()


def test_a_run_is_resumed_bit_for_bit(tmp_path: Path) -> None:
    config = wide(*EIGHT_BITS)
    whole, first, second = (trainer_of(config) for _ in range(3))
    expected = steps(whole, config, range(4))[2:]
    steps(first, config, range(2))
    saved = checkpoint.Checkpoints(tmp_path, ALONE, keep=1)
    saved.save_async(2, first.state())
    saved.wait_for_save()
    checkpoint.load(tmp_path, 2, second.state())
    for mine, theirs in zip(steps(second, config, range(2, 4)), expected, strict=True):
        assert all(torch.equal(mine[name], value) for name, value in theirs.items())


def test_the_memory_estimate_counts_the_bytes_that_the_optimizers_hold() -> None:
    config = wide(*EIGHT_BITS)
    trainer, sizes = trainer_of(config), build.sizes(config, make_family(config.family))
    held = sum(
        value.nbytes
        for one in (trainer.student, trainer.critic)
        for name, value in OptimizerState(one.optimizer).state_dict().items()
        if not name.endswith("step")
    )
    parts = memory.static(config, sizes, 1, resident=True, micro_batches=1)
    assert sum(size for name, size in parts.items() if name.endswith(": moments")) == held


class Moved(TorchDispatchMode):
    """Bytes that operators read and write."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.total += sum(t.nbytes for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor))
        return out


def test_the_plan_knows_what_an_update_moves() -> None:
    network = nn.Linear(512, 512, bias=False)
    student = trainable("student", network, OptimizerConfig(lr=0.1, moments="8bit"), 10)
    network.weight.grad = torch.randn_like(network.weight)
    with Moved() as moved:
        student.update(0)
    assert moved.total == pytest.approx(hardware.UPDATE_BYTES_8BIT * network.weight.numel(), rel=0.1)
