"""The Frechet distance of two sets of features, each seen as a Gaussian: FID (Heusel et al. 2017).

Sets are accumulated as sums over features and their products in float64, so the parts of a set can be computed anywhere, in any
order, and added up.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Self

import torch
from torch import Tensor

from dmd2.evaluation.metrics import ImageBatch, Score
from dmd2.parallel.ranks import World


@dataclass(frozen=True)
class Gaussian:
    """Mean and covariance of a set of features."""

    mean: Tensor
    """(D,), float64."""
    covariance: Tensor
    """(D, D), with n - 1 in the denominator."""

    @cached_property
    def root(self) -> Tensor:
        """The square root of the covariance, by its eigenvalues."""
        values, vectors = torch.linalg.eigh(self.covariance)
        return vectors * values.clamp(min=0).sqrt() @ vectors.T


class FrechetState:
    """The moments of the features of a set of images."""

    def __init__(self) -> None:
        self.moments = torch.zeros((), dtype=torch.float64)
        """(1 + D, 1 + D): the sum of r r^T over rows r = (1, features); a scalar zero before the first update."""
        self._gaussian: Gaussian | None = None

    def update(self, batch: ImageBatch) -> None:
        ones = torch.ones(len(batch.features), 1, dtype=torch.float64)
        rows = torch.cat([ones, batch.features.double()], dim=1)
        self._set(self.moments + rows.T @ rows)

    def merge(self, other: Self) -> None:
        self._set(self.moments + other.moments)

    def all_reduce(self, world: World) -> None:
        """Merge the states of all processes; each must have been updated, if only with an empty batch."""
        self._set(world.all_reduce_sum(self.moments))

    def _set(self, moments: Tensor) -> None:
        self.moments, self._gaussian = moments, None

    def gaussian(self) -> Gaussian:
        """Kept until the next update, with its root: many sets are compared with one reference."""
        self._gaussian = self._gaussian or self._fit()
        return self._gaussian

    def _fit(self) -> Gaussian:
        count, total = self.moments[0, 0], self.moments[0, 1:]
        mean = total / count
        scatter = self.moments[1:, 1:] - count * torch.outer(mean, mean)
        return Gaussian(mean, scatter / (count - 1))

    def score(self, reference: Self) -> Score:
        return Score(frechet_distance(self.gaussian(), reference.gaussian()))


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_b^1/2 C_a C_b^1/2)^1/2) (Heusel et al. 2017, eq. 6).

    By the eigenvalues of symmetric matrices: the same number as clean-fid's square root of the product C_a C_b, in a quarter of its
    time, and without scipy's `sqrtm`."""
    cross = torch.linalg.eigvalsh(b.root @ a.covariance @ b.root).clamp(min=0).sqrt().sum()
    means = (a.mean - b.mean).square().sum()
    return float(means + a.covariance.trace() + b.covariance.trace() - 2 * cross)
