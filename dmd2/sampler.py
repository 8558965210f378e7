"""Sampling: the student's few steps, the same steps as training replays them, and Heun's method for EDM teachers."""

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
"""Timesteps at which the student is called, noisiest first."""

Noise = Callable[[Tensor], Tensor]
"""A tensor -> new Gaussian noise of its shape."""


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


class Rollouts:
    """(real, step) -> samples of the student for that optimizer step, continuing the same rollouts between student updates.

    At a step that updates the student, a rollout begins and ends at a random step, as in `backward_simulation`. Each of the
    following critic steps continues it: the previous samples are noised to the next timestep, and after the last timestep
    pure noise begins a new rollout. Every timestep is used as often as with a random one, for one network call per step
    instead of (timesteps + 1) / 2.
    """

    def __init__(
        self,
        student: Denoiser,
        timesteps: Timesteps,
        critic_updates: int,
        seed: int,
        prompts: Callable[[Rng], tuple[Conditioning, Conditioning]] | None = None,
    ) -> None:
        self.student, self.timesteps, self.seed = student, timesteps, seed
        self.critic_updates = critic_updates
        self.prompts = prompts
        self.started_at = -1
        """The step at which the current rollouts began."""
        self.previous: deque[Batch] = deque()
        """The samples of the previous step, one entry per micro-batch."""

    def __call__(self, real: Batch, step: int) -> Batch:
        since = step % self.critic_updates
        if step - since != self.started_at:
            self.started_at = step - since
            self.previous.clear()
        stop = (draw_shared(self.seed, self.started_at, len(self.timesteps)) + since) % len(self.timesteps)
        before = self.previous.popleft() if since else None
        if before and stop:
            fake = self._continue(before, real, stop)
        else:
            fake = self._start(real, 0 if before else stop)
        self.previous.append(replace(fake, x=fake.x.detach()))
        return fake

    def _start(self, real: Batch, stop: int) -> Batch:
        """A new rollout, up to step `stop`."""
        if self.prompts:
            cond, uncond = self.prompts(real.rng)
            real = replace(real, cond=cond, uncond=uncond)
        noise = real.rng.normal_like
        x = backward_simulation(self.student, noise(real.x), real.cond, self.timesteps, stop, noise)
        return replace(real, x=x)

    def _continue(self, before: Batch, real: Batch, stop: int) -> Batch:
        """Step `stop` of rollouts whose samples at the step before are `before`."""
        timestep = torch.full((len(before.x),), self.timesteps[stop], device=before.x.device)
        x_t = self.student.diffusion.add_noise(before.x, real.rng.normal_like(before.x), timestep)
        return replace(before, x=self.student(x_t, timestep, before.cond), rng=real.rng)


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
