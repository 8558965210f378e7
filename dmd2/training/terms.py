"""The loss terms of the DMD2 trainer.

A loss term is a pair of losses: one for the student, differentiated at the student's samples, and one for the critic,
computed in one or more passes. The trainer runs exactly the passes that the terms list. The memory estimate and the
plan build the same terms on tensors without data and run the same passes, so they know the cost of a term without
being told. A recipe is a list of terms; `build.TERMS` has one row for each kind.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from dmd2.batch import Batch, Conditioning
from dmd2.config import Section
from dmd2.denoiser import Denoiser
from dmd2.diffusion import Diffusion
from dmd2.models.family import ModelFamily
from dmd2.training import losses

HEAD = "head"
"""Name of the discriminator head among the modules that learn with the critic."""

TeacherPrediction = Callable[[Tensor, Tensor, Batch], Tensor]
"""(x_t, timestep, batch) -> x0 of the teacher, with classifier-free guidance."""

Losses = dict[str, Tensor]
"""Scalar losses by the name of their term."""

FeatureLoss = Callable[[Tensor], Tensor]
"""Features of the critic at the fakes -> a scalar loss of the critic."""


@dataclass(frozen=True)
class CriticPass:
    """Losses of the critic that share one backward pass."""

    name: str
    """Unique among the passes of a recipe; the plan lists costs by it."""
    losses: Callable[[Batch, Batch], Losses]
    """(fake, real) -> losses, whose sum is sent backward."""
    reaches_output: bool
    """True if the critic is called to its output, so that all of its weights get a gradient; False if only to its features."""


class LossTerm(Protocol):
    """A training technique as a pair of losses."""

    name: str

    def student_loss(self, fake: Batch) -> Tensor:
        """A scalar whose gradient with respect to `fake.x` (B, C, H, W) trains the student."""

    def critic_passes(self) -> Sequence[CriticPass]:
        """What the critic has to learn for this term; empty if nothing."""


@dataclass(frozen=True)
class TermInputs:
    """What loss terms are built from."""

    family: ModelFamily
    teacher: TeacherPrediction
    critic: Denoiser
    place: Callable[[Callable[[], nn.Module]], nn.Module]
    """Makes a module that learns with the critic, on the device, sharded where the critic is."""
    critic_modules: nn.ModuleDict
    """All modules that learn with the critic: its network, and those that terms add."""
    feature_losses: dict[str, FeatureLoss] = field(default_factory=dict)
    """Losses on the features that the denoising pass computes anyway, by the name of their term."""

    @property
    def num_timesteps(self) -> int:
        return len(self.critic.diffusion)

    def critic_module(self, name: str, make: Callable[[], nn.Module]) -> nn.Module:
        """A module that learns with the critic, made for the first term that asks for this name."""
        if name not in self.critic_modules:
            self.critic_modules[name] = self.place(make)
        return self.critic_modules[name]


class TermKind(NamedTuple):
    """A row of `build.TERMS`."""

    settings: type[Section]
    """The section of the Config with the term's settings."""
    make: Callable[[TermInputs, Any], LossTerm]
    """(inputs, settings) -> the term."""


class CriticDenoising:
    """The critic learns to denoise the student's samples; the student learns nothing from it. For a GAN without DMD."""

    def __init__(
        self, critic: Denoiser, feature_losses: Mapping[str, FeatureLoss], name: str = "denoising"
    ) -> None:
        """`feature_losses` are losses of other terms on the features of this pass."""
        self.critic = critic
        self.feature_losses = feature_losses
        self.name = name

    def student_loss(self, fake: Batch) -> Tensor:
        return 0 * fake.x.sum()

    def critic_passes(self) -> list[CriticPass]:
        return [CriticPass(f"critic loss {self.name}", self._losses, reaches_output=True)]

    def _losses(self, fake: Batch, real: Batch) -> Losses:
        """The denoising loss on the student's samples (DMD2, sec. 3), and the feature losses of other terms."""
        diffusion = self.critic.diffusion
        x_t, timestep = noise_at_random_timestep(fake, diffusion, 0, len(diffusion))
        target = diffusion.target(fake.x, x_t, timestep)
        if not self.feature_losses:
            return {self.name: losses.denoising(self.critic.output(x_t, timestep, fake.cond), target)}
        out, features = self.critic.output_and_features(x_t, timestep, fake.cond)
        others = {name: loss(features) for name, loss in self.feature_losses.items()}
        return {self.name: losses.denoising(out, target)} | others


