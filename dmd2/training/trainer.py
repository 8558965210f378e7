"""The training steps: DMD2, the regression that warms up a one-step student, and a diffusion teacher for demos."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from dmd2.batch import Batch
from dmd2.denoiser import Denoiser
from dmd2.training import losses
from dmd2.training.checkpoint import Stateful
from dmd2.training.optim import Metrics, Trainable
from dmd2.training.phase_timer import PhaseTimer
from dmd2.training.terms import CriticPass, Losses, LossTerm, critic_passes


class Trainer(Protocol):
    """A training step and its state."""

    timer: PhaseTimer
    """`step` starts a phase of it for each part of its work."""

    def step(self, real: Batch, step: int) -> Metrics:
        """One optimizer step on this rank's rows of a batch; detached scalars by name."""

    def is_resumable_after(self, step: int) -> bool:
        """Whether `state` after this step holds everything that the next step depends on."""

    def state(self) -> dict[str, Stateful]:
        """The content of a checkpoint."""


@dataclass
class DMD2Trainer:
    """DMD2 (Yin et al. 2024): the critic is updated at every step, the student at every `critic_updates`-th."""

    student: Trainable
    critic: Trainable
    terms: Sequence[LossTerm]
    generate: Callable[[Batch, int], Batch]
    """(real, step) -> samples of the student, with a graph if gradients are on."""
    critic_updates: int
    """Critic updates per student update (the two time-scale rule, TTUR)."""
    micro_batch: int = 0
    """Rows that go through the networks together; the gradients of micro-batches accumulate. 0 = the whole batch."""
    continues_rollouts: bool = False
    """Whether `generate` keeps samples from one step to the next, until the next update of the student."""
    timer: PhaseTimer = field(default_factory=PhaseTimer)
    passes: list[CriticPass] = field(init=False)
    """The critic's passes of a step, in order."""

    def __post_init__(self) -> None:
        self.passes = critic_passes(self.terms)

    def state(self) -> dict[str, Stateful]:
        return self.student.state() | self.critic.state()

    def is_resumable_after(self, step: int) -> bool:
        return not self.continues_rollouts or (step + 1) % self.critic_updates == 0

    def step(self, real: Batch, step: int) -> Metrics:
        student_turn = step % self.critic_updates == 0
        micro_batches = real.split(self.micro_batch)
        weights = [len(one.x) / len(real.x) for one in micro_batches]

        # Generate fake samples. On the student's turn, send the gradient at the samples through the student at once, so
        # that only one micro-batch has a graph at a time.
        fakes, student_metrics = [], []
        for micro_batch, weight in zip(micro_batches, weights, strict=True):
            self.timer.start("rollout")
            with torch.set_grad_enabled(student_turn):
                fake = self.generate(micro_batch, step)
            if student_turn:
                self.timer.start("student")
                self.student.set_gradient_sync(micro_batch is micro_batches[-1], last_pass=True)
                student_metrics.append(self._accumulate_student_gradient(fake, weight))
            fakes.append(replace(fake, x=fake.x.detach()))
        metrics = _sum_by_name(student_metrics) | self.student.update(step) if student_turn else {}

        # Train the critic on the same samples.
        self.timer.start("critic")
        critic_metrics = [
            self._accumulate_critic_gradient(fake, micro_batch, weight, micro_batch is micro_batches[-1])
            for fake, micro_batch, weight in zip(fakes, micro_batches, weights, strict=True)
        ]
        return metrics | _sum_by_name(critic_metrics) | self.critic.update(step)

    def _accumulate_student_gradient(self, fake: Batch, weight: float) -> Metrics:
        """Differentiate each term at the samples, and send the sum of the gradients through the student.

        `weight` is the fraction of the batch that this micro-batch is. The critic's graph is freed before the student's
        backward pass, and the strength of each term is logged at no cost, as the L1 norm of its gradient.
        """
        leaf = replace(fake, x=fake.x.detach().requires_grad_())
        losses = {term.name: weight * term.student_loss(leaf) for term in self.terms}
        gradients = {name: torch.autograd.grad(loss, leaf.x)[0] for name, loss in losses.items()}
        fake.x.backward(torch.stack(list(gradients.values())).sum(0))
        norms = {f"student/{name}_grad_l1": gradient.abs().sum() for name, gradient in gradients.items()}
        return norms | {f"student/{name}": loss.detach() for name, loss in losses.items()}

    def _accumulate_critic_gradient(
        self, fake: Batch, real: Batch, weight: float, last_micro_batch: bool
    ) -> Metrics:
        """Run the critic's passes, each backward before the next one starts, so that one graph exists at a time."""
        found: list[Losses] = []
        for one in self.passes:
            losses = {name: weight * loss for name, loss in one.losses(fake, real).items()}
            self.critic.set_gradient_sync(last_micro_batch, last_pass=one is self.passes[-1])
            torch.stack(list(losses.values())).sum().backward()
            found.append({f"critic/{name}": loss.detach() for name, loss in losses.items()})
        return _sum_by_name(found)


