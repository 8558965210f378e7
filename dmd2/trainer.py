"""The training loop: two players, taking turns. And, for demos and tests, a teacher that learns alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor, nn

from dmd2 import losses
from dmd2.checkpoint import Stateful
from dmd2.denoiser import Denoiser
from dmd2.ema import Average
from dmd2.sample import Sample
from dmd2.terms import Term

Metrics = dict[str, Tensor]
"""Detached scalars, left on the device: reading them is the business of whoever reports."""


@dataclass
class Player:
    """Something that learns, and the means to change it."""

    name: str
    module: nn.Module
    optimizer: torch.optim.Optimizer
    lr: Callable[[int], float]
    """Learning rate at a step: a function, so that nothing has to be saved to resume it."""
    max_grad_norm: float
    averages: list[Average] = field(default_factory=list)

    def update(self, step: int) -> Metrics:
        """Follow the gradient that is there, then forget it."""
        norm = nn.utils.clip_grad_norm_(self.module.parameters(), self.max_grad_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr(step)
        self.optimizer.step()
        self.optimizer.zero_grad()
        for average in self.averages:
            average.update(self.module)
        return {f"{self.name}/grad_norm": norm}

    def state(self) -> dict[str, Stateful]:
        """What a checkpoint of this player consists of."""
        averages = {f"{self.name}.average{i}": average for i, average in enumerate(self.averages)}
        return {self.name: self.module, f"{self.name}.optimizer": self.optimizer, **averages}

    def result(self) -> dict[str, Tensor]:
        """The weights to use: the last running average, or the weights themselves if there is none."""
        return self.averages[-1].shadow if self.averages else self.module.state_dict()


class Game(Protocol):
    """What a run plays, step by step."""

    def step(self, real: Sample, step: int) -> Metrics: ...

    def state(self) -> dict[str, Stateful]: ...


@dataclass
class Trainer:
    """DMD2: the critic learns at every step, the student at every `critic_updates`-th."""

    student: Player
    critic: Player
    terms: Sequence[Term]
    generate: Callable[[Sample, int], Sample]
    """(real, step) -> samples of the student, with their graph."""
    critic_updates: int
    """Critic updates per student update (the two time-scale rule, TTUR)."""

    def state(self) -> dict[str, Stateful]:
        return self.student.state() | self.critic.state()

    def step(self, real: Sample, step: int) -> Metrics:
        students_turn = step % self.critic_updates == 0
        with torch.set_grad_enabled(students_turn):
            fake = self.generate(real, step)
        metrics = self._train_student(fake, step) if students_turn else {}
        return metrics | self._train_critic(replace(fake, x=fake.x.detach()), real, step)

    def _train_student(self, fake: Sample, step: int) -> Metrics:
        """Ask each term for its gradient at the samples, and send the sum through the student."""
        leaf = replace(fake, x=fake.x.detach().requires_grad_())
        losses = {t.name: t.student_loss(leaf) for t in self.terms}
        gradients = {n: torch.autograd.grad(loss, leaf.x)[0] for n, loss in losses.items()}
        fake.x.backward(torch.stack(list(gradients.values())).sum(0))
        norms = {f"student/{n}_gradient": g.norm() for n, g in gradients.items()}
        return norms | _named("student", losses) | self.student.update(step)

    def _train_critic(self, fake: Sample, real: Sample, step: int) -> Metrics:
        losses = {t.name: t.critic_loss(fake, real) for t in self.terms}
        torch.stack(list(losses.values())).sum().backward()
        return _named("critic", losses) | self.critic.update(step)


@dataclass
class Teaching:
    """A diffusion model trained on data: levels log-normal in sigma, the EDM loss (Karras et al. 2022, eq. 2, 8)."""

    teacher: Player
    denoiser: Denoiser
    levels: Callable[[int], Tensor]
    """Draws the levels of a batch (B,)."""

    def state(self) -> dict[str, Stateful]:
        return self.teacher.state()

    def step(self, real: Sample, step: int) -> Metrics:
        diffusion = self.denoiser.diffusion
        level = self.levels(len(real.x)).to(real.x.device)
        x_t = diffusion.add_noise(real.x, torch.randn_like(real.x), level)
        target = diffusion.target(real.x, x_t, level)
        loss = losses.denoising(self.denoiser.output(x_t, level, real.cond), target)
        loss.backward()
        return {"teacher/denoising": loss.detach()} | self.teacher.update(step)


def _named(player: str, losses: dict[str, Tensor]) -> Metrics:
    return {f"{player}/{name}": loss.detach() for name, loss in losses.items()}
