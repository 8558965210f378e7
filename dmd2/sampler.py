"""Few-step generation. Training replays the same steps, so there is one implementation of both."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice, pairwise

import torch
from torch import Tensor

from dmd2.batch import Conditioning, Sample
from dmd2.denoiser import Denoiser
from dmd2.rng import Rng, draw_shared

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


def simulate(
    student: Denoiser,
    eps: Tensor,
    cond: Conditioning,
    levels: Levels,
    stop: int,
    noise: Noise = torch.randn_like,
) -> Tensor:
    """Backward simulation (DMD2, sec. 4.5): walk to step `stop` without gradient, take it with.

    `stop` must be the same on every rank: the number of network calls depends on it.
    """
    with torch.no_grad():
        x_t, level = next(islice(walk(student, eps, cond, levels, noise), stop, None))
    return student(x_t, level, cond)


class Rollouts:
    """(real, step) -> samples of the student, every stop of a rollout being one.

    At the student's turn, a rollout to a drawn stop, as `simulate`. At each step until the next turn, the rollouts go on
    from there: the last sample under noise of the next level, and after the last level pure noise again. So each level
    is met as often as by drawing it, for one network call instead of (levels + 1) / 2.
    """

    def __init__(
        self,
        student: Denoiser,
        levels: Levels,
        turn_every: int,
        seed: int,
        prompts: Callable[[Rng], tuple[Conditioning, Conditioning]] | None = None,
    ) -> None:
        self.student, self.levels, self.turn_every, self.seed = student, levels, turn_every, seed
        self.prompts = prompts
        self.turn = -1
        self.going: deque[Sample] = deque()
        """The samples of the step before, part by part."""

    def __call__(self, real: Sample, step: int) -> Sample:
        since = step % self.turn_every
        if step - since != self.turn:
            self.turn = step - since
            self.going.clear()
        stop = (draw_shared(self.seed, self.turn, len(self.levels)) + since) % len(self.levels)
        before = self.going.popleft() if since else None
        fake = (
            self._go_on(before, real, stop) if before and stop else self._start(real, 0 if before else stop)
        )
        self.going.append(replace(fake, x=fake.x.detach()))
        return fake

    def _start(self, real: Sample, stop: int) -> Sample:
        if self.prompts:
            cond, null = self.prompts(real.rng)
            real = replace(real, cond=cond, null=null)
        noise = real.rng.normal_like
        x = simulate(self.student, noise(real.x), real.cond, self.levels, stop, noise)
        return replace(real, x=x)

    def _go_on(self, before: Sample, real: Sample, stop: int) -> Sample:
        level = torch.full((len(before.x),), self.levels[stop], device=before.x.device)
        x_t = self.student.diffusion.add_noise(before.x, real.rng.normal_like(before.x), level)
        return replace(before, x=self.student(x_t, level, before.cond), rng=real.rng)


def denoise_real(student: Denoiser, real: Sample, levels: Levels) -> Tensor:
    """The alternative to simulation: real samples under noise of a level drawn for each; the noisiest gets pure noise."""
    diffusion, eps = student.diffusion, real.rng.normal_like(real.x)
    index = real.rng.integers(0, len(levels), real.x)
    level = sum(torch.where(index == i, value, 0) for i, value in enumerate(levels))
    assert isinstance(level, Tensor)
    pure = (index == 0).reshape(-1, 1, 1, 1)
    x_t = torch.where(pure, diffusion.schedule.prior_std * eps, diffusion.add_noise(real.x, eps, level))
    return student(x_t, level, real.cond)


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
