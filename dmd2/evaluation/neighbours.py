"""Metrics of single images among the features of two sets: precision, recall, density and coverage, by nearest neighbours.

The ball of an image reaches to its k-th nearest neighbour in its own set. Precision and recall: Kynkaanniemi et al. 2019 (eq. 2);
density and coverage: Naeem et al. 2020 (eq. 3 and 4), both with k = 5 as there. They need all features of a set in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Self

import torch
from torch import Tensor

from dmd2.errors import Refused
from dmd2.evaluation.influence import group_means
from dmd2.evaluation.metrics import ImageBatch, Score

NEIGHBOURS = 5
CHUNK = 1024
"""Rows of a matrix of distances that are in memory at a time."""


class KeptFeatures:
    """All features of a set of images, in the order of the images."""

    def __init__(self) -> None:
        self.parts: list[Tensor] = []

    def update(self, batch: ImageBatch) -> None:
        self.parts.append(batch.features)

    @property
    def features(self) -> Tensor:
        """(N, D), float64."""
        return torch.cat(self.parts)


class NeighbourState(KeptFeatures):
    """The features of a set, for one of the metrics of this module."""

    def __init__(self, measure: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.measure = measure

    def score(self, reference: Self) -> Score:
        """The mean over images, with an interval of 95 % by the central limit theorem."""
        fake, real = self.features, reference.features
        if (fewest := min(len(fake), len(real))) <= NEIGHBOURS:
            raise Refused(
                f"precision, recall, density and coverage compare each image with its {NEIGHBOURS} nearest neighbours, and a set has "
                f"only {fewest} images; evaluate more"
            )
        return mean_score(self.measure(fake, real))


def mean_score(values: Tensor) -> Score:
    """The mean of the values (N,) of the rows of a set, with its interval of 95 %. The error of the other set is not in it."""
    if len(values) < 2:
        return Score(float(values.mean()))
    mean, error = float(values.mean()), 1.96 * float(values.std()) / len(values) ** 0.5
    moved = group_means(values, torch.arange(len(values)), len(values))
    return Score(mean, (mean - error, mean + error), (mean + moved).tolist())


def precision(fake: Tensor, real: Tensor) -> Tensor:
    """(N,) 0 or 1: whether a generated image lies in the ball of any real one."""
    return torch.cat([inside.any(1) for inside in _inside(fake, real)]).double()


def recall(fake: Tensor, real: Tensor) -> Tensor:
    """(M,) 0 or 1: whether a real image lies in the ball of any generated one."""
    return precision(real, fake)


def density(fake: Tensor, real: Tensor) -> Tensor:
    """(N,): number of real balls around a generated image, as a share of k."""
    return torch.cat([inside.double().sum(1) for inside in _inside(fake, real)]) / NEIGHBOURS


def coverage(fake: Tensor, real: Tensor) -> Tensor:
    """(M,) 0 or 1: whether the ball of a real image holds any generated one."""
    return torch.stack([inside.any(0) for inside in _inside(fake, real)]).any(0).double()


def _inside(points: Tensor, centres: Tensor) -> Iterator[Tensor]:
    """For chunks of points: bool (chunk, M), whether a point lies in the ball of a centre."""
    radii = _radii(centres)
    return (torch.cdist(chunk, centres) <= radii for chunk in points.split(CHUNK))


def _radii(features: Tensor) -> Tensor:
    """(M,) distances to the k-th nearest neighbour; the nearest is the image itself."""
    return torch.cat(
        [torch.cdist(chunk, features).kthvalue(NEIGHBOURS + 1).values for chunk in features.split(CHUNK)]
    )
