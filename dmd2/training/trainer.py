"""The training loop: student and critic take turns. And, for demos and tests, a teacher that learns alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor, nn

from dmd2 import parallel
from dmd2.batch import Batch
from dmd2.denoiser import Denoiser
from dmd2.training import losses
from dmd2.training.checkpoint import Stateful
from dmd2.training.ema import Average
from dmd2.training.terms import CriticPasses, Losses, LossTerm, separate_passes

HEAD = "head"
"""The name of a GAN head among the networks of a critic."""
SKIPPED = "skipped"
"""The metric that counts updates whose gradient was not finite."""
Metrics = dict[str, Tensor]
"""Detached scalars, left on the device: reading them is the business of whoever reports."""


@dataclass(frozen=True)
class TrainableWeights:
    """What of a module learns, as something that a checkpoint can hold; what is frozen is not saved over and over."""

    module: nn.Module

    def state_dict(self) -> dict[str, Tensor]:
        parallel.reshard(self.module)
        return {name: p.detach() for name, p in self.module.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        mine = self.state_dict()
        if mine.keys() != state.keys():
            odd = min(mine.keys() ^ state.keys())
            raise ValueError(f"the weights are of another network: {odd} is on one side only")
        for name, value in mine.items():
            parallel.local(value).copy_(parallel.local(state[name]))


@dataclass(frozen=True)
class OptimizerState:
    """The state of an optimizer: all of it there from the start, so that nothing appears at the first step."""

    optimizer: torch.optim.Optimizer

    def __post_init__(self) -> None:
        for p in (p for group in self.optimizer.param_groups for p in group["params"]):
            if not self.optimizer.state[p]:
                zeros = {name: torch.zeros_like(p.detach()) for name in ("exp_avg", "exp_avg_sq")}
                self.optimizer.state[p] = {"step": torch.zeros((), device=p.device)} | zeros

    def state_dict(self) -> dict[str, Tensor]:
        state = enumerate(self.optimizer.state.values())
        return {f"{index}.{key}": value for index, slots in state for key, value in slots.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name, value in self.state_dict().items():
            parallel.local(value).copy_(parallel.local(state[name]))


@dataclass
class Trainable:
    """Something that learns, and the means to change it."""

    name: str
    module: nn.Module
    optimizer: torch.optim.Optimizer
    lr: Callable[[int], float]
    """Learning rate at a step: a function, so that nothing has to be saved to resume it."""
    max_grad_norm: float
    averages: list[Average] = field(default_factory=list)

    def reduces(self, last_part: bool, last_pass: bool) -> None:
        """Say which gradients are complete after the next backward pass, and so are added up over the processes: those of
        a body with the last pass of the last part, those of a head, which the last pass may not reach, with each of it."""
        for name, module in self._roots().items():
            parallel.reduces(module, last_part and (last_pass or name == HEAD))

    def update(self, step: int) -> Metrics:
        """Follow the gradient that is there, then forget it. One that is not finite is not followed; nobody waits for the
        device to know."""
        parallel.reshard(self.module)
        gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
        norm = parallel.norm(gradients)
        scale = (self.max_grad_norm / (norm + 1e-6)).clamp(max=1)
        torch._foreach_mul_([parallel.local(gradient) for gradient in gradients], scale)
        bad = (~norm.isfinite()).float()
        self.optimizer.found_inf = bad  # type: ignore[attr-defined]  # as a GradScaler tells a fused optimizer
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr(step)
        self.optimizer.step()
        self.optimizer.zero_grad()
        for average in self.averages:
            average.update(self.module)
        return {f"{self.name}/grad_norm": norm, f"{self.name}/{SKIPPED}": bad}

    def state(self) -> dict[str, Stateful]:
        """What a checkpoint of this trainable consists of."""
        averages = {f"{self.name}.average{i}": average for i, average in enumerate(self.averages)}
        moments = OptimizerState(self.optimizer)
        return {self.name: TrainableWeights(self.module), f"{self.name}.optimizer": moments, **averages}

    def used(self) -> dict[str, Stateful]:
        """Of its state, what `result` is."""
        name = f"{self.name}.average{len(self.averages) - 1}" if self.averages else self.name
        return {name: self.state()[name]}

    def _roots(self) -> dict[str, nn.Module]:
        """The networks this is made of, each on its own."""
        return (
            dict(self.module.named_children())
            if isinstance(self.module, nn.ModuleDict)
            else {"": self.module}
        )

    def result(self) -> dict[str, Tensor]:
        """The weights to use: the last running average, or the weights themselves if there is none."""
        return self.averages[-1].shadow if self.averages else TrainableWeights(self.module).state_dict()

    @contextmanager
    def as_used(self) -> Iterator[None]:
        """While inside, the module has the weights to use."""
        if not self.averages:  # they are those it has
            yield
            return
        weights = TrainableWeights(self.module)
        before = {name: value.clone() for name, value in weights.state_dict().items()}
        weights.load_state_dict(self.result())
        try:
            yield
        finally:
            weights.load_state_dict(before)


class Trainer(Protocol):
    """What a run plays, step by step."""

    def step(self, real: Batch, step: int) -> Metrics: ...

    def complete(self, step: int) -> bool:
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
    carries: bool = False
    """Whether `generate` goes on from one step to the next, until the student's next turn."""

    def state(self) -> dict[str, Stateful]:
        return self.student.state() | self.critic.state()

    def complete(self, step: int) -> bool:
        return not self.carries or (step + 1) % self.critic_updates == 0

    def step(self, real: Batch, step: int) -> Metrics:
        students_turn = step % self.critic_updates == 0
        parts = real.split(self.micro_batch)
        shares = [len(part.x) / len(real.x) for part in parts]
        fakes, told = [], []
        for part, share in zip(parts, shares, strict=True):
            with torch.set_grad_enabled(students_turn):
                fake = self.generate(part, step)
            if students_turn:
                self.student.reduces(part is parts[-1], last_pass=True)
                told.append(self._student_gradient(fake, share))
            fakes.append(replace(fake, x=fake.x.detach()))
        metrics = _summed(told) | self.student.update(step) if students_turn else {}
        told = [
            self._critic_gradient(fake, part, share, last_part=part is parts[-1])
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

    def _critic_gradient(self, fake: Batch, real: Batch, share: float, last_part: bool) -> Metrics:
        told: list[Losses] = []
        passes = (self.passes or separate_passes(self.terms))(fake, real)
        for compute in passes:
            shares = {name: share * loss for name, loss in compute().items()}
            self.critic.reduces(last_part, last_pass=compute is passes[-1])
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

    def complete(self, step: int) -> bool:
        return True

    def state(self) -> dict[str, Stateful]:
        return self.student.state()

    def step(self, pairs: Batch, step: int) -> Metrics:
        """`pairs.x` is (B, 2, C, H, W): the noise, and the teacher's answer."""
        told, parts = [], pairs.split(self.micro_batch)
        for part in parts:
            eps, answer = part.x.unbind(1)
            timestep = torch.full((len(eps),), self.timestep, device=eps.device)
            x = self.denoiser(self.denoiser.diffusion.schedule.prior_std * eps, timestep, part.cond)
            loss = self.distance(x, answer) * (len(eps) / len(pairs.x))
            self.student.reduces(part is parts[-1], last_pass=True)
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

    def complete(self, step: int) -> bool:
        return True

    def state(self) -> dict[str, Stateful]:
        return self.teacher.state()

    def step(self, real: Batch, step: int) -> Metrics:
        diffusion = self.denoiser.diffusion
        timestep = self.timesteps(real.rng.normal_like(real.x[:, 0, 0, 0]))
        x_t = diffusion.add_noise(real.x, real.rng.normal_like(real.x), timestep)
        target = diffusion.target(real.x, x_t, timestep)
        loss = losses.denoising(self.denoiser.output(x_t, timestep, real.cond), target)
        self.teacher.reduces(last_part=True, last_pass=True)
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
