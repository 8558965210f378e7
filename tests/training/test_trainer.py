"""The DMD2 trainer: when student and critic are updated, and where it converges when the answer is known."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dmd2 import recipes
from dmd2.batch import Batch, Conditioning
from dmd2.config import Config, DmdConfig, EngineConfig, OptimizerConfig
from dmd2.data.loader import RawBatch
from dmd2.denoiser import Denoiser
from dmd2.diffusion import Diffusion, edm_preconditioning, karras_schedule
from dmd2.models.family import make_family
from dmd2.parallel.ranks import World
from dmd2.rng import Rng
from dmd2.training import build, optim
from dmd2.training.ema import Ema
from dmd2.training.terms import DistributionMatching
from dmd2.training.trainer import DMD2Trainer
from tests import worker
from tests.conftest import ALONE, MICRO, make_trainer, teacher_of
from tests.worker import resolved


def weights(module: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten().clone() for p in module.parameters()])


@pytest.fixture
def trainer(micro: Config) -> DMD2Trainer:
    torch.manual_seed(0)
    teacher = make_family(micro.family).network()
    for parameter in teacher.parameters():
        nn.init.normal_(parameter, std=0.1)
    return make_trainer(micro, teacher)


@pytest.fixture
def real() -> Batch:
    return Batch(torch.rand(8, 1, 8, 8) * 2 - 1, Conditioning(label=torch.arange(8) % 3), Conditioning())


def test_the_student_is_updated_every_fifth_step_from_the_first(trainer: DMD2Trainer, real: Batch) -> None:
    moved = []
    for step in range(11):
        before = weights(trainer.student.module)
        trainer.step(real, step)
        moved.append(not torch.equal(before, weights(trainer.student.module)))
    assert [step for step, m in enumerate(moved) if m] == [0, 5, 10]


def test_the_critic_is_updated_by_its_learning_rate_at_every_step(trainer: DMD2Trainer, real: Batch) -> None:
    """Adam's first steps move the weight that moves most by the learning rate, whatever the size of the gradient."""
    for step in range(3):
        before = weights(trainer.critic.module)
        trainer.step(real, step)
        moved = (weights(trainer.critic.module) - before).abs()
        assert moved.max().item() == pytest.approx(trainer.critic.lr(step), rel=0.05)
        assert moved.count_nonzero() > 0.9 * moved.numel()


def test_compiling_is_refused_where_there_is_no_compiler(
    micro: Config, monkeypatch: pytest.MonkeyPatch, refusal: Callable[..., str]
) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    engine = micro.engine.model_copy(update={"compile": "on"})
    network = make_family(micro.family).network()
    said = refusal(lambda: make_trainer(micro.model_copy(update={"engine": engine}), network))
    assert "engine.compile is on, and torch.compile needs a C compiler" in said


