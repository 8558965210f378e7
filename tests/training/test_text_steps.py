"""Parity with the formulas of DMD2 for latent diffusion, written out here in float64; and micro-batches."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dmd2.batch import Batch, Conditioning
from dmd2.config import OptimizerConfig, StableConfig
from dmd2.denoiser import Denoiser, classifier_free_guidance
from dmd2.diffusion import Diffusion, eps_prediction, scaled_linear_schedule
from dmd2.models.family import make_family
from dmd2.recipes import spaced_timesteps
from dmd2.sampler import Timesteps, backward_simulation, denoise_real, generate, student_inputs
from dmd2.training import losses, optim
from dmd2.training.optim import Trainable, TrainableWeights
from dmd2.training.terms import CriticPass, Losses
from dmd2.training.trainer import DMD2Trainer, RegressionTrainer

PROCESS = Diffusion(scaled_linear_schedule(), eps_prediction)
TIMESTEPS = (0, 20, 249, 399, 499, 749, 980, 999)
ALPHA_BAR = (0.99915, 0.98131, 0.67543, 0.42609, 0.27767, 0.05662, 0.00584, 0.00466)


class Toy(nn.Module):
    """eps = weight * x + label + time / 1000, so that the output depends on every input."""

    def __init__(self, weight: float = 0.7) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight))

    def forward(self, x: Tensor, time: Tensor, cond: Conditioning, features_only: bool = False) -> Tensor:
        return self.weight * x + (cond["label"] + time / 1000).reshape(-1, 1, 1, 1)


def conditioning(value: float, count: int) -> Conditioning:
    return Conditioning(label=torch.full((count,), value))


def x0(x_t: Tensor, eps: Tensor, timestep: int) -> Tensor:
    """(x_t - sqrt(1 - alpha_bar) eps) / sqrt(alpha_bar), in float64."""
    beta = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alpha_bar = torch.cumprod(1 - beta, 0)[timestep]
    return (x_t.double() - (1 - alpha_bar).sqrt() * eps.double()) / alpha_bar.sqrt()


@pytest.mark.parametrize(("timestep", "alpha_bar"), list(zip(TIMESTEPS, ALPHA_BAR, strict=True)))
def test_the_noise_levels_are_the_published_ones(timestep: int, alpha_bar: float) -> None:
    assert round(PROCESS.schedule.alpha[timestep].item() ** 2, 5) == alpha_bar


@pytest.mark.parametrize("timestep", TIMESTEPS)
def test_x0_in_float32_is_that_in_float64(timestep: int) -> None:
    x_t, eps = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    ours, exact = PROCESS.to_x0(eps, x_t, torch.tensor([timestep, timestep])), x0(x_t, eps, timestep)
    assert ours.dtype == torch.float32
    assert ((ours - exact).abs().max() / exact.abs().max()).item() < 1e-6


@pytest.mark.parametrize("scale", [1.75, 6.0, 8.0])
def test_guidance_on_x0_is_guidance_on_eps(scale: float) -> None:
    denoiser, x_t = Denoiser(Toy(), PROCESS), torch.randn(3, 4, 2, 2)
    sample = Batch(x_t, conditioning(0.5, 3), conditioning(-0.25, 3))
    timestep = torch.tensor([20, 499, 980])
    ours = classifier_free_guidance(denoiser, scale)(x_t, timestep, sample)
    conditional, uncond = (denoiser.output(x_t, timestep, c) for c in (sample.cond, sample.uncond))
    eps = uncond + scale * (conditional - uncond)
    for row, index in enumerate(timestep.tolist()):
        torch.testing.assert_close(ours[row].double(), x0(x_t[row], eps[row], index), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("count", "timesteps"),
    [
        (1, (999,)),
        (2, (999, 499)),
        (3, (999, 666, 333)),
        (4, (999, 749, 499, 249)),
        (8, (999, 874, 749, 624, 499, 374, 249, 124)),
    ],
)
def test_steps_are_at_the_published_timesteps(count: int, timesteps: Timesteps) -> None:
    assert spaced_timesteps(count) == timesteps


def test_a_chain_of_four_steps_is_what_training_rolls_out_for_the_same_noises(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    student, timesteps, cond = Denoiser(Toy(), PROCESS), spaced_timesteps(4), conditioning(0.3, 2)
    noises = [torch.randn(2, 4, 4, 4) for _ in range(4)]

    def between(rest: list[Tensor]) -> list[Tensor]:
        drawn = iter(rest)
        monkeypatch.setattr(torch, "randn_like", lambda x: next(drawn))
        return rest

    between(noises[1:])
    chain = generate(student, noises[0], cond, timesteps, lambda x: torch.randn_like(x))
    x = noises[0]
    predictions: list[Tensor] = []
    for index, timestep in enumerate(timesteps):  # by hand
        if index:
            alpha, sigma = PROCESS.schedule.alpha[timestep], PROCESS.schedule.sigma[timestep]
            x = (alpha * predictions[-1] + sigma * noises[index]).float()
        eps = student.output(x, torch.tensor([timestep, timestep]), cond)
        predictions.append(x0(x, eps, timestep))
    torch.testing.assert_close(chain.double(), predictions[-1], rtol=1e-4, atol=1e-3)
    for stop in range(4):
        drawn = iter(noises[1:])
        inputs = list(student_inputs(student, noises[0], cond, timesteps, lambda x, drawn=drawn: next(drawn)))  # type: ignore[misc]
        torch.testing.assert_close(
            student(*inputs[stop], cond).double(), predictions[stop], rtol=1e-4, atol=1e-3
        )
    assert backward_simulation(student, noises[0], cond, timesteps, 0).requires_grad


@pytest.mark.parametrize("stop", range(4))
def test_a_rollout_of_a_real_network_is_its_chain_up_to_the_step_where_it_stops(
    stop: int, pipeline: Path
) -> None:
    """The same seed draws the same noises, and only the last step has a gradient."""
    fam = make_family(StableConfig(kind="sdxl", resolution=32, vae_stride=2), pipeline)
    network = fam.network()
    network.load_state_dict(fam.weights(pipeline))
    student, timesteps = fam.denoiser(network), spaced_timesteps(4)
    eps, cond = torch.randn(2, *fam.shape), fam.condition(["a red square", "a blue square"]).cond
    torch.manual_seed(3)
    sampled = generate(student, eps, cond, timesteps[: stop + 1])
    torch.manual_seed(3)
    rolled = backward_simulation(student, eps, cond, timesteps, stop)
    assert torch.equal(rolled, sampled)
    assert rolled.requires_grad


def test_one_step_at_the_last_timestep_reads_pure_noise_with_its_coefficients() -> None:
    student, eps, cond = Denoiser(Toy(), PROCESS), torch.randn(2, 4, 2, 2), conditioning(0.1, 2)
    out = student.output(eps, torch.tensor([999, 999]), cond)
    torch.testing.assert_close(
        generate(student, eps, cond, (999,)).double(), x0(eps, out, 999), rtol=1e-5, atol=1e-4
    )


def test_one_step_at_timestep_399_reads_pure_noise_with_its_coefficients() -> None:
    student, eps, cond = Denoiser(Toy(), PROCESS), torch.randn(2, 4, 2, 2), conditioning(0.1, 2)
    out = student.output(eps, torch.tensor([399, 399]), cond)
    torch.testing.assert_close(
        generate(student, eps, cond, (399,)), (eps - 0.7576 * out) / 0.6528, rtol=1e-3, atol=1e-3
    )


def test_noised_real_samples_are_the_other_input_and_the_noisiest_is_pure_noise() -> None:
    class Seen(Toy):
        def forward(self, x: Tensor, time: Tensor, cond: Conditioning, features_only: bool = False) -> Tensor:
            self.seen = x, time
            return super().forward(x, time, cond)

    torch.manual_seed(0)
    network, real = (
        Seen(),
        Batch(torch.full((400, 1, 2, 2), 50.0), conditioning(0, 400), conditioning(0, 400)),
    )
    denoise_real(Denoiser(network, PROCESS), real, (999, 499))
    x, time = network.seen
    assert set(time.tolist()) == {999.0, 499.0}
    mean = x.mean(dim=(1, 2, 3))
    assert mean[time == 999].abs().max() < 3
    torch.testing.assert_close(
        mean[time == 499].mean(), 50 * PROCESS.schedule.alpha[499].float(), rtol=0.01, atol=0
    )


class Pull:
    """A term without random numbers: the loss of the student is the distance of its samples to 2."""

    name = "pull"

    def __init__(self, critic: nn.Linear) -> None:
        self.critic = critic

    def student_loss(self, fake: Batch) -> Tensor:
        return (fake.x - 2).square().mean()

    def critic_passes(self) -> list[CriticPass]:
        return [CriticPass("pull", self._critic_losses, reaches_output=True)]

    def _critic_losses(self, fake: Batch, real: Batch) -> Losses:
        loss = (self.critic(fake.x).mean((1, 2, 3)) - real.x.mean((1, 2, 3))).square().mean()
        return {self.name: loss}


@pytest.fixture
def gradient_descent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps along the gradient in place of AdamW's, so that the weights show it."""

    @torch.no_grad()
    def descend(group: dict[str, Any], shards: optim.Shards, skipped: Tensor, generator: object) -> None:
        assert not skipped
        for weight, _ in shards:
            assert weight.grad is not None
            weight.sub_(group["lr"] * weight.grad)

    monkeypatch.setattr(optim, "adamw_step", descend)


