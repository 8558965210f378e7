"""Parity with the formulas of DMD2 for latent diffusion, written out here in float64; and parts of a batch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from dmd2.denoiser import Denoiser, guided
from dmd2.diffusion import Diffusion, predict_eps, scaled_linear_schedule
from dmd2.sample import Conditioning, Sample
from dmd2.sampler import Levels, denoise_real, generate, simulate, step_levels, walk
from dmd2.trainer import Player, Trainer, Weights

PROCESS = Diffusion(scaled_linear_schedule(), predict_eps)
LEVELS = (0, 20, 249, 399, 499, 749, 980, 999)
ALPHA_BAR = (0.99915, 0.98131, 0.67543, 0.42609, 0.27767, 0.05662, 0.00584, 0.00466)


class Toy(nn.Module):
    """eps = weight * x + what is shown + time / 1000: enough for every input to matter."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.7))

    def forward(self, x: Tensor, time: Tensor, cond: Conditioning, features_only: bool = False) -> Tensor:
        assert cond.label is not None
        return self.weight * x + (cond.label + time / 1000).reshape(-1, 1, 1, 1)


def shown(value: float, count: int) -> Conditioning:
    return Conditioning(label=torch.full((count,), value))


def x0(x_t: Tensor, eps: Tensor, level: int) -> Tensor:
    """(x_t - sqrt(1 - alpha_bar) eps) / sqrt(alpha_bar), in float64."""
    beta = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alpha_bar = torch.cumprod(1 - beta, 0)[level]
    return (x_t.double() - (1 - alpha_bar).sqrt() * eps.double()) / alpha_bar.sqrt()


@pytest.mark.parametrize(("level", "alpha_bar"), list(zip(LEVELS, ALPHA_BAR, strict=True)))
def test_the_noise_levels_are_the_published_ones(level: int, alpha_bar: float) -> None:
    assert round(PROCESS.schedule.alpha[level].item() ** 2, 5) == alpha_bar


@pytest.mark.parametrize("level", LEVELS)
def test_x0_in_float32_is_that_in_float64(level: int) -> None:
    x_t, eps = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    ours, exact = PROCESS.to_x0(eps, x_t, torch.tensor([level, level])), x0(x_t, eps, level)
    assert ours.dtype == torch.float32
    assert ((ours - exact).abs().max() / exact.abs().max()).item() < 1e-6


@pytest.mark.parametrize("scale", [1.75, 6.0, 8.0])
def test_guidance_on_x0_is_guidance_on_eps(scale: float) -> None:
    denoiser, x_t = Denoiser(Toy(), PROCESS), torch.randn(3, 4, 2, 2)
    sample = Sample(x_t, shown(0.5, 3), shown(-0.25, 3))
    level = torch.tensor([20, 499, 980])
    ours = guided(denoiser, scale)(x_t, level, sample)
    conditional, null = (denoiser.output(x_t, level, c) for c in (sample.cond, sample.null))
    eps = null + scale * (conditional - null)
    for row, index in enumerate(level.tolist()):
        torch.testing.assert_close(ours[row].double(), x0(x_t[row], eps[row], index), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("count", "levels"),
    [
        (1, (999,)),
        (2, (999, 499)),
        (3, (999, 666, 333)),
        (4, (999, 749, 499, 249)),
        (8, (999, 874, 749, 624, 499, 374, 249, 124)),
    ],
)
def test_steps_are_at_the_published_levels(count: int, levels: Levels) -> None:
    assert step_levels(count) == levels


