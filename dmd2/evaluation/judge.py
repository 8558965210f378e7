"""How good a student is while it is made: at each checkpoint, the distance of its samples from training samples.

Every process draws an equal share of them, the same samples whatever the number of processes; what travels between these
are sums over features and their products, in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dmd2.data.stream import Batch
from dmd2.evaluation.features import Features
from dmd2.models.family import ModelFamily, Prompt
from dmd2.parallel import World
from dmd2.rng import Rng

PART = 16
"""Samples that share a seed and a network call."""


class Gaussian(NamedTuple):
    """What a set of features is seen as."""

    mean: Tensor
    """(D,), float64."""
    covariance: Tensor
    """(D, D)."""


@dataclass(frozen=True)
class Judge:
    """Scores the student as it is: the less, the better."""

    features: Features
    draw: Callable[[Sequence[Prompt], int], Tensor]
    """(prompts, seed) -> images of the student, uint8 (N, C, H, W)."""
    prompts: Sequence[Prompt]
    """One for each sample."""
    seed: int
    real: Gaussian
    """The training samples."""
    world: World

    def __call__(self, say: Callable[[str], None]) -> float:
        """The Frechet distance, known to the main process; `say` is told how far this one is."""
        drawn = gaussian(self._parts(say), self.world)
        return distance(drawn, self.real) if self.world.main else math.nan

    def _parts(self, say: Callable[[str], None]) -> Iterator[np.ndarray]:
        """Features of this process's samples. Where networks are divided all must make as many calls, so that some draw what
        then does not count."""
        count, size = len(self.prompts), self.world.size
        for part in range(self.world.rank, size * math.ceil(count / (PART * size)), size):
            rows = range(part * PART, (part + 1) * PART)
            images = self.draw([self.prompts[row % count] for row in rows], self.seed * 1_000_003 + rows[0])
            say(f"judging, {min(rows.stop, count)} of {count} samples")
            yield self.features.of(images)[: max(0, count - rows[0])]


def of_training(batch: Batch, family: ModelFamily, features: Features, seed: int, world: World) -> Gaussian:
    """The samples of a batch, as the family makes images of them."""

    def parts() -> Iterator[np.ndarray]:
        for start in range(world.rank * PART, len(batch.image), world.size * PART):
            rows = range(start, min(start + PART, len(batch.image)))
            part = Batch(
                batch.image[start : rows.stop], batch.label[start : rows.stop], batch.text[start : rows.stop]
            )
            yield features.of(family.decode(family.read(part, Rng.at(seed, 0, rows, world.device)).x).cpu())

    return gaussian(parts(), world)


def gaussian(parts: Iterable[np.ndarray], world: World) -> Gaussian:
    """Of features (N, D) that come part by part, and of which each process has some."""
    total: np.ndarray | float = 0.0
    for features in parts:
        counted = np.concatenate([np.ones((len(features), 1)), features], axis=1)
        total = total + counted.T @ counted
    sums = world.sum(torch.from_numpy(total))
    count, mean = sums[0, 0], sums[0, 1:] / sums[0, 0]
    return Gaussian(mean, (sums[1:, 1:] - count * torch.outer(mean, mean)) / (count - 1))


def distance(a: Gaussian, b: Gaussian) -> float:
    """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_b^1/2 C_a C_b^1/2)^1/2), the Frechet distance (Heusel et al. 2017, eq. 6). By the
    eigenvalues of symmetric matrices, a quarter of the time of clean-fid's square root, while everybody waits."""
    values, vectors = torch.linalg.eigh(b.covariance)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    shared = torch.linalg.eigvalsh(root @ a.covariance @ root).clamp(min=0).sqrt().sum()
    apart = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace()
    return float(apart - 2 * shared)
