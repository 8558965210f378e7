"""The terms of the game between student and critic.

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

from dmd2.batch import Conditioning, Sample
from dmd2.denoiser import Denoiser
from dmd2.diffusion import Diffusion
from dmd2.training import losses

Teacher = Callable[[Tensor, Tensor, Sample], Tensor]
"""(x_t, level, sample) -> x0, guidance included."""

Losses = dict[str, Tensor]
"""By the name of the term."""

CriticPasses = Callable[[Sample, Sample], list[Callable[[], Losses]]]
"""(fake, real) -> what computes the critic's losses, pass by pass."""


class Term(Protocol):
    name: str

    def student_loss(self, fake: Sample) -> Tensor: ...

    def critic_loss(self, fake: Sample, real: Sample) -> Tensor: ...


class DistributionMatching:
    """DMD: the critic learns the score of the student's samples; the student follows the difference."""

    name = "dmd"

    def __init__(self, teacher: Teacher, critic: Denoiser, levels: tuple[int, int]) -> None:
        self.teacher = teacher
        self.critic = critic
        self.levels = levels

    def student_loss(self, fake: Sample) -> Tensor:
        with torch.no_grad():
            x_t, level = look(fake, self.critic.diffusion, *self.levels)
            x0_teacher = self.teacher(x_t, level, fake)
            x0_critic = self.critic(x_t, level, fake.cond)
        return losses.distribution_matching(fake.x, x0_teacher, x0_critic)

    def critic_loss(self, fake: Sample, real: Sample) -> Tensor:
        x_t, level, target = self._task(fake)
        return losses.denoising(self.critic.output(x_t, level, fake.cond), target)

    def seen(self, fake: Sample) -> tuple[Tensor, Tensor]:
        """The critic's loss, and the features it had on the way."""
        x_t, level, target = self._task(fake)
        out, features = self.critic.output_and_features(x_t, level, fake.cond)
        return losses.denoising(out, target), features

    def _task(self, fake: Sample) -> tuple[Tensor, Tensor, Tensor]:
        diffusion = self.critic.diffusion
        x_t, level = look(fake, diffusion, 0, len(diffusion))
        return x_t, level, diffusion.target(fake.x, x_t, level)


class Adversarial:
    """GAN: a head on the critic's features learns real from generated, under noise."""

    name = "gan"

    def __init__(
        self, critic: Denoiser, head: nn.Module, max_level: int, student_weight: float, critic_weight: float
    ) -> None:
        self.critic = critic
        self.head = head
        self.max_level = max_level
        self.student_weight = student_weight
        self.critic_weight = critic_weight

    def student_loss(self, fake: Sample) -> Tensor:
        return self.student_weight * losses.gan_student(self._logits(*self._look(fake)))

    def critic_loss(self, fake: Sample, real: Sample) -> Tensor:
        """Real and fake go through the network together."""
        (x_real, level_real, cond_real), (x_fake, level_fake, cond_fake) = self._look(real), self._look(fake)
        logits = self._logits(
            torch.cat([x_real, x_fake]), torch.cat([level_real, level_fake]), cond_real.cat(cond_fake)
        )
        return self.critic_weight * losses.gan_critic(*logits.split([len(x_real), len(x_fake)]))

    def real_loss(self, real: Sample) -> Tensor:
        return self.critic_weight * losses.gan_real(self._logits(*self._look(real)))

    def fake_loss(self, features: Tensor) -> Tensor:
        return self.critic_weight * losses.gan_fake(self.head(features))

    def _look(self, sample: Sample) -> tuple[Tensor, Tensor, Conditioning]:
        return *look(sample, self.critic.diffusion, 0, self.max_level), sample.cond

    def _logits(self, x_t: Tensor, level: Tensor, cond: Conditioning) -> Tensor:
        logits: Tensor = self.head(self.critic.features(x_t, level, cond))
        return logits


def apart(terms: Sequence[Term]) -> CriticPasses:
    """Each term looks for itself. The first one listed reaches the whole network, so it comes last."""

    def one(term: Term, fake: Sample, real: Sample) -> Losses:
        return {term.name: term.critic_loss(fake, real)}

    return lambda fake, real: [partial(one, term, fake, real) for term in reversed(terms)]


def shared_view(matching: DistributionMatching, adversarial: Adversarial) -> CriticPasses:
    """The fakes that the head sees are those of the denoising loss, under the same noise: one pass less."""

    def of_real(real: Sample) -> Losses:
        return {adversarial.name: adversarial.real_loss(real)}

    def of_fake(fake: Sample) -> Losses:
        denoising, features = matching.seen(fake)
        return {matching.name: denoising, adversarial.name: adversarial.fake_loss(features)}

    return lambda fake, real: [partial(of_real, real), partial(of_fake, fake)]


def look(sample: Sample, diffusion: Diffusion, low: int, high: int) -> tuple[Tensor, Tensor]:
    """A sample under fresh noise of a level drawn from [low, high) for each row -> (x_t, level)."""
    level = sample.rng.integers(low, high, sample.x)
    return diffusion.add_noise(sample.x, sample.rng.normal_like(sample.x), level), level