def test_units_are_compiled_by_themselves_on_gpus_where_a_compiler_is(
    micro: Config, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A device that is only named, for nothing is computed on it."""
    caplog.set_level("INFO")
    engine, gpu = micro.engine, World(torch.device("cuda"))
    exact = engine.model_copy(update={"deterministic": True})
    assert build.compiles(engine, gpu)
    assert "compile on" in caplog.text
    for settings, world, reason in ((engine, ALONE, "no GPU"), (exact, gpu, "engine.deterministic is on")):
        assert not build.compiles(settings, world)
        assert reason in caplog.text
    assert not build.compiles(engine.model_copy(update={"compile": "off"}), gpu)
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    assert not build.compiles(engine, gpu)
    assert "compile off: torch.compile needs a C compiler" in caplog.text


def test_configs_of_old_versions_say_whether_to_compile_by_a_truth_value(micro: Config) -> None:
    for old, new in ((False, "off"), (True, "on")):
        assert EngineConfig.model_validate({"compile": old}).compile == new


@pytest.mark.slow
def test_a_compiled_step_is_that_of_the_same_networks_without(micro: Config, real: Batch) -> None:
    network = make_family(micro.family).network()
    found = []
    for how in ("off", "on"):
        engine = micro.engine.model_copy(update={"compile": how})
        trainer = make_trainer(micro.model_copy(update={"engine": engine}), network)
        found.append([trainer.step(real, step) for step in range(2)])
    for plain, compiled in zip(*found, strict=True):
        torch.testing.assert_close(compiled, plain, rtol=1e-4, atol=1e-6)


def test_deterministic_mode_refuses_what_is_not_repeatable_and_ends_with_its_trainer(
    micro: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`put_` stands for the operations, most of them of CUDA, that nothing repeatable exists for."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    network = make_family(micro.family).network()
    engine = micro.engine.model_copy(update={"deterministic": True})
    make_trainer(micro.model_copy(update={"engine": engine}), network)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8", "without it, products on CUDA are refused"
    twice = torch.tensor([0, 0]), torch.tensor([1.0, 2.0])
    with pytest.raises(RuntimeError, match="does not have a deterministic implementation"):
        torch.zeros(1).put_(*twice)
    make_trainer(micro, network)
    torch.zeros(1).put_(*twice)


@pytest.mark.parametrize("native", [True, False])
def test_a_type_without_instructions_is_warned_about(
    native: bool, micro: Config, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    can = {"architecture": "x86_64", "avx512_bf16": native, "amx_bf16": False}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: can)
    network = make_family(micro.family).network()
    caplog.set_level("WARNING")
    make_trainer(micro, network)
    assert not caplog.messages
    lower = micro.distill.model_copy(update={"dtype": "bfloat16"})
    make_trainer(micro.model_copy(update={"distill": lower}), network)
    warning = "bfloat16 is emulated on this device, many times slower than float32: --distill.dtype float32"
    assert (warning in caplog.messages) is not native


def test_a_student_update_leaves_no_gradient_in_the_critic(
    trainer: DMD2Trainer, real: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    update = trainer.student.update
    monkeypatch.setattr(
        trainer.student,
        "update",
        lambda step: seen.append([p.grad for p in trainer.critic.module.parameters()]) or update(step),
    )
    trainer.step(real, 0)
    assert seen
    assert all(gradient is None for gradient in seen[0])


def test_a_critic_update_leaves_no_gradient_in_the_student(trainer: DMD2Trainer, real: Batch) -> None:
    trainer.step(real, 1)
    assert all(p.grad is None for p in trainer.student.module.parameters())


def test_the_teacher_never_changes(micro: Config, real: Batch) -> None:
    trainer = make_trainer(micro, make_family(micro.family).network())
    teacher = teacher_of(trainer)
    before = weights(teacher)
    for step in range(2):
        trainer.step(real, step)
    assert torch.equal(before, weights(teacher))
    assert not any(p.requires_grad for p in teacher.parameters())


class Waits(TorchDispatchMode):
    """Counts what makes the host wait for the device: numbers read from it, and shapes that depend on its numbers."""

    names: tuple[str, ...] = (
        "_local_scalar_dense",
        "nonzero",
        "equal",
        "masked_select",
        "unique",
        "bincount",
    )

    def __init__(self, *more: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[str] = []
        self.names += more

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.found += [name] if name in self.names else []
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        (
            "distill.student_timesteps=999,499",
            "distill.continue_rollouts=True",
            "distill.gan.reuse_denoising_pass=True",
        ),
    ],
)
def test_no_step_waits_for_the_device(micro: Config, real: Batch, overrides: tuple[str, ...]) -> None:
    config = recipes.resolve("edm-digits", (*MICRO, "distill.student.ema=0.9", *overrides))
    trainer = make_trainer(config, make_family(config.family).network())
    sample = replace(real, rng=Rng.at(0, 0, range(8), torch.device("cpu")))
    with Waits() as waits:
        for step in range(3):
            trainer.step(sample, step)
        assert not waits.found
        float(sample.x.sum())
    assert waits.found == ["_local_scalar_dense"], "the last line, to see that they are counted"


def test_a_step_of_sdxl_waits_for_the_device_neither_with_a_low_rank_student_nor_in_checkpointing(
    pipeline: Path,
) -> None:
    config, family, _ = resolved("shared-base", pipeline, "engine.activation_checkpointing=full")
    trainer = build.trainer(config, family, family.network().state_dict(), ALONE)
    sample = worker.real(config, family, 0, ALONE)
    with Waits() as waits:
        for step in range(2):
            trainer.step(sample, step)
    assert not waits.found


def test_stored_embeddings_are_read_without_a_copy_of_numbers_that_would_make_the_host_wait(
    pipeline: Path,
) -> None:
    """`lift_fresh` is what `torch.tensor` does with numbers of the host, which on a GPU waits for the copy."""
    _, family, _ = resolved("sdxl", pipeline)
    cond = family.condition(["a red square", "a cat"]).cond
    parts = tuple(cond[name].half() for name in ("text", "pooled"))
    raw = RawBatch(torch.zeros(2, 2, *family.shape), torch.zeros(2, dtype=torch.int64), ("", ""), parts)
    rng = Rng.at(0, 0, range(2), torch.device("cpu"))
    with Waits("lift_fresh") as waits:
        found = family.read(raw, rng)
        assert not waits.found
        torch.tensor([1.0])
    assert waits.found == ["lift_fresh"], "to see that they are counted"
    assert found.cond["size"].tolist() == [[32, 32, 0, 0, 32, 32]] * 2


def test_gradient_through_the_samples_equals_the_plain_backward(trainer: DMD2Trainer, real: Batch) -> None:
    kept: list[Tensor] = []

    def keep() -> None:
        kept.append(
            torch.cat([p.grad.flatten() for p in trainer.student.module.parameters() if p.grad is not None])
        )
        trainer.student.optimizer.zero_grad()

    torch.manual_seed(5)
    trainer._accumulate_student_gradient(trainer.generate(real, 0), weight=1)
    keep()
    torch.manual_seed(5)
    fake = trainer.generate(real, 0)
    torch.stack([term.student_loss(fake) for term in trainer.terms]).sum().backward()
    keep()
    torch.testing.assert_close(kept[0], kept[1], rtol=1e-5, atol=1e-8)


def test_warm_up_is_linear_and_then_constant() -> None:
    trainable = optim.trainable("student", nn.Linear(1, 1), OptimizerConfig(lr=1.0, warmup_steps=4), 8)
    assert [trainable.lr(step) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_the_final_learning_rate_is_reached_linearly_at_the_last_step() -> None:
    settings = OptimizerConfig(lr=1.0, warmup_steps=2, final_lr_ratio=0.5)
    trainable = optim.trainable("student", nn.Linear(1, 1), settings, 12)
    assert [trainable.lr(step) for step in (0, 1, 2, 7, 12)] == [0.5, 1.0, 1.0, 0.75, 0.5]


def test_gradient_clipping_limits_the_gradient_that_adam_receives() -> None:
    trainable = optim.trainable(
        "student", nn.Linear(1, 1, bias=False), OptimizerConfig(lr=1e-3, max_grad_norm=10), 8
    )
    (trainable.module(torch.full((1, 1), 1e4)).sum()).backward()
    assert trainable.update(0)["student/grad_norm"] == pytest.approx(1e4)
    state = next(iter(trainable.optimizer.state.values()))
    assert state["exp_avg"].norm().item() == pytest.approx(0.1 * 10, rel=1e-4)


def test_without_clipping_adam_receives_the_whole_gradient() -> None:
    settings = OptimizerConfig(lr=1e-3, max_grad_norm=0)
    trainable = optim.trainable("student", nn.Linear(1, 1, bias=False), settings, 8)
    (trainable.module(torch.full((1, 1), 1e4)).sum()).backward()
    trainable.update(0)
    state = next(iter(trainable.optimizer.state.values()))
    assert state["exp_avg"].norm().item() == pytest.approx(0.1 * 1e4, rel=1e-4)


def test_average_follows_the_closed_form() -> None:
    """Constant weights w after a start at 0: shadow = (1 - prod decays) w, decays (1+n)/(10+n) up to the limit."""
    network = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(network.weight)
    average = Ema(network, 0.3)
    nn.init.constant_(network.weight, 2.0)
    for _ in range(3):
        average.update(network)
    kept = 0.1 * (2 / 11) * 0.25
    torch.testing.assert_close(average.shadow["weight"], torch.full((1, 1), 2 * (1 - kept)))
    average.update(network)
    average.update(network)
    torch.testing.assert_close(
        average.shadow["weight"], torch.full((1, 1), 2 * (1 - kept * 0.3 * 0.3)), rtol=1e-6, atol=1e-7
    )


class Affine(nn.Module):
    """A denoiser of N(mean, std^2) in closed form, so that critic and student can be exact: D = posterior mean."""

    def __init__(self, mean: float, std: float) -> None:
        super().__init__()
        self.mean, self.log_std = nn.Parameter(torch.tensor(mean)), nn.Parameter(torch.tensor(std).log())

    def forward(self, x: Tensor, time: Tensor, cond: Conditioning, features_only: bool = False) -> Tensor:
        """Raw output F under EDM preconditioning with sigma_data 0.5."""
        sigma = (4 * time).exp().reshape(-1, 1, 1, 1)
        x_t = x * (sigma**2 + 0.25).sqrt()
        var = (2 * self.log_std).exp()
        posterior = self.mean + var / (var + sigma**2) * (x_t - self.mean)
        return (posterior - 0.25 / (sigma**2 + 0.25) * x_t) / (sigma * 0.5 / (sigma**2 + 0.25).sqrt())


class Mover(nn.Module):
    """A one-step student x = mean + std * eps, as the raw output at sigma_max."""

    def __init__(self) -> None:
        super().__init__()
        self.mean, self.log_std = nn.Parameter(torch.tensor(0.0)), nn.Parameter(torch.tensor(0.0))

    def forward(self, x: Tensor, time: Tensor, cond: Conditioning, features_only: bool = False) -> Tensor:
        sigma = (4 * time).exp().reshape(-1, 1, 1, 1)
        x_t = x * (sigma**2 + 0.25).sqrt()
        wanted = self.mean + self.log_std.exp() * x_t / 80
        return (wanted - 0.25 / (sigma**2 + 0.25) * x_t) / (sigma * 0.5 / (sigma**2 + 0.25).sqrt())


def test_the_trainer_on_a_gaussian_ends_at_the_teachers_mean_and_deviation() -> None:
    """Teacher N(2, 0.5^2), student N(0, 1) at the start. Only the DMD term."""
    from dmd2.sampler import generate

    diffusion = Diffusion(karras_schedule(), edm_preconditioning(0.5))
    teacher, student, critic = (Denoiser(n, diffusion) for n in (Affine(2.0, 0.5), Mover(), Affine(0.0, 1.0)))
    term = DistributionMatching(
        lambda x, timestep, s: teacher(x, timestep, s.cond), critic, build.timestep_range(DmdConfig(), 1000)
    )
    none = Conditioning()

    def make(real: Batch, step: int) -> Batch:
        return Batch(
            student(80 * torch.randn_like(real.x), torch.full((len(real.x),), 999), none), none, none
        )

    trainer = DMD2Trainer(
        optim.trainable("student", student.network, OptimizerConfig(lr=3e-2, weight_decay=0, ema=(0.95,)), 500),
        optim.trainable("critic", critic.network, OptimizerConfig(lr=3e-2, weight_decay=0), 500),
        [term], make, critic_updates=5,
    )  # fmt: skip
    real = Batch(torch.zeros(256, 1, 1, 1), none, none)
    for step in range(2500):
        torch.manual_seed(step)
        trainer.step(real, step)
    student.network.load_state_dict(trainer.student.inference_weights())
    x = generate(student, torch.randn(20_000, 1, 1, 1), none, (999,))
    assert x.mean().item() == pytest.approx(2.0, abs=0.05)
    assert x.std().item() == pytest.approx(0.5, abs=0.05)