@pytest.mark.usefixtures("gradient_descent")
@pytest.mark.parametrize("micro_batch", [1, 2, 4, 5])
def test_gradients_of_micro_batches_add_up_to_that_of_the_batch(micro_batch: int) -> None:
    def train(micro_batch: int) -> list[Tensor]:
        torch.manual_seed(0)
        student, critic = Toy(), nn.Linear(2, 2)
        trainables = [
            Trainable(n, m, torch.optim.AdamW(m.parameters()), lambda step: 0.1, 1e9)
            for n, m in (("student", student), ("critic", critic))
        ]

        def sample(real: Batch, step: int) -> Batch:
            return replace(real, x=student(real.x, torch.zeros(len(real.x)), real.cond))

        trainer = DMD2Trainer(trainables[0], trainables[1], [Pull(critic)], sample, 1, micro_batch)
        real = Batch(torch.randn(5, 1, 2, 2), conditioning(0.5, 5), conditioning(0, 5))
        metrics = [trainer.step(real, step) for step in range(3)]
        assert {"student/pull", "critic/pull"} < metrics[0].keys()
        return [
            *student.parameters(),
            *critic.parameters(),
            metrics[2]["student/pull"],
            metrics[2]["critic/pull"],
        ]

    for ours, whole in zip(train(micro_batch), train(0), strict=True):
        torch.testing.assert_close(ours, whole)


