"""Few-step generation. Training replays the same steps, so there is one implementation of both."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice, pairwise

import torch
from torch import Tensor

from dmd2.denoiser import Denoiser
from dmd2.sample import Conditioning, Sample

Levels = tuple[int, ...]
"""Noise levels of the student's steps, noisiest first."""


Noise = Callable[[Tensor], Tensor]
"""A tensor -> fresh unit noise of its shape."""


def walk(
    student: Denoiser, eps: Tensor, cond: Conditioning, levels: Levels, noise: Noise = torch.randn_like
) -> Iterator[tuple[Tensor, Tensor]]:
    """The student's inputs (x_t, level), one per step, each made from its answer to the one before.

    `noise` must be independent of `eps`: correlated noise leaves artefacts (reference, issue 9).
    """
    diffusion = student.diffusion
    x_t = diffusion.schedule.prior_std * eps
    level = torch.full((len(eps),), levels[0], device=eps.device)
    yield x_t, level
    for index in levels[1:]:
        x0 = student(x_t, level, cond)
        level = torch.full_like(level, index)
        x_t = diffusion.add_noise(x0, noise(x0), level)
        yield x_t, level


@torch.no_grad()
def generate(
    student: Denoiser, eps: Tensor, cond: Conditioning, levels: Levels, noise: Noise = torch.randn_like
) -> Tensor:
    """Pure noise eps (B, C, H, W) -> clean sample (B, C, H, W), in len(levels) network calls."""
    *_, (x_t, level) = walk(student, eps, cond, levels, noise)
    return student(x_t, level, cond)


def simulate(student: Denoiser, eps: Tensor, cond: Conditioning, levels: Levels, stop: int) -> Tensor:
    """Backward simulation (DMD2, sec. 4.5): walk to step `stop` without gradient, take it with.

    `stop` must be the same on every rank: the number of network calls depends on it.
    """
    with torch.no_grad():
        x_t, level = next(islice(walk(student, eps, cond, levels), stop, None))
    return student(x_t, level, cond)


def denoise_real(student: Denoiser, real: Sample, levels: Levels) -> Tensor:
    """The alternative to simulation: real samples under noise of a level drawn for each; the noisiest gets pure noise."""
    diffusion, eps = student.diffusion, torch.randn_like(real.x)
    index = torch.randint(len(levels), (len(eps),), device=eps.device)
    level = torch.tensor(levels, device=eps.device)[index]
    pure = (index == 0).reshape(-1, 1, 1, 1)
    x_t = torch.where(pure, diffusion.schedule.prior_std * eps, diffusion.add_noise(real.x, eps, level))
    return student(x_t, level, real.cond)


def step_levels(count: int, table: int = 1000) -> Levels:
    """Levels of a student of `count` steps at even distances (reference, sec. 2.7): 4 -> 999, 749, 499, 249."""
    return tuple(range(table - 1, 0, -(table // count)))[:count]


@torch.no_grad()
def heun(denoiser: Denoiser, eps: Tensor, cond: Conditioning) -> Tensor:
    """The deterministic sampler of EDM (Karras et al. 2022, algorithm 1) over all levels of the denoiser's table.

    For processes with alpha = 1. 2 * levels - 1 network calls: the last step, to sigma = 0, is an Euler step.
    """
    schedule = denoiser.diffusion.schedule
    sigmas = [*schedule.sigma.flip(0).tolist(), 0.0]
    x = schedule.prior_std * eps

    def slope(x_t: Tensor, i: int) -> Tensor:
        """d_i = (x - D(x; sigma_i)) / sigma_i."""
        level = torch.full((len(eps),), len(schedule.sigma) - 1 - i, device=eps.device)
        return (x_t - denoiser(x_t, level, cond)) / sigmas[i]

    for i, (sigma, following) in enumerate(pairwise(sigmas)):
        d = slope(x, i)
        x_next = x + (following - sigma) * d
        if following > 0:
            x_next = x + (following - sigma) * (d + slope(x_next, i + 1)) / 2
        x = x_next
    return x
