"""DMD2 played plainly, as the published loop is described: what the engine's speed is compared with.

The critic denoises, judges fakes and judges real samples in three passes; the student's loss is a surrogate whose gradient
goes back through critic and student at once, while the critic is frozen; norms, updates and averages are taken tensor by
tensor; tables are looked up whenever they are needed. The networks are the library's, and so is the order in which
random numbers are drawn: in float32 both come to the same weights (`tests/bench/test_baseline.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmd2.batch import Batch, Conditioning
from dmd2.config import Config, EdmConfig, OptimizerConfig
from dmd2.models.family import ModelFamily
from dmd2.rng import draw_shared

View = tuple[Tensor, Tensor, Tensor]
"""x_t, its timestep, and the noise in it."""


@dataclass
class Process:
    """The family's noise levels and the reading of its network's output, looked up in the tables at every use."""

    family: ModelFamily

    def at(self, table: Tensor, timestep: Tensor) -> Tensor:
        return table.to(timestep.device, torch.float32)[timestep].reshape(-1, 1, 1, 1)

    def noised(self, x: Tensor, eps: Tensor, timestep: Tensor) -> Tensor:
        schedule = self.family.diffusion.schedule
        return self.at(schedule.alpha, timestep) * x + self.at(schedule.sigma, timestep) * eps

    def out(self, network: nn.Module, x_t: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
        out: Tensor = network(*self._inputs(x_t, timestep), cond)
        return out

    def features(self, network: nn.Module, x_t: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
        """Of the bottleneck; what comes after it is not computed."""
        features: Tensor = network(*self._inputs(x_t, timestep), cond, features_only=True)
        return features

    def x0(self, out: Tensor, x_t: Tensor, timestep: Tensor) -> Tensor:
        reading = self.family.diffusion.coefficients
        return self.at(reading.skip, timestep) * x_t + self.at(reading.scale, timestep) * out

    def _inputs(self, x_t: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
        diffusion = self.family.diffusion
        return self.at(diffusion.coefficients.gain, timestep) * x_t, self.at(
            diffusion.schedule.time, timestep
        ).flatten()


@dataclass
class Learner:
    """Parameters, and what follows their gradient, one tensor after the other."""

    parameters: list[nn.Parameter]
    settings: OptimizerConfig
    steps: int
    updates: int = 0

    def __post_init__(self) -> None:
        self.optimizer = self._optimizer(foreach=False, fused=False)
        self.emas = [[p.detach().clone() for p in self.parameters] for _ in self.settings.ema]

    def follow(self, step: int) -> float:
        """The norm of the gradient that was followed."""
        norm = self._clip()
        for group in self.optimizer.param_groups:
            group["lr"] = self._rate(step)
        self.optimizer.step()
        for decay, average in zip(self.settings.ema, self.emas, strict=True):
            self._average(average, min(decay, (1 + self.updates) / (10 + self.updates)))
        self.updates += 1
        return norm.item()

    def _optimizer(self, **how: bool) -> torch.optim.Optimizer:
        s = self.settings
        return torch.optim.AdamW(self.parameters, s.lr, s.betas, weight_decay=s.weight_decay, **how)

    def _clip(self) -> Tensor:
        return nn.utils.clip_grad_norm_(self.parameters, self.settings.max_grad_norm, foreach=False)

    @torch.no_grad()
    def _average(self, average: list[Tensor], kept: float) -> None:
        for mean, p in zip(average, self.parameters, strict=True):
            mean.mul_(kept).add_(p, alpha=1 - kept)

    def _rate(self, step: int) -> float:
        s = self.settings
        if step < s.warmup_steps:
            return s.lr * (step + 1) / s.warmup_steps
        share = (step - s.warmup_steps) / max(1, self.steps - s.warmup_steps)
        return s.lr * (1 + share * (s.final_lr_ratio - 1))


class Baseline:
    """Both trainables, each with a copy of the teacher's weights."""

    learner = Learner

    def __init__(
        self, config: Config, family: ModelFamily, teacher: Mapping[str, Tensor], head: Mapping[str, Tensor]
    ) -> None:
        """`head` are the weights the GAN's starts with; empty without a GAN."""
        settings = config.distill
        assert settings.dmd
        assert not settings.lora
        assert not settings.continue_rollouts
        assert settings.inputs == "rollout"
        assert settings.dtype == "float32"
        self.seed, self.family, self.settings = config.seed, family, settings
        self.matching, self.gan = settings.dmd, settings.gan
        self.sigma_data = config.family.sigma_data if isinstance(config.family, EdmConfig) else None
        self.process = Process(family)
        self.teacher, self.student, self.critic = (family.network() for _ in range(3))
        for network in (self.teacher, self.student, self.critic):
            network.load_state_dict(teacher)
        self.teacher.requires_grad_(False)
        self.judges = nn.ModuleDict({"network": self.critic})
        if self.gan:
            self.head = family.head()
            self.head.load_state_dict(head)
            self.judges["head"] = self.head
        self.students = self.learner(list(self.student.parameters()), settings.student, settings.steps)
        self.critics = self.learner(list(self.judges.parameters()), settings.critic, settings.steps)

    def step(self, real: Batch, step: int) -> dict[str, float]:
        """Losses and norms."""
        students_turn = step % self.settings.critic_updates == 0
        with torch.set_grad_enabled(students_turn):
            x = self.rollout(real, step)
        told = self._students_turn(x, real, step) if students_turn else {}
        return told | self._critics_turn(x.detach(), real, step)

    def rollout(self, real: Batch, step: int) -> Tensor:
        """Steps of the student to one that is drawn, of which only the last has a gradient."""
        timesteps = self.settings.student_timesteps
        stop = draw_shared(self.seed, step, len(timesteps))
        x_t = self.family.diffusion.schedule.prior_std * real.rng.normal_like(real.x)
        for timestep, following in pairwise(timesteps[: stop + 1]):
            with torch.no_grad():
                x = self._x0(self.student, x_t, self._all(timestep, real), real.cond)
                x_t = self.process.noised(x, real.rng.normal_like(x), self._all(following, real))
        return self._x0(self.student, x_t, self._all(timesteps[stop], real), real.cond)

    def _students_turn(self, x: Tensor, real: Batch, step: int) -> dict[str, float]:
        self.judges.requires_grad_(False)
        losses = {"student/dmd": self._distribution_matching(x, real)}
        if self.gan:
            x_t, timestep, _ = self._look(x, real, 0, self._gan_timesteps(self.gan.max_timestep_fraction))
            logits = self._judged(x_t, timestep, real.cond)
            losses["student/gan"] = self.gan.student_weight * F.softplus(-logits).mean()
        _added(losses).backward()
        norm = self.students.follow(step)
        self.judges.requires_grad_(True)
        self._forget()
        return {name: loss.item() for name, loss in losses.items()} | {"student/grad_norm": norm}

    def _critics_turn(self, x: Tensor, real: Batch, step: int) -> dict[str, float]:
        views = {}
        if self.gan:
            top = self._gan_timesteps(self.gan.max_timestep_fraction)
            views = {"real": self._look(real.x, real, 0, top), "fake": self._look(x, real, 0, top)}
        losses = {"critic/dmd": self._denoising(x, self._look(x, real, 0, self._timesteps), real.cond)}
        if self.gan:
            fake, of_real = self._both_judged(views["fake"], views["real"], real.cond)
            both = F.softplus(fake).mean() + F.softplus(-of_real).mean()
            losses["critic/gan"] = self.gan.critic_weight * both
        _added(losses).backward()
        norm = self.critics.follow(step)
        self._forget()
        return {name: loss.item() for name, loss in losses.items()} | {"critic/grad_norm": norm}

    def _distribution_matching(self, x: Tensor, real: Batch) -> Tensor:
        low = int(self.matching.min_timestep_fraction * self._timesteps)
        high = min(self._timesteps, int(self.matching.max_timestep_fraction * self._timesteps) + 1)
        with torch.no_grad():
            x_t, timestep, _ = self._look(x, real, low, high)
            of_critic = self._x0(self.critic, x_t, timestep, real.cond)
            of_teacher = self._guided(x_t, timestep, real)
            distance = (x - of_teacher).abs().mean(dim=(1, 2, 3), keepdim=True)
            gradient = torch.nan_to_num((of_critic - of_teacher) / distance)
        return 0.5 * F.mse_loss(x, (x - gradient).detach())

    def _guided(self, x_t: Tensor, timestep: Tensor, real: Batch) -> Tensor:
        scale = self.settings.guidance
        if scale == 1:
            return self._x0(self.teacher, x_t, timestep, real.cond)
        without, shown = self._two_outs(x_t, timestep, real)
        return self.process.x0(without + scale * (shown - without), x_t, timestep)

    def _two_outs(self, x_t: Tensor, timestep: Tensor, real: Batch) -> tuple[Tensor, Tensor]:
        """Of the teacher, without a condition and with it, as a batch of twice the size."""
        cond = real.uncond.cat(real.cond)
        both = self.process.out(self.teacher, torch.cat([x_t, x_t]), torch.cat([timestep, timestep]), cond)
        without, shown = both.chunk(2)
        return without, shown

    def _denoising(self, x: Tensor, view: View, cond: Conditioning) -> Tensor:
        """EDM's weighted error of x0, or that of the noise."""
        x_t, timestep, eps = view
        out = self.process.out(self.critic, x_t, timestep, cond)
        if self.sigma_data is None:
            return F.mse_loss(out, eps)
        sigma = self.process.at(self.family.diffusion.schedule.sigma, timestep)
        weight = sigma**-2 + self.sigma_data**-2
        return (weight * (self.process.x0(out, x_t, timestep) - x) ** 2).mean()

    def _both_judged(self, fake: View, real: View, cond: Conditioning) -> tuple[Tensor, Tensor]:
        return self._judged(*fake[:2], cond), self._judged(*real[:2], cond)

    def _judged(self, x_t: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
        logits: Tensor = self.head(self.process.features(self.critic, x_t, timestep, cond))
        return logits

    def _x0(self, network: nn.Module, x_t: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
        return self.process.x0(self.process.out(network, x_t, timestep, cond), x_t, timestep)

    def _look(self, x: Tensor, sample: Batch, low: int, high: int) -> View:
        timestep = sample.rng.integers(low, high, x)
        eps = sample.rng.normal_like(x)
        return self.process.noised(x, eps, timestep), timestep, eps

    @property
    def _timesteps(self) -> int:
        return len(self.family.diffusion)

    def _gan_timesteps(self, share: float) -> int:
        return max(1, round(share * self._timesteps))

    def _all(self, timestep: int, sample: Batch) -> Tensor:
        return torch.full((len(sample.x),), timestep, device=sample.x.device)

    def _forget(self) -> None:
        self.students.optimizer.zero_grad()
        self.critics.optimizer.zero_grad()


def _added(losses: Mapping[str, Tensor]) -> Tensor:
    return torch.stack(list(losses.values())).sum()