@dataclass
class RegressionTrainer:
    """The student learns the teacher's samples of given noise (ODE pairs, DMD2's warm-up for one-step SDXL)."""

    student: Trainable
    denoiser: Denoiser
    timestep: int
    """The timestep at which the student is called."""
    distance: Callable[[Tensor, Tensor], Tensor]
    """(samples of the student, samples of the teacher), both (B, C, H, W) -> a scalar."""
    micro_batch: int = 0
    """Rows that go through the network together. 0 = the whole batch."""
    timer: PhaseTimer = field(default_factory=PhaseTimer)

    def is_resumable_after(self, step: int) -> bool:
        return True

    def state(self) -> dict[str, Stateful]:
        return self.student.state()

    def step(self, pairs: Batch, step: int) -> Metrics:
        """`pairs.x` is (B, 2, C, H, W): the noise, and the teacher's sample of it."""
        self.timer.start("student")
        metrics, micro_batches = [], pairs.split(self.micro_batch)
        for micro_batch in micro_batches:
            eps, x_teacher = micro_batch.x.unbind(1)
            timestep = torch.full((len(eps),), self.timestep, device=eps.device)
            x = self.denoiser(self.denoiser.diffusion.schedule.prior_std * eps, timestep, micro_batch.cond)
            loss = self.distance(x, x_teacher) * (len(eps) / len(pairs.x))
            self.student.set_gradient_sync(micro_batch is micro_batches[-1], last_pass=True)
            loss.backward()
            metrics.append({"student/regression": loss.detach()})
        return _sum_by_name(metrics) | self.student.update(step)


@dataclass
class DiffusionTrainer:
    """A diffusion model trained on data, with the EDM loss at log-normal sigma (Karras et al. 2022, eq. 2 and 8)."""

    teacher: Trainable
    denoiser: Denoiser
    timesteps: Callable[[Tensor], Tensor]
    """Standard normal numbers (B,) -> timesteps (B,)."""
    timer: PhaseTimer = field(default_factory=PhaseTimer)

    def is_resumable_after(self, step: int) -> bool:
        return True

    def state(self) -> dict[str, Stateful]:
        return self.teacher.state()

    def step(self, real: Batch, step: int) -> Metrics:
        self.timer.start("teacher")
        diffusion = self.denoiser.diffusion
        timestep = self.timesteps(real.rng.normal_like(real.x[:, 0, 0, 0]))
        x_t = diffusion.add_noise(real.x, real.rng.normal_like(real.x), timestep)
        target = diffusion.target(real.x, x_t, timestep)
        loss = losses.denoising(self.denoiser.output(x_t, timestep, real.cond), target)
        self.teacher.set_gradient_sync(last_micro_batch=True, last_pass=True)
        loss.backward()
        return {"teacher/denoising": loss.detach()} | self.teacher.update(step)


def _sum_by_name(several: Sequence[Metrics]) -> Metrics:
    """The sum of the values of each name, over micro-batches or passes. A norm of gradients becomes an upper bound."""
    names = dict.fromkeys(name for one in several for name in one)
    return {name: torch.stack([one[name] for one in several if name in one]).sum() for name in names}
