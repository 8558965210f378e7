"""A plain implementation of the published DMD2 loop, with which the engine's speed is compared.

The critic has three passes: denoising, discriminator on fake and on real samples. The student's gradient goes through the
frozen critic and the student in one backward pass. Gradient norms, optimizer steps and EMAs are computed tensor by tensor,
and noise tables are read at every use. The networks and the order of random draws are those of the library, so in float32
both reach the same weights (`tests/bench/test_baseline.py`).
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

NoisedSamples = tuple[Tensor, Tensor, Tensor]
"""(x_t, timestep, eps)."""


@dataclass
class Process:
    """The family's noise schedule and output parametrization, read from the tables at every use."""

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
        """Bottleneck features, without computing the decoder."""
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
    """Parameters with AdamW, gradient clipping and EMAs, one tensor after the other."""

    parameters: list[nn.Parameter]
    settings: OptimizerConfig
    steps: int
    updates: int = 0

    def __post_init__(self) -> None:
        self.optimizer = self._optimizer(foreach=False, fused=False)
        self.emas = [[p.detach().clone() for p in self.parameters] for _ in self.settings.ema]

    def update(self, step: int) -> float:
        """One optimizer step; returns the norm of the gradient before clipping."""
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
        fraction = (step - s.warmup_steps) / max(1, self.steps - s.warmup_steps)
        return s.lr * (1 + fraction * (s.final_lr_ratio - 1))


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
        self.critic_modules = nn.ModuleDict({"network": self.critic})
        if self.gan:
            self.head = family.head()
            self.head.load_state_dict(head)
            self.critic_modules["head"] = self.head
        self.students = self.learner(list(self.student.parameters()), settings.student, settings.steps)
        self.critics = self.learner(list(self.critic_modules.parameters()), settings.critic, settings.steps)

    def step(self, real: Batch, step: int) -> dict[str, float]:
        """Losses and norms."""
        student_turn = step % self.settings.critic_updates == 0
        with torch.set_grad_enabled(student_turn):
            x = self.rollout(real, step)
        metrics = self._student_turn(x, real, step) if student_turn else {}
        return metrics | self._critic_turn(x.detach(), real, step)

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

    def _student_turn(self, x: Tensor, real: Batch, step: int) -> dict[str, float]:
        self.critic_modules.requires_grad_(False)
        losses = {"student/dmd": self._distribution_matching(x, real)}
        if self.gan:
            x_t, timestep, _ = self._add_noise(
                x, real, 0, self._num_gan_timesteps(self.gan.max_timestep_fraction)
            )
            logits = self._logits(x_t, timestep, real.cond)
            losses["student/gan"] = self.gan.student_weight * F.softplus(-logits).mean()
        _added(losses).backward()
        norm = self.students.update(step)
        self.critic_modules.requires_grad_(True)
        self._zero_grad()
        return {name: loss.item() for name, loss in losses.items()} | {"student/grad_norm": norm}

    def _critic_turn(self, x: Tensor, real: Batch, step: int) -> dict[str, float]:
        noised = {}
        if self.gan:
            top = self._num_gan_timesteps(self.gan.max_timestep_fraction)
            noised = {"real": self._add_noise(real.x, real, 0, top), "fake": self._add_noise(x, real, 0, top)}
        losses = {
            "critic/dmd": self._denoising(x, self._add_noise(x, real, 0, self._num_timesteps), real.cond)
        }
        if self.gan:
            fake_logits, real_logits = self._both_logits(noised["fake"], noised["real"], real.cond)
            both = F.softplus(fake_logits).mean() + F.softplus(-real_logits).mean()
            losses["critic/gan"] = self.gan.critic_weight * both
        _added(losses).backward()
        norm = self.critics.update(step)
        self._zero_grad()
        return {name: loss.item() for name, loss in losses.items()} | {"critic/grad_norm": norm}

    def _distribution_matching(self, x: Tensor, real: Batch) -> Tensor:
        low = int(self.matching.min_timestep_fraction * self._num_timesteps)
        high = min(self._num_timesteps, int(self.matching.max_timestep_fraction * self._num_timesteps) + 1)
        with torch.no_grad():
            x_t, timestep, _ = self._add_noise(x, real, low, high)
            of_critic = self._x0(self.critic, x_t, timestep, real.cond)
            of_teacher = self._guided(x_t, timestep, real)
            distance = (x - of_teacher).abs().mean(dim=(1, 2, 3), keepdim=True)
            gradient = torch.nan_to_num((of_critic - of_teacher) / distance)
        return 0.5 * F.mse_loss(x, (x - gradient).detach())

    def _guided(self, x_t: Tensor, timestep: Tensor, real: Batch) -> Tensor:
        scale = self.settings.guidance
        if scale == 1:
            return self._x0(self.teacher, x_t, timestep, real.cond)
        unconditional, conditional = self._unconditional_and_conditional(x_t, timestep, real)
        return self.process.x0(unconditional + scale * (conditional - unconditional), x_t, timestep)

    def _unconditional_and_conditional(
        self, x_t: Tensor, timestep: Tensor, real: Batch
    ) -> tuple[Tensor, Tensor]:
        """Of the teacher, without a condition and with it, as a batch of twice the size."""
        cond = real.uncond.cat(real.cond)
        both = self.process.out(self.teacher, torch.cat([x_t, x_t]), torch.cat([timestep, timestep]), cond)
        unconditional, conditional = both.chunk(2)
        return unconditional, conditional

    def _denoising(self, x: Tensor, noised: NoisedSamples, cond: Conditioning) -> Tensor:
        """EDM's weighted error of x0, or that of the noise."""
        x_t, timestep, eps = noised
        out = self.process.out(self.critic, x_t, timestep, cond)
        if self.sigma_data is None:
            return F.mse_loss(out, eps)
        sigma = self.process.at(self.family.diffusion.schedule.sigma, timestep)
        weight = sigma**-2 + self.sigma_data**-2
        return (weight * (self.process.x0(out, x_t, timestep) - x) ** 2).mean()

    def _both_logits(
        self, fake: NoisedSamples, real: NoisedSamples, cond: Conditioning
    ) -> tuple[Tensor, Tensor]:
        return self._logits(*fake[:2], cond), self._logits(*real[:2], cond)

    def _logits(self, x_t: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
        logits: Tensor = self.head(self.process.features(self.critic, x_t, timestep, cond))
        return logits

    def _x0(self, network: nn.Module, x_t: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
        return self.process.x0(self.process.out(network, x_t, timestep, cond), x_t, timestep)

    def _add_noise(self, x: Tensor, sample: Batch, low: int, high: int) -> NoisedSamples:
        timestep = sample.rng.integers(low, high, x)
        eps = sample.rng.normal_like(x)
        return self.process.noised(x, eps, timestep), timestep, eps

    @property
    def _num_timesteps(self) -> int:
        return len(self.family.diffusion)

    def _num_gan_timesteps(self, fraction: float) -> int:
        return max(1, round(fraction * self._num_timesteps))

    def _all(self, timestep: int, sample: Batch) -> Tensor:
        return torch.full((len(sample.x),), timestep, device=sample.x.device)

    def _zero_grad(self) -> None:
        self.students.optimizer.zero_grad()
        self.critics.optimizer.zero_grad()


def _added(losses: Mapping[str, Tensor]) -> Tensor:
    return torch.stack(list(losses.values())).sum()
