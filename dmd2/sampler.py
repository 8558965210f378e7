"""Few-step generation. Training replays the same steps, so there is one implementation of both."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice, pairwise

import torch
from torch import Tensor

from dmd2.batch import Batch, Conditioning
from dmd2.denoiser import Denoiser
from dmd2.rng import Rng, draw_shared

Timesteps = tuple[int, ...]
"""Timesteps of the student's steps, noisiest first."""


Noise = Callable[[Tensor], Tensor]
"""A tensor -> fresh unit noise of its shape."""


def student_inputs(
    student: Denoiser, eps: Tensor, cond: Conditioning, timesteps: Timesteps, noise: Noise = torch.randn_like
) -> Iterator[tuple[Tensor, Tensor]]:
    """The student's inputs (x_t, timestep), one per step, each made from its answer to the one before.

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
    """Pure noise eps (B, C, H, W) -> clean sample (B, C, H, W), in len(timesteps) network calls."""
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
    """Backward simulation (DMD2, sec. 4.5): go to step `stop` without gradient, take it with.

    `stop` must be the same on every rank: the number of network calls depends on it.
    """
    with torch.no_grad():
        x_t, timestep = next(islice(student_inputs(student, eps, cond, timesteps, noise), stop, None))
    return student(x_t, timestep, cond)


class Rollouts:
    """(real, step) -> samples of the student, every stop of a rollout being one.

    At the student's turn, a rollout to a drawn stop, as `backward_simulation`. At each step until the next turn, the rollouts go on
    from there: the last sample under noise of the next timestep, and after the last timestep pure noise again. So each timestep
    is met as often as by drawing it, for one network call instead of (timesteps + 1) / 2.
    """

    def __init__(
        self,
        student: Denoiser,
        timesteps: Timesteps,
        turn_every: int,
        seed: int,
        prompts: Callable[[Rng], tuple[Conditioning, Conditioning]] | None = None,
    ) -> None:
        self.student, self.timesteps, self.turn_every, self.seed = student, timesteps, turn_every, seed
        self.prompts = prompts
        self.turn = -1
        self.going: deque[Batch] = deque()
        """The samples of the step before, part by part."""

    def __call__(self, real: Batch, step: int) -> Batch:
        since = step % self.turn_every
        if step - since != self.turn:
            self.turn = step - since
            self.going.clear()
        stop = (draw_shared(self.seed, self.turn, len(self.timesteps)) + since) % len(self.timesteps)
        before = self.going.popleft() if since else None
        fake = (
            self._go_on(before, real, stop) if before and stop else self._start(real, 0 if before else stop)
        )
        self.going.append(replace(fake, x=fake.x.detach()))
        return fake

    def _start(self, real: Batch, stop: int) -> Batch:
        if self.prompts:
            cond, uncond = self.prompts(real.rng)
            real = replace(real, cond=cond, uncond=uncond)
        noise = real.rng.normal_like
        x = backward_simulation(self.student, noise(real.x), real.cond, self.timesteps, stop, noise)
        return replace(real, x=x)

    def _go_on(self, before: Batch, real: Batch, stop: int) -> Batch:
        timestep = torch.full((len(before.x),), self.timesteps[stop], device=before.x.device)
        x_t = self.student.diffusion.add_noise(before.x, real.rng.normal_like(before.x), timestep)
        return replace(before, x=self.student(x_t, timestep, before.cond), rng=real.rng)


def denoise_real(student: Denoiser, real: Batch, timesteps: Timesteps) -> Tensor:
    """The alternative to simulation: real samples under noise of a timestep drawn for each; the noisiest gets pure noise."""
    diffusion, eps = student.diffusion, real.rng.normal_like(real.x)
    index = real.rng.integers(0, len(timesteps), real.x)
    timestep = sum(torch.where(index == i, value, 0) for i, value in enumerate(timesteps))
    assert isinstance(timestep, Tensor)
    pure = (index == 0).reshape(-1, 1, 1, 1)
    x_t = torch.where(pure, diffusion.schedule.prior_std * eps, diffusion.add_noise(real.x, eps, timestep))
    return student(x_t, timestep, real.cond)


@torch.no_grad()
def heun(denoiser: Denoiser, eps: Tensor, cond: Conditioning) -> Tensor:
    """The deterministic sampler of EDM (Karras et al. 2022, algorithm 1) over all timesteps of the denoiser's table.

    For processes with alpha = 1. 2 * timesteps - 1 network calls: the last step, to sigma = 0, is an Euler step.
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
