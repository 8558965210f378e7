"""The training loop: two players, taking turns. And, for demos and tests, a teacher that learns alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
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


@dataclass(frozen=True)
class Weights:
    """What of a module learns, as something that a checkpoint can hold; what is frozen is not saved over and over."""

    module: nn.Module

    def state_dict(self) -> dict[str, Tensor]:
        return {name: p.detach() for name, p in self.module.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        mine = self.state_dict()
        if mine.keys() != state.keys():
            odd = min(mine.keys() ^ state.keys())
            raise ValueError(f"the weights are of another network: {odd} is on one side only")
        for name, value in mine.items():
            value.copy_(state[name])


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
        return {self.name: Weights(self.module), f"{self.name}.optimizer": self.optimizer, **averages}

    def result(self) -> dict[str, Tensor]:
        """The weights to use: the last running average, or the weights themselves if there is none."""
        return self.averages[-1].shadow if self.averages else Weights(self.module).state_dict()

    @contextmanager
    def as_used(self) -> Iterator[None]:
        """While inside, the module has the weights to use."""
        if not self.averages:  # they are those it has
            yield
            return
        before = {name: value.clone() for name, value in Weights(self.module).state_dict().items()}
        Weights(self.module).load_state_dict(self.result())
        try:
            yield
        finally:
            Weights(self.module).load_state_dict(before)


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
    micro_batch: int = 0
    """Samples that go through the networks together; gradients add up to those of the batch. 0 = all."""

    def state(self) -> dict[str, Stateful]:
        return self.student.state() | self.critic.state()

    def step(self, real: Sample, step: int) -> Metrics:
        students_turn = step % self.critic_updates == 0
        parts = real.split(self.micro_batch)
        shares = [len(part.x) / len(real.x) for part in parts]
        fakes, told = [], []
        for part, share in zip(parts, shares, strict=True):
            with torch.set_grad_enabled(students_turn):
                fake = self.generate(part, step)
            if students_turn:
                told.append(self._student_gradient(fake, share))
            fakes.append(replace(fake, x=fake.x.detach()))
        metrics = _summed(told) | self.student.update(step) if students_turn else {}
        told = [self._critic_gradient(*each) for each in zip(fakes, parts, shares, strict=True)]
        return metrics | _summed(told) | self.critic.update(step)

    def _student_gradient(self, fake: Sample, share: float) -> Metrics:
        """Ask each term for its gradient at the samples, and send the sum through the student."""
        leaf = replace(fake, x=fake.x.detach().requires_grad_())
        losses = {t.name: share * t.student_loss(leaf) for t in self.terms}
        gradients = {n: torch.autograd.grad(loss, leaf.x)[0] for n, loss in losses.items()}
        fake.x.backward(torch.stack(list(gradients.values())).sum(0))
        return {f"student/{n}_gradient": g.norm() for n, g in gradients.items()} | _named("student", losses)

    def _critic_gradient(self, fake: Sample, real: Sample, share: float) -> Metrics:
        losses = {t.name: share * t.critic_loss(fake, real) for t in self.terms}
        torch.stack(list(losses.values())).sum().backward()
        return _named("critic", losses)


@dataclass
class Regression:
    """The student alone, learning what the teacher made of given noise (DMD2's warm-up for one-step SDXL)."""

    student: Player
    denoiser: Denoiser
    level: int
    """Of the student's only step."""
    distance: Callable[[Tensor, Tensor], Tensor]
    """Samples of student and teacher (B, C, H, W) -> a scalar."""
    micro_batch: int = 0

    def state(self) -> dict[str, Stateful]:
        return self.student.state()

    def step(self, pairs: Sample, step: int) -> Metrics:
        """`pairs.x` is (B, 2, C, H, W): the noise, and the teacher's answer."""
        told = []
        for part in pairs.split(self.micro_batch):
            eps, answer = part.x.unbind(1)
            level = torch.full((len(eps),), self.level, device=eps.device)
            x = self.denoiser(self.denoiser.diffusion.schedule.prior_std * eps, level, part.cond)
            loss = self.distance(x, answer) * (len(eps) / len(pairs.x))
            loss.backward()
            told.append({"student/regression": loss.detach()})
        return _summed(told) | self.student.update(step)


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


def _summed(parts: list[Metrics]) -> Metrics:
    """Over the parts of a batch; each has its share already, a norm of gradients is a bound."""
    return {name: torch.stack([part[name] for part in parts]).sum() for name in parts[0]} if parts else {}


def _named(player: str, losses: dict[str, Tensor]) -> Metrics:
    return {f"{player}/{name}": loss.detach() for name, loss in losses.items()}
