"""The Frechet distance of two sets of features, each seen as a Gaussian: FID (Heusel et al. 2017).

Sets are accumulated as sums over features and their products in float64, so the parts of a set can be computed anywhere, in any
order, and added up.

The distance of finite sets is larger than that of the distributions, by an amount that falls as 1 / n (Chong & Forsyth 2020), so the
distance of halves of the sets gives an estimate without that bias: FID_infinity = 2 FID(n) - FID(n / 2).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Self

import torch
from torch import Tensor

from dmd2.evaluation.confidence import margin
from dmd2.evaluation.influence import SampledRows, half_of_rows
from dmd2.evaluation.metrics import ImageBatch, Score
from dmd2.parallel.ranks import World

MANY = 2048
"""Features, as many as Inception has, from which on the square root of a covariance is avoided where possible."""


@dataclass(frozen=True)
class Gaussian:
    """Mean and covariance of a set of features."""

    mean: Tensor
    """(D,), float64."""
    covariance: Tensor
    """(D, D), with n - 1 in the denominator."""

    rank: int | None = None
    """A bound on the rank of the covariance, such as one less than the images of the set; None for D."""

    @cached_property
    def root(self) -> Tensor:
        """R of shape (D, rank) with R R^T the covariance: its eigenvectors times the roots of their eigenvalues."""
        values, vectors = self._eigen
        return vectors * values.clamp(min=0).sqrt()

    @property
    def factor(self) -> Tensor:
        """F with F F^T the covariance: the root, or of many features Cholesky's, which takes a tenth of the time, unless the root is
        known or the matrix is singular."""
        if len(self.mean) >= MANY and "root" not in self.__dict__:
            lower, failed = torch.linalg.cholesky_ex(self.covariance)
            if not failed:
                return lower
        return self.root

    @cached_property
    def inverse_root(self) -> Tensor:
        """The transposed pseudo-inverse of the root, (D, rank)."""
        values, vectors = self._eigen
        return vectors * inverse_roots(values)

    @cached_property
    def _eigen(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues and eigenvectors; of few images only those in the span of the covariance, which is also more exact: the roots of
        the other eigenvalues, zeros but for rounding, add up."""
        if self.rank is None or self.rank >= len(self.mean):
            values, vectors = torch.linalg.eigh(self.covariance)
            return values, vectors
        draws = torch.Generator(self.mean.device).manual_seed(0)
        random = torch.randn(
            len(self.mean), self.rank, generator=draws, dtype=self.mean.dtype, device=self.mean.device
        )
        basis = torch.linalg.qr(self.covariance @ random).Q
        values, vectors = torch.linalg.eigh(basis.T @ self.covariance @ basis)
        return values, basis @ vectors


def inverse_roots(values: Tensor) -> Tensor:
    """1 / sqrt of the eigenvalues of a matrix, 0 for those that are zero but for rounding."""
    smallest = values.max().clamp(min=0) * len(values) * torch.finfo(values.dtype).eps
    return torch.where(values > smallest, values.clamp(min=0).rsqrt(), 0.0)


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

    def all_reduce(self, world: World) -> None:
        """Merge the states of all processes; each must have been updated, if only with an empty batch."""
        self._set(world.all_reduce_sum(self.moments))

    def _set(self, moments: Tensor) -> None:
        self.moments, self._gaussian = moments, None

    @property
    def count(self) -> int:
        """Number of images."""
        return int(self.moments.flatten()[0])

    def gaussian(self) -> Gaussian:
        """Kept until the next update, with its root: many sets are compared with one reference."""
        self._gaussian = self._gaussian or self._fit()
        return self._gaussian

    def _fit(self) -> Gaussian:
        count, total = self.moments[0, 0], self.moments[0, 1:]
        mean = total / count
        scatter = self.moments[1:, 1:] - count * torch.outer(mean, mean)
        return Gaussian(mean, scatter / (count - 1), self.count - 1)

    def score(self, reference: Self) -> Score:
        return Score(frechet_distance(self.gaussian(), reference.gaussian()))


class FidState:
    """What the distance and its interval need of a set: the moments of all features and of a random half of them, and a sample of
    the features."""

    def __init__(self) -> None:
        self.whole, self.half = FrechetState(), FrechetState()
        self.sample = SampledRows()

    def update(self, batch: ImageBatch) -> None:
        rows = self.sample.add(batch.features)
        self.whole.update(batch)
        self.half.update(batch._replace(features=batch.features[half_of_rows(rows)]))

    def score(self, reference: Self) -> Score:
        """The interval is that of the distance of the distributions: it reaches down to that of FID_infinity, which takes off all of the
        bias if each half has more images than there are features, otherwise a part of it."""
        a, b = self.whole.gaussian(), reference.whole.gaussian()
        value = frechet_distance(a, b)
        replicates = [value + each for each in _replicates(a, b, self.sample, reference.sample)]
        width, details = margin(replicates), self._finite_sample(reference, value)
        low = min(value, details.get("infinity", value)) - width
        return Score(value, (max(0.0, low), value + width), replicates, details)

    def _finite_sample(self, reference: Self, value: float) -> dict[str, float]:
        pairs = [(self.half, reference.half), (self._other_half(), reference._other_half())]
        if min(each.count for pair in pairs for each in pair) < 2:
            return {}
        half = sum(frechet_distance(mine.gaussian(), real.gaussian()) for mine, real in pairs) / 2
        return {"half": half, "infinity": 2 * value - half}

    def _other_half(self) -> FrechetState:
        other = FrechetState()
        other.moments = self.whole.moments - self.half.moments
        return other


def _replicates(a: Gaussian, b: Gaussian, fake: SampledRows, real: SampledRows) -> list[float]:
    """The replicates of the distance around 0, from the influence of each image of both sets: the derivative of the distance in the
    direction of the image's own mean and covariance.

    With the optimal map T = R (R^T C_a R)^-1/2 R^T from a to b, where C_b = R R^T, the distance changes with C_a as I - T, with C_b
    as I - T^-1, and with m_a as 2 (m_a - m_b)."""
    values, vectors = torch.linalg.eigh(b.root.T @ a.covariance @ b.root)
    forward = b.root @ (vectors * inverse_roots(values)) @ vectors.T @ b.root.T
    backward = b.inverse_root @ (vectors * values.clamp(min=0).sqrt()) @ vectors.T @ b.inverse_root.T
    slope = 2 * (a.mean - b.mean)
    moved = fake.replicates(lambda x: _influence(x - a.mean, slope, forward))
    return (moved + real.replicates(lambda y: _influence(y - b.mean, -slope, backward))).tolist()


def _influence(x: Tensor, slope: Tensor, transport: Tensor) -> Tensor:
    """x^T slope + x^T (I - T) x of each centred row of x (N, D); its mean is a constant."""
    return x @ slope + (x * (x - x @ transport)).sum(1)


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_b^1/2 C_a C_b^1/2)^1/2) (Heusel et al. 2017, eq. 6).

    For any F with F F^T = C_b, the eigenvalues of F^T C_a F are those of C_a C_b. By the eigenvalues of symmetric matrices: the same number as clean-fid's square root of the product C_a C_b, in a quarter of its
    time or less, and without scipy's `sqrtm`."""
    cross = torch.linalg.eigvalsh(b.factor.T @ a.covariance @ b.factor).clamp(min=0).sqrt().sum()
    means = (a.mean - b.mean).square().sum()
    return float(means + a.covariance.trace() + b.covariance.trace() - 2 * cross)
