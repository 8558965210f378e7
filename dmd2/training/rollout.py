"""How the student's training samples are made: by backward simulation, by continued rollouts, or from noised real samples.

Each way says how many calls of the student a step makes, which the plan multiplies with the cost of one call. The step
at which a rollout stops is drawn from (seed, step) and is the same on all ranks, because the number of calls depends on it.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch

from dmd2.batch import Batch
from dmd2.denoiser import Denoiser
from dmd2.rng import draw_shared
from dmd2.sampler import Timesteps, backward_simulation, denoise_real


class SampleStudent(Protocol):
    """Makes the fake samples of a step."""

    def __call__(self, real: Batch, step: int) -> Batch:
        """Samples of the student, one for each row of `real`; the last call of the student has a graph if gradients are on."""

    def stop(self, step: int) -> int:
        """The index of the timestep at which the rollout of this step stops, in [0, number of timesteps)."""

    def calls(self, student_turn: bool, stop: int) -> int:
        """Calls of the student in a step whose rollout stops at `stop`."""


@dataclass
class BackwardSimulation:
    """At every step a rollout from pure noise to a drawn timestep (DMD2, sec. 4.5)."""

    student: Denoiser
    timesteps: Timesteps
    seed: int

    def __call__(self, real: Batch, step: int) -> Batch:
        return _simulate_rollout(self.student, real, self.timesteps, self.stop(step))

    def stop(self, step: int) -> int:
        return draw_shared(self.seed, step, len(self.timesteps))

    def calls(self, student_turn: bool, stop: int) -> int:
        return stop + 1


@dataclass
class ContinuedRollouts:
    """At the student's turn a rollout to a drawn timestep, which the following steps continue until the next turn.

    A continued step puts the last sample under noise of the next timestep, or starts again from pure noise after the last
    timestep. Each timestep is used as often as by drawing it, for one call instead of (timesteps + 1) / 2 on average.
    """

    student: Denoiser
    timesteps: Timesteps
    critic_updates: int
    seed: int
    turn: int = -1
    """Step of the last student turn."""
    unfinished: deque[Batch] = field(default_factory=deque)
    """Samples of the previous step, by micro-batch."""

    def __call__(self, real: Batch, step: int) -> Batch:
        turn = self._turn(step)
        if turn != self.turn:
            self.turn = turn
            self.unfinished.clear()
        stop = (self.stop(step) + step - turn) % len(self.timesteps)
        previous = self.unfinished.popleft() if step > turn else None
        if previous and stop:
            fake = self._continue_rollout(previous, real, stop)
        else:
            fake = _simulate_rollout(self.student, real, self.timesteps, 0 if previous else stop)
        self.unfinished.append(replace(fake, x=fake.x.detach()))
        return fake

    def stop(self, step: int) -> int:
        return draw_shared(self.seed, self._turn(step), len(self.timesteps))

    def calls(self, student_turn: bool, stop: int) -> int:
        return stop + 1 if student_turn else 1

    def _turn(self, step: int) -> int:
        return step - step % self.critic_updates

    def _continue_rollout(self, previous: Batch, real: Batch, stop: int) -> Batch:
        timestep = torch.full((len(previous.x),), self.timesteps[stop], device=previous.x.device)
        x_t = self.student.diffusion.add_noise(previous.x, real.rng.normal_like(previous.x), timestep)
        return replace(previous, x=self.student(x_t, timestep, previous.cond), rng=real.rng)


@dataclass
class NoisedReal:
    """Real samples under noise of a timestep drawn for each row, denoised by one call of the student."""

    student: Denoiser
    timesteps: Timesteps

    def __call__(self, real: Batch, step: int) -> Batch:
        return replace(real, x=denoise_real(self.student, real, self.timesteps))

    def stop(self, step: int) -> int:
        return 0

    def calls(self, student_turn: bool, stop: int) -> int:
        return 1


def _simulate_rollout(student: Denoiser, real: Batch, timesteps: Timesteps, stop: int) -> Batch:
    """Rollouts from pure noise with the conditioning that the batch has for fake samples."""
    batch, noise = real.for_fakes(), real.rng.normal_like
    return replace(batch, x=backward_simulation(student, noise(real.x), batch.cond, timesteps, stop, noise))