class Matched:
    """The losses of DMD, with given noise and timestep for each sample."""

    name = "matched"

    def __init__(self, teacher: Denoiser, critic: Denoiser, noises: dict[float, tuple[Tensor, int]]) -> None:
        self.teacher, self.critic, self.noises = teacher, critic, noises

    def noised(self, fake: Batch) -> tuple[Tensor, Tensor]:
        eps, timestep = zip(*(self.noises[label] for label in fake.cond["label"].tolist()), strict=True)
        return PROCESS.add_noise(fake.x, torch.stack(eps), torch.tensor(timestep)), torch.tensor(timestep)

    def student_loss(self, fake: Batch) -> Tensor:
        with torch.no_grad():
            x_t, timestep = self.noised(fake)
            teacher, critic = (net(x_t, timestep, fake.cond) for net in (self.teacher, self.critic))
        return losses.distribution_matching(fake.x, teacher, critic)

    def critic_passes(self) -> list[CriticPass]:
        return [CriticPass("matched", self._critic_losses, reaches_output=True)]

    def _critic_losses(self, fake: Batch, real: Batch) -> Losses:
        x_t, timestep = self.noised(fake)
        out, target = self.critic.output(x_t, timestep, fake.cond), PROCESS.target(fake.x, x_t, timestep)
        return {self.name: losses.denoising(out, target)}


@pytest.mark.usefixtures("gradient_descent")
def test_dmd_in_micro_batches_of_two_is_dmd_on_a_batch_of_four_for_the_same_noises() -> None:
    torch.manual_seed(0)
    labels = torch.tensor([0.1, 0.2, 0.3, 0.4])
    noises = {label: (torch.randn(1, 2, 2), 200 + 150 * i) for i, label in enumerate(labels.tolist())}
    real = Batch(torch.randn(4, 1, 2, 2), Conditioning(label=labels), conditioning(0, 4))

    def gradients(micro_batch: int) -> list[Tensor]:
        networks = [Toy(weight) for weight in (0.7, 0.8, 0.9)]
        student, critic, teacher = (Denoiser(network, PROCESS) for network in networks)
        first, second = (
            Trainable(n, m, torch.optim.AdamW(m.parameters()), lambda step: 1.0, 1e9)
            for n, m in zip(("student", "critic"), networks[:2], strict=True)
        )

        def sample(real: Batch, step: int) -> Batch:
            return replace(real, x=student(real.x, torch.full((len(real.x),), 499), real.cond))

        before = [network.weight.detach().clone() for network in networks]
        DMD2Trainer(first, second, [Matched(teacher, critic, noises)], sample, 1, micro_batch).step(real, 0)
        return [old - network.weight.detach() for old, network in zip(before, networks, strict=True)]

    (student, critic, teacher), whole = gradients(2), gradients(0)
    torch.testing.assert_close([student, critic], whole[:2])
    assert student.abs() > 1e-4
    assert critic.abs() > 1e-4
    assert teacher == 0


