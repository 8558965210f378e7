"""How good a student is while it is made: at each checkpoint, the distance of its samples from training samples.

Every process draws an equal share of them, the same samples whatever the number of processes; what travels between these
are sums over features and their products, in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dmd2.config import BestConfig
from dmd2.data.loader import RawBatch, Shards
from dmd2.errors import Refused
from dmd2.evaluation.features import Features
from dmd2.models.family import ModelFamily, Prompt
from dmd2.parallel.ranks import World
from dmd2.rng import Rng, seed_of_part

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
    prompts: Mapping[range, Sequence[Prompt]]
    """Of this process's samples, by their rows, `PART` at a time."""
    count: int
    """Samples that all processes draw together."""
    seed: int
    real: Gaussian
    """The training samples."""
    world: World

    def __call__(self, say: Callable[[str], None]) -> float:
        """The Frechet distance, known to the main process; `say` is told how far this one is, by all equally often."""
        drawn = gaussian(self._parts(say), self.world)
        return distance(drawn, self.real) if self.world.is_main else math.nan

    def images(self, rows: range) -> Tensor:
        return self.draw(self.prompts[rows], seed_of_part(self.seed, rows.start))

    def _parts(self, say: Callable[[str], None]) -> Iterator[np.ndarray]:
        for rows in self.prompts:
            images = self.images(rows)
            say(f"judging, {min(rows.stop, self.count)} of {self.count} samples")
            yield self.features.of(images)[: max(0, self.count - rows.start)]


def judge(
    settings: BestConfig,
    features: Features,
    draw: Callable[[Sequence[Prompt], int], Tensor],
    shards: Shards,
    family: ModelFamily,
    shown: Callable[[range, RawBatch], Sequence[Prompt]],
    world: World,
) -> Judge:
    """One that compares with training samples; `shown` tells what to draw beside some of them. Draws once, so that what cannot
    be drawn is told before the first step."""
    there = min(settings.images, len(shards))
    if there < 2:
        raise Refused(
            f"{shards.uri} has {there} training image; checkpoints cannot be judged by fewer than 2"
        )
    at, prompts = places(there, shards), {}

    def parts() -> Iterator[np.ndarray]:
        for rows in own(settings.images, world):
            batch = shards.select([at[row % there] for row in rows])
            prompts[rows] = shown(rows, batch)
            x = family.read(batch, Rng.at(settings.seed, 0, rows, world.device)).x
            yield features.of(family.decode(x).cpu())[: max(0, there - rows.start)]

    real = gaussian(parts(), world)
    found = Judge(features, draw, prompts, settings.images, settings.seed, real, world)
    found.images(next(iter(prompts)))
    return found


def own(count: int, world: World) -> Iterator[range]:
    """This process's rows. Where networks are divided all must make as many calls, so that the last rows may lie behind the
    end: they are drawn, and do not count."""
    for part in range(world.rank, world.size * math.ceil(count / (PART * world.size)), world.size):
        yield range(part * PART, (part + 1) * PART)


def places(count: int, shards: Shards) -> np.ndarray:
    """Of so many samples, at even distances; of runs of `PART`, where single ones would open more shards."""
    run = PART if len(shards.counts) > count / PART else 1
    starts = np.arange(math.ceil(count / run)) * len(shards) // math.ceil(count / run)
    every = (starts[:, None] + np.arange(run)).ravel()[:count]
    return np.minimum(every, len(shards) - 1)


def gaussian(parts: Iterable[np.ndarray], world: World) -> Gaussian:
    """Of features (N, D) that come part by part, and of which each process has some."""
    total: np.ndarray | float = 0.0
    for features in parts:
        counted = np.concatenate([np.ones((len(features), 1)), features], axis=1)
        total = total + counted.T @ counted
    sums = world.all_reduce_sum(torch.from_numpy(total))
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
