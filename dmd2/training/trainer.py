"""The training loop: student and critic take turns. And, for demos and tests, a teacher that learns alone."""

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
from dmd2.training.terms import CriticPasses, Losses, LossTerm, separate_passes


class Trainer(Protocol):
    """What a run plays, step by step."""

    timer: PhaseTimer
    """`step` calls its `start` for each phase."""

    def step(self, real: Batch, step: int) -> Metrics: ...

    def is_resumable_after(self, step: int) -> bool:
        """Whether the state after this step is all that the next one needs."""

    def state(self) -> dict[str, Stateful]: ...


@dataclass
class DMD2Trainer:
    """DMD2: the critic learns at every step, the student at every `critic_updates`-th."""

    student: Trainable
    critic: Trainable
    terms: Sequence[LossTerm]
    generate: Callable[[Batch, int], Batch]
    """(real, step) -> samples of the student, with their graph."""
    critic_updates: int
    """Critic updates per student update (the two time-scale rule, TTUR)."""
    micro_batch: int = 0
    """Samples that go through the networks together; gradients add up to those of the batch. 0 = all."""
    passes: CriticPasses | None = None
    """The critic's losses, pass by pass; each term on its own if not given."""
    continues_rollouts: bool = False
    """Whether `generate` goes on from one step to the next, until the student's next turn."""
    timer: PhaseTimer = field(default_factory=PhaseTimer)

    def state(self) -> dict[str, Stateful]:
        return self.student.state() | self.critic.state()

    def is_resumable_after(self, step: int) -> bool:
        return not self.continues_rollouts or (step + 1) % self.critic_updates == 0

    def step(self, real: Batch, step: int) -> Metrics:
        students_turn = step % self.critic_updates == 0
        parts = real.split(self.micro_batch)
        shares = [len(part.x) / len(real.x) for part in parts]
        fakes, told = [], []
        for part, share in zip(parts, shares, strict=True):
            self.timer.start("rollout")
            with torch.set_grad_enabled(students_turn):
                fake = self.generate(part, step)
            if students_turn:
                self.timer.start("student")
                self.student.set_gradient_sync(part is parts[-1], last_pass=True)
                told.append(self._student_gradient(fake, share))
            fakes.append(replace(fake, x=fake.x.detach()))
        metrics = _summed(told) | self.student.update(step) if students_turn else {}
        self.timer.start("critic")
        told = [
            self._critic_gradient(fake, part, share, last_micro_batch=part is parts[-1])
            for fake, part, share in zip(fakes, parts, shares, strict=True)
        ]
        return metrics | _summed(told) | self.critic.update(step)

    def _student_gradient(self, fake: Batch, share: float) -> Metrics:
        """Ask each term for its gradient at the samples, and send the sum through the student."""
        leaf = replace(fake, x=fake.x.detach().requires_grad_())
        losses = {t.name: share * t.student_loss(leaf) for t in self.terms}
        gradients = {n: torch.autograd.grad(loss, leaf.x)[0] for n, loss in losses.items()}
        fake.x.backward(torch.stack(list(gradients.values())).sum(0))
        return {f"student/{n}_gradient": g.abs().sum() for n, g in gradients.items()} | _named(
            "student", losses
        )

    def _critic_gradient(self, fake: Batch, real: Batch, share: float, last_micro_batch: bool) -> Metrics:
        told: list[Losses] = []
        passes = (self.passes or separate_passes(self.terms))(fake, real)
        for compute in passes:
            shares = {name: share * loss for name, loss in compute().items()}
            self.critic.set_gradient_sync(last_micro_batch, last_pass=compute is passes[-1])
            torch.stack(list(shares.values())).sum().backward()
            told.append({name: loss.detach() for name, loss in shares.items()})
        return _named("critic", _added(told))


@dataclass
class RegressionTrainer:
    """The student alone, learning what the teacher made of given noise (DMD2's warm-up for one-step SDXL)."""

    student: Trainable
    denoiser: Denoiser
    timestep: int
    """Of the student's only step."""
    distance: Callable[[Tensor, Tensor], Tensor]
    """Samples of student and teacher (B, C, H, W) -> a scalar."""
    micro_batch: int = 0
    timer: PhaseTimer = field(default_factory=PhaseTimer)

    def is_resumable_after(self, step: int) -> bool:
        return True

    def state(self) -> dict[str, Stateful]:
        return self.student.state()

    def step(self, pairs: Batch, step: int) -> Metrics:
        """`pairs.x` is (B, 2, C, H, W): the noise, and the teacher's answer."""
        self.timer.start("student")
        told, parts = [], pairs.split(self.micro_batch)
        for part in parts:
            eps, answer = part.x.unbind(1)
            timestep = torch.full((len(eps),), self.timestep, device=eps.device)
            x = self.denoiser(self.denoiser.diffusion.schedule.prior_std * eps, timestep, part.cond)
            loss = self.distance(x, answer) * (len(eps) / len(pairs.x))
            self.student.set_gradient_sync(part is parts[-1], last_pass=True)
            loss.backward()
            told.append({"student/regression": loss.detach()})
        return _summed(told) | self.student.update(step)


@dataclass
class DiffusionTrainer:
    """A diffusion model trained on data: timesteps log-normal in sigma, the EDM loss (Karras et al. 2022, eq. 2, 8)."""

    teacher: Trainable
    denoiser: Denoiser
    timesteps: Callable[[Tensor], Tensor]
    """Unit noise (B,) -> timesteps (B,)."""
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


def _summed(parts: list[Metrics]) -> Metrics:
    """Over the parts of a batch; each has its share already, a norm of gradients is a bound."""
    return {name: torch.stack([part[name] for part in parts]).sum() for name in parts[0]} if parts else {}


def _added(parts: list[Losses]) -> Losses:
    """Losses of several passes, by name."""
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: torch.stack([part[name] for part in parts if name in part]).sum() for name in names}


def _named(trainable: str, losses: dict[str, Tensor]) -> Metrics:
    return {f"{trainable}/{name}": loss.detach() for name, loss in losses.items()}