def test_a_chain_of_four_steps_is_what_training_rolls_out_for_the_same_noises(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    student, levels, cond = Denoiser(Toy(), PROCESS), step_levels(4), shown(0.3, 2)
    noises = [torch.randn(2, 4, 4, 4) for _ in range(4)]

    def between(rest: list[Tensor]) -> list[Tensor]:
        drawn = iter(rest)
        monkeypatch.setattr(torch, "randn_like", lambda x: next(drawn))
        return rest

    between(noises[1:])
    chain = generate(student, noises[0], cond, levels, lambda x: torch.randn_like(x))
    x = noises[0]
    told: list[Tensor] = []
    for index, level in enumerate(levels):  # by hand
        if index:
            alpha, sigma = PROCESS.schedule.alpha[level], PROCESS.schedule.sigma[level]
            x = (alpha * told[-1] + sigma * noises[index]).float()
        eps = student.output(x, torch.tensor([level, level]), cond)
        told.append(x0(x, eps, level))
    torch.testing.assert_close(chain.double(), told[-1], rtol=1e-4, atol=1e-3)
    for stop in range(4):
        drawn = iter(noises[1:])
        inputs = list(walk(student, noises[0], cond, levels, lambda x, drawn=drawn: next(drawn)))  # type: ignore[misc]
        torch.testing.assert_close(student(*inputs[stop], cond).double(), told[stop], rtol=1e-4, atol=1e-3)
    assert simulate(student, noises[0], cond, levels, 0).requires_grad


def test_one_step_at_level_399_reads_pure_noise_by_that_level() -> None:
    student, eps, cond = Denoiser(Toy(), PROCESS), torch.randn(2, 4, 2, 2), shown(0.1, 2)
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
    network, real = Seen(), Sample(torch.full((400, 1, 2, 2), 50.0), shown(0, 400), shown(0, 400))
    denoise_real(Denoiser(network, PROCESS), real, (999, 499))
    x, time = network.seen
    assert set(time.tolist()) == {999.0, 499.0}
    mean = x.mean(dim=(1, 2, 3))
    assert mean[time == 999].abs().max() < 3
    torch.testing.assert_close(
        mean[time == 499].mean(), 50 * PROCESS.schedule.alpha[499].float(), rtol=0.01, atol=0
    )


class Pull:
    """A term without chance: the student is drawn to 2, the critic's weight to the mean of what it is shown."""

    name = "pull"

    def __init__(self, critic: nn.Linear) -> None:
        self.critic = critic

    def student_loss(self, fake: Sample) -> Tensor:
        return (fake.x - 2).square().mean()

    def critic_loss(self, fake: Sample, real: Sample) -> Tensor:
        return (self.critic(fake.x).mean((1, 2, 3)) - real.x.mean((1, 2, 3))).square().mean()


@pytest.mark.parametrize("micro_batch", [1, 2, 4, 5])
def test_parts_of_a_batch_add_up_to_its_gradient(micro_batch: int) -> None:
    def played(parts: int) -> list[Tensor]:
        torch.manual_seed(0)
        student, critic = Toy(), nn.Linear(2, 2)
        players = [
            Player(n, m, torch.optim.SGD(m.parameters(), 0.1), lambda step: 0.1, 1e9)
            for n, m in (("student", student), ("critic", critic))
        ]

        def draw(real: Sample, step: int) -> Sample:
            return replace(real, x=student(real.x, torch.zeros(len(real.x)), real.cond))

        game = Trainer(players[0], players[1], [Pull(critic)], draw, 1, parts)
        real = Sample(torch.randn(5, 1, 2, 2), shown(0.5, 5), shown(0, 5))
        told = [game.step(real, step) for step in range(3)]
        assert {"student/pull", "critic/pull"} < told[0].keys()
        return [*student.parameters(), *critic.parameters(), told[2]["student/pull"], told[2]["critic/pull"]]

    for ours, whole in zip(played(micro_batch), played(0), strict=True):
        torch.testing.assert_close(ours, whole)


def test_a_checkpoint_holds_what_learns_and_nothing_else() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).requires_grad_(False))
    assert Weights(module).state_dict().keys() == {"0.weight", "0.bias"}
    with pytest.raises(ValueError, match="another network"):
        Weights(module).load_state_dict({"0.weight": torch.zeros(2, 2)})