class DistributionMatching:
    """DMD: the critic learns the score of the student's samples; the student follows the difference of the scores."""

    name = "dmd"

    def __init__(
        self,
        teacher: TeacherPrediction,
        critic: Denoiser,
        timesteps: tuple[int, int],
        feature_losses: Mapping[str, FeatureLoss] | None = None,
    ) -> None:
        """`timesteps` is the range [low, high) at which the scores are compared. `feature_losses` are losses of other terms
        on the features of the denoising pass."""
        self.teacher = teacher
        self.critic = critic
        self.timesteps = timesteps
        self.denoising = CriticDenoising(critic, {} if feature_losses is None else feature_losses, self.name)

    def student_loss(self, fake: Batch) -> Tensor:
        """The distribution-matching loss (DMD, Yin et al. 2024, eq. 7 and 8)."""
        with torch.no_grad():
            x_t, timestep = noise_at_random_timestep(fake, self.critic.diffusion, *self.timesteps)
            x0_teacher = self.teacher(x_t, timestep, fake)
            x0_critic = self.critic(x_t, timestep, fake.cond)
        return losses.distribution_matching(fake.x, x0_teacher, x0_critic)

    def critic_passes(self) -> list[CriticPass]:
        return self.denoising.critic_passes()


class Adversarial:
    """GAN: a discriminator head on the critic's features learns to tell real from fake samples under noise."""

    name = "gan"

    def __init__(
        self,
        critic: Denoiser,
        head: nn.Module,
        max_timestep: int,
        student_weight: float,
        critic_weight: float,
        reuse_denoising_pass: bool = False,
    ) -> None:
        """With `reuse_denoising_pass`, `fake_loss` is left to the denoising pass of another term."""
        self.critic = critic
        self.head = head
        self.max_timestep = max_timestep
        self.student_weight = student_weight
        self.critic_weight = critic_weight
        self.reuse_denoising_pass = reuse_denoising_pass

    def student_loss(self, fake: Batch) -> Tensor:
        """The weighted non-saturating loss (DMD2, eq. 4)."""
        return self.student_weight * losses.gan_student(self._logits(*self._add_noise(fake)))

    def critic_passes(self) -> list[CriticPass]:
        loss = self._real_loss if self.reuse_denoising_pass else self._real_and_fake_loss
        return [CriticPass(f"critic loss {self.name}", loss, reaches_output=False)]

    def fake_loss(self, features: Tensor) -> Tensor:
        """The discriminator's weighted loss on the critic's features (B, ...) of fake samples."""
        return self.critic_weight * losses.gan_fake(self.head(features))

    def _real_and_fake_loss(self, fake: Batch, real: Batch) -> Losses:
        """Both halves of the discriminator's loss (DMD2, eq. 4), from one forward pass of twice the batch."""
        (x_real, timestep_real, cond_real), (x_fake, timestep_fake, cond_fake) = (
            self._add_noise(real),
            self._add_noise(fake),
        )
        logits = self._logits(
            torch.cat([x_real, x_fake]), torch.cat([timestep_real, timestep_fake]), cond_real.cat(cond_fake)
        )
        loss = losses.gan_critic(*logits.split([len(x_real), len(x_fake)]))
        return {self.name: self.critic_weight * loss}

    def _real_loss(self, fake: Batch, real: Batch) -> Losses:
        return {self.name: self.critic_weight * losses.gan_real(self._logits(*self._add_noise(real)))}

    def _add_noise(self, batch: Batch) -> tuple[Tensor, Tensor, Conditioning]:
        """(x_t, timestep, cond) at a random timestep below `max_timestep`."""
        return *noise_at_random_timestep(batch, self.critic.diffusion, 0, self.max_timestep), batch.cond

    def _logits(self, x_t: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
        logits: Tensor = self.head(self.critic.features(x_t, timestep, cond))
        return logits


def critic_passes(terms: Sequence[LossTerm]) -> list[CriticPass]:
    """The critic's passes of a step, in the order in which they run.

    Those that reach the critic's output come last, so that after the last pass every gradient is complete and can be
    reduced over the processes. Otherwise the last term comes first.
    """
    passes = [one for term in reversed(terms) for one in term.critic_passes()]
    names = [one.name for one in passes]
    if len(set(names)) < len(names):
        raise ValueError(
            f"two critic passes have the same name among {names}; give each term a name of its own"
        )
    return sorted(passes, key=lambda one: one.reaches_output)


def noise_at_random_timestep(
    batch: Batch, diffusion: Diffusion, low: int, high: int
) -> tuple[Tensor, Tensor]:
    """Fresh noise at a timestep drawn from [low, high) for each row -> x_t (B, C, H, W), timestep (B,)."""
    timestep = batch.rng.integers(low, high, batch.x)
    return diffusion.add_noise(batch.x, batch.rng.normal_like(batch.x), timestep), timestep
