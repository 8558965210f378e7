from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from dmd2.batch import Batch, Conditioning
from dmd2.denoiser import Denoiser, classifier_free_guidance
from dmd2.diffusion import Diffusion, karras_schedule, scaled_linear_schedule, x0_prediction
from dmd2.sampler import backward_simulation, generate, heun

COND = Conditioning(label=torch.zeros(4, dtype=torch.int64))


class Counting(nn.Module):
    """A network that answers with a function of its input and counts its calls."""

    def __init__(self, answer) -> None:  # type: ignore[no-untyped-def]
        super().__init__()
        self.answer, self.calls = answer, 0
        self.grad: list[bool] = []

    def forward(self, x: Tensor, time: Tensor, cond: Conditioning, features_only: bool = False) -> Tensor:
        self.calls += 1
        self.grad.append(torch.is_grad_enabled())
        return self.answer(x, time)


@pytest.mark.parametrize("steps", [2, 18])
def test_heun_makes_two_calls_per_step_and_one_for_the_last(steps: int) -> None:
    network = Counting(lambda x, time: x * 0)
    heun(Denoiser(network, Diffusion(karras_schedule(steps), x0_prediction)), torch.randn(4, 1, 2, 2), COND)
    assert network.calls == 2 * steps - 1


def test_heun_solves_a_gaussian_to_second_order() -> None:
    """For data N(0, s^2), D(x) = s^2 / (s^2 + sigma^2) x and the flow maps sigma_max eps to s / sqrt(s^2 + sigma_max^2) of it."""
    std = 0.5

    def error(steps: int) -> float:
        schedule = karras_schedule(steps, sigma_min=0.002, sigma_max=80.0)
        network = Counting(lambda x, time: std**2 / (std**2 + (4 * time).exp().reshape(-1, 1, 1, 1) ** 2) * x)
        eps = torch.randn(64, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        exact = eps * 80 * std / (std**2 + 80**2) ** 0.5
        cond = Conditioning(label=torch.zeros(64, dtype=torch.int64))
        denoiser = Denoiser(network, Diffusion(schedule, x0_prediction))
        return float((heun(denoiser, eps, cond) - exact).abs().max())

    assert error(144) < 2e-3
    assert 3.5 < error(36) / error(72) < 4.5, "half the step, a quarter of the error"


def test_generate_makes_one_network_call_per_timestep() -> None:
    for timesteps in [(999,), (999, 499), (999, 749, 499, 249)]:
        network = Counting(lambda x, time: x * 0.1)
        generate(
            Denoiser(network, Diffusion(scaled_linear_schedule(), x0_prediction)),
            torch.randn(4, 1, 2, 2),
            COND,
            timesteps,
        )
        assert network.calls == len(timesteps)


@pytest.mark.parametrize("stop", [0, 1, 3])
def test_backward_simulation_ends_at_the_given_step_with_a_gradient_of_that_step_only(stop: int) -> None:
    network = Counting(lambda x, time: x * 0.1)
    denoiser = Denoiser(network, Diffusion(scaled_linear_schedule(), x0_prediction))
    backward_simulation(denoiser, torch.randn(4, 1, 2, 2), COND, (999, 749, 499, 249), stop)
    assert network.grad == [False] * stop + [True]


def test_training_rollout_equals_sampling_for_the_same_noise() -> None:
    network = nn.Conv2d(1, 1, 1)
    denoiser = Denoiser(
        Counting(lambda x, time: network(x)), Diffusion(scaled_linear_schedule(), x0_prediction)
    )
    eps, timesteps = torch.randn(4, 1, 2, 2), (999, 749, 499, 249)
    torch.manual_seed(3)
    sampled = generate(denoiser, eps, COND, timesteps)
    torch.manual_seed(3)
    torch.testing.assert_close(
        backward_simulation(denoiser, eps, COND, timesteps, stop=3), sampled, rtol=0, atol=0
    )


def test_guidance_extrapolates_from_the_unconditional_prediction() -> None:
    class ByLabel(nn.Module):
        def forward(self, x: Tensor, time: Tensor, cond: Conditioning, features_only: bool = False) -> Tensor:
            return cond["label"].reshape(-1, 1, 1, 1) + x * 0

    x = torch.zeros(2, 1, 2, 2)
    sample = Batch(
        x, Conditioning(label=torch.tensor([3.0, 5.0])), Conditioning(label=torch.tensor([1.0, 1.0]))
    )
    teacher = classifier_free_guidance(
        Denoiser(ByLabel(), Diffusion(scaled_linear_schedule(), x0_prediction)), 8.0
    )
    out = teacher(x, torch.tensor([10, 900]), sample)
    torch.testing.assert_close(out[:, 0, 0, 0], torch.tensor([1 + 8 * 2.0, 1 + 8 * 4.0]))
