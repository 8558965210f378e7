"""The loss terms of the DMD2 trainer.

A term is a pair of losses: what it asks of the student, and what the critic has to learn so that
it can go on asking. A recipe is a list of terms; to leave a technique out is to leave its term out
of the list. The critic's losses come in passes, each sent backward before the next is computed: the graph of one is
gone when the next is built, and the pass that reaches the whole network is the last.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from dmd2.batch import Batch, Conditioning
from dmd2.denoiser import Denoiser
from dmd2.diffusion import Diffusion
from dmd2.training import losses

TeacherPrediction = Callable[[Tensor, Tensor, Batch], Tensor]
"""(x_t, timestep, sample) -> x0, guidance included."""

Losses = dict[str, Tensor]
"""By the name of the term."""

CriticPasses = Callable[[Batch, Batch], list[Callable[[], Losses]]]
"""(fake, real) -> what computes the critic's losses, pass by pass."""


class LossTerm(Protocol):
    name: str

    def student_loss(self, fake: Batch) -> Tensor: ...

    def critic_loss(self, fake: Batch, real: Batch) -> Tensor: ...


class DistributionMatching:
    """DMD: the critic learns the score of the student's samples; the student follows the difference."""

    name = "dmd"

    def __init__(self, teacher: TeacherPrediction, critic: Denoiser, timesteps: tuple[int, int]) -> None:
        self.teacher = teacher
        self.critic = critic
        self.timesteps = timesteps

    def student_loss(self, fake: Batch) -> Tensor:
        with torch.no_grad():
            x_t, timestep = noise_at_random_timestep(fake, self.critic.diffusion, *self.timesteps)
            x0_teacher = self.teacher(x_t, timestep, fake)
            x0_critic = self.critic(x_t, timestep, fake.cond)
        return losses.distribution_matching(fake.x, x0_teacher, x0_critic)

    def critic_loss(self, fake: Batch, real: Batch) -> Tensor:
        x_t, timestep, target = self._task(fake)
        return losses.denoising(self.critic.output(x_t, timestep, fake.cond), target)

    def critic_loss_and_features(self, fake: Batch) -> tuple[Tensor, Tensor]:
        """The critic's loss, and the features it had on the way."""
        x_t, timestep, target = self._task(fake)
        out, features = self.critic.output_and_features(x_t, timestep, fake.cond)
        return losses.denoising(out, target), features

    def _task(self, fake: Batch) -> tuple[Tensor, Tensor, Tensor]:
        diffusion = self.critic.diffusion
        x_t, timestep = noise_at_random_timestep(fake, diffusion, 0, len(diffusion))
        return x_t, timestep, diffusion.target(fake.x, x_t, timestep)


class Adversarial:
    """GAN: a head on the critic's features learns real from generated, under noise."""

    name = "gan"

    def __init__(
        self,
        critic: Denoiser,
        head: nn.Module,
        max_timestep: int,
        student_weight: float,
        critic_weight: float,
    ) -> None:
        self.critic = critic
        self.head = head
        self.max_timestep = max_timestep
        self.student_weight = student_weight
        self.critic_weight = critic_weight

    def student_loss(self, fake: Batch) -> Tensor:
        return self.student_weight * losses.gan_student(self._logits(*self._look(fake)))

    def critic_loss(self, fake: Batch, real: Batch) -> Tensor:
        """Real and fake go through the network together."""
        (x_real, timestep_real, cond_real), (x_fake, timestep_fake, cond_fake) = (
            self._look(real),
            self._look(fake),
        )
        logits = self._logits(
            torch.cat([x_real, x_fake]), torch.cat([timestep_real, timestep_fake]), cond_real.cat(cond_fake)
        )
        return self.critic_weight * losses.gan_critic(*logits.split([len(x_real), len(x_fake)]))

    def real_loss(self, real: Batch) -> Tensor:
        return self.critic_weight * losses.gan_real(self._logits(*self._look(real)))

    def fake_loss(self, features: Tensor) -> Tensor:
        return self.critic_weight * losses.gan_fake(self.head(features))

    def _look(self, sample: Batch) -> tuple[Tensor, Tensor, Conditioning]:
        return *noise_at_random_timestep(sample, self.critic.diffusion, 0, self.max_timestep), sample.cond

    def _logits(self, x_t: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
        logits: Tensor = self.head(self.critic.features(x_t, timestep, cond))
        return logits


def separate_passes(terms: Sequence[LossTerm]) -> CriticPasses:
    """Each term looks for itself. The first one listed reaches the whole network, so it comes last."""

    def one(term: LossTerm, fake: Batch, real: Batch) -> Losses:
        return {term.name: term.critic_loss(fake, real)}

    return lambda fake, real: [partial(one, term, fake, real) for term in reversed(terms)]


def shared_noise_passes(matching: DistributionMatching, adversarial: Adversarial) -> CriticPasses:
    """The fakes that the head sees are those of the denoising loss, under the same noise: one pass less."""

    def of_real(real: Batch) -> Losses:
        return {adversarial.name: adversarial.real_loss(real)}

    def of_fake(fake: Batch) -> Losses:
        denoising, features = matching.critic_loss_and_features(fake)
        return {matching.name: denoising, adversarial.name: adversarial.fake_loss(features)}

    return lambda fake, real: [partial(of_real, real), partial(of_fake, fake)]


def noise_at_random_timestep(
    sample: Batch, diffusion: Diffusion, low: int, high: int
) -> tuple[Tensor, Tensor]:
    """A sample under fresh noise of a timestep drawn from [low, high) for each row -> (x_t, timestep)."""
    timestep = sample.rng.integers(low, high, sample.x)
    return diffusion.add_noise(sample.x, sample.rng.normal_like(sample.x), timestep), timestep