def regression(trainable: Trainable, timestep: int, micro_batch: int) -> RegressionTrainer:
    denoiser = Denoiser(trainable.module, PROCESS)
    return RegressionTrainer(trainable, denoiser, timestep, losses.denoising, micro_batch)


def test_a_regression_learns_a_known_answer() -> None:
    """Half of the noise: (eps - sigma w eps) / alpha = eps / 2 at w = (1 - alpha / 2) / sigma."""
    torch.manual_seed(0)
    network, timestep = Toy(), 399
    settings = OptimizerConfig(lr=2e-2, weight_decay=0)
    trainer = regression(optim.trainable("student", network, settings, 400), timestep, micro_batch=3)
    cond = conditioning(-timestep / 1000, 8)  # takes away what the toy adds for the time
    metrics = []
    for step in range(400):
        eps = torch.randn(8, 1, 4, 4)
        metrics.append(trainer.step(Batch(torch.stack((eps, eps / 2), 1), cond, cond), step))
    alpha, sigma = PROCESS.schedule.alpha[timestep].item(), PROCESS.schedule.sigma[timestep].item()
    assert network.weight.item() == pytest.approx((1 - alpha / 2) / sigma, abs=1e-3)
    assert metrics[-1]["student/regression"] < 1e-4 < metrics[0]["student/regression"]


@pytest.mark.usefixtures("gradient_descent")
@pytest.mark.parametrize("micro_batch", [1, 3, 8])
def test_a_regression_in_micro_batches_updates_as_on_the_whole_batch(micro_batch: int) -> None:
    pairs = Batch(torch.randn(8, 2, 1, 2, 2), conditioning(0.1, 8), conditioning(0, 8))

    def train(micro_batch: int) -> tuple[Tensor, Tensor]:
        network = Toy()
        optimizer = torch.optim.AdamW(network.parameters())
        metrics = regression(
            Trainable("student", network, optimizer, lambda step: 0.1, 1e9), 399, micro_batch
        ).step(pairs, 0)
        return network.weight.detach(), metrics["student/regression"]

    torch.testing.assert_close(train(micro_batch), train(0))
    assert train(0)[0] != Toy().weight


def test_a_trainable_is_used_with_its_average_and_goes_on_with_its_weights() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3).requires_grad_(False))
    trainable = optim.trainable("student", module, OptimizerConfig(lr=0.1, ema=(0.5, 0.99)), 8)
    for step in range(3):
        module(torch.randn(4, 3)).square().sum().backward()
        trainable.update(step)

    def weights() -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in module.named_parameters()}

    before, used = weights(), trainable.emas[1].shadow
    with trainable.swap_in_inference_weights():
        inside = weights()
    with pytest.raises(KeyboardInterrupt), trainable.swap_in_inference_weights():
        raise KeyboardInterrupt
    assert before.keys() == inside.keys() == weights().keys()
    assert all(torch.equal(weight, before[name]) for name, weight in weights().items())
    assert all(torch.equal(weight, used.get(name, before[name])) for name, weight in inside.items())
    assert not torch.equal(inside["0.weight"], before["0.weight"])


def test_a_checkpoint_holds_what_learns_and_nothing_else() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).requires_grad_(False))
    assert TrainableWeights(module).state_dict().keys() == {"0.weight", "0.bias"}
    with pytest.raises(ValueError, match="another network"):
        TrainableWeights(module).load_state_dict({"0.weight": torch.zeros(2, 2)})


@pytest.mark.parametrize("count", range(1, 33))
def test_a_student_of_so_many_steps_has_so_many_timesteps(count: int) -> None:
    assert len(spaced_timesteps(count)) == count
