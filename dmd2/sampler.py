"""Sampling: the student's few steps, the same steps as training replays them, and Heun's method for EDM teachers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import islice, pairwise

import torch
from torch import Tensor

from dmd2.batch import Batch, Conditioning
from dmd2.denoiser import Denoiser

Timesteps = tuple[int, ...]
"""Timesteps at which the student is called, noisiest first."""

Noise = Callable[[Tensor], Tensor]
"""A tensor -> new Gaussian noise of its shape."""

ELEMENTS = 2**20
"""Numbers in the samples of a network call by default (16 SDXL latents); at most 64 samples."""


def usual_batch(shape: tuple[int, ...]) -> int:
    """Samples (C, H, W) of a network call, where no number is given."""
    return max(1, min(64, ELEMENTS // math.prod(shape)))


def student_inputs(
    student: Denoiser, eps: Tensor, cond: Conditioning, timesteps: Timesteps, noise: Noise = torch.randn_like
) -> Iterator[tuple[Tensor, Tensor]]:
    """The inputs (x_t (B, C, H, W), timestep (B,)) of the student, one pair per step.

    The first is pure noise. Each later one is the student's x0 of the step before, noised to the next timestep.
    `noise` must be independent of `eps`: correlated noise leaves artefacts (reference, issue 9).
    """
    diffusion = student.diffusion
    x_t = diffusion.schedule.prior_std * eps
    timestep = torch.full((len(eps),), timesteps[0], device=eps.device)
    yield x_t, timestep
    for index in timesteps[1:]:
        x0 = student(x_t, timestep, cond)
        timestep = torch.full_like(timestep, index)
        x_t = diffusion.add_noise(x0, noise(x0), timestep)
        yield x_t, timestep


@torch.no_grad()
def generate(
    student: Denoiser, eps: Tensor, cond: Conditioning, timesteps: Timesteps, noise: Noise = torch.randn_like
) -> Tensor:
    """Samples (B, C, H, W) of the student from unit noise eps (B, C, H, W), in len(timesteps) network calls."""
    *_, (x_t, timestep) = student_inputs(student, eps, cond, timesteps, noise)
    return student(x_t, timestep, cond)


def backward_simulation(
    student: Denoiser,
    eps: Tensor,
    cond: Conditioning,
    timesteps: Timesteps,
    stop: int,
    noise: Noise = torch.randn_like,
) -> Tensor:
    """Samples (B, C, H, W) of the student at step `stop` of its own sampling (DMD2, sec. 4.5).

    The steps before `stop`, counted from 0, are taken without gradient, step `stop` with it. `stop` must be the same on every
    rank, because the number of network calls depends on it.
    """
    with torch.no_grad():
        x_t, timestep = next(islice(student_inputs(student, eps, cond, timesteps, noise), stop, None))
    return student(x_t, timestep, cond)


def denoise_real(student: Denoiser, real: Batch, timesteps: Timesteps) -> Tensor:
    """The student's x0 (B, C, H, W) of noised real samples, the alternative to backward simulation.

    Each row draws one of the student's timesteps; at the noisiest, the input is pure noise.
    """
    diffusion, eps = student.diffusion, real.rng.normal_like(real.x)
    index = real.rng.integers(0, len(timesteps), real.x)
    timestep = sum(torch.where(index == i, value, 0) for i, value in enumerate(timesteps))
    assert isinstance(timestep, Tensor)
    pure = (index == 0).reshape(-1, 1, 1, 1)
    x_t = torch.where(pure, diffusion.schedule.prior_std * eps, diffusion.add_noise(real.x, eps, timestep))
    return student(x_t, timestep, real.cond)


@torch.no_grad()
def heun(denoiser: Denoiser, eps: Tensor, cond: Conditioning) -> Tensor:
    """Samples (B, C, H, W) by EDM's deterministic sampler (Karras et al. 2022, algorithm 1) from unit noise eps (B, C, H, W).

    It visits all N timesteps of the denoiser's schedule, which must have alpha = 1, in 2 N - 1 network calls: the last step,
    to sigma = 0, is an Euler step.
    """
    schedule = denoiser.diffusion.schedule
    sigmas = [*schedule.sigma.flip(0).tolist(), 0.0]
    x = schedule.prior_std * eps

    def slope(x_t: Tensor, i: int) -> Tensor:
        """d_i = (x - D(x; sigma_i)) / sigma_i."""
        timestep = torch.full((len(eps),), len(schedule.sigma) - 1 - i, device=eps.device)
        return (x_t - denoiser(x_t, timestep, cond)) / sigmas[i]

    for i, (sigma, following) in enumerate(pairwise(sigmas)):
        d = slope(x, i)
        x_next = x + (following - sigma) * d
        if following > 0:
            x_next = x + (following - sigma) * (d + slope(x_next, i + 1)) / 2
        x = x_next
    return x
