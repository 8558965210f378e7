"""The rows of a set of images: random groups and halves of them, and a sample that fits into memory.

Replicates of a score (`dmd2.evaluation.confidence`) need the influence of images, and 10,000 of them are enough to know its spread to
1 %. Rows are chosen and grouped by scrambled bits of their numbers, the same in every set.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dmd2.evaluation.confidence import GROUPS

LARGEST_SAMPLE = 10_000
"""Rows of a set that are kept: 80 MB of 2,048 float32 features."""
CHUNK = 1024
"""Rows whose influence is computed at a time."""


def scramble(rows: Tensor) -> Tensor:
    """Mixed bits of row numbers, int64, not negative: the same numbers for the same rows (splitmix64)."""

    def to_signed(constant: int) -> int:
        return constant - 2**64 if constant >= 2**63 else constant

    def shift_right(x: Tensor, bits: int) -> Tensor:
        return (x >> bits) & (2 ** (64 - bits) - 1)

    x = (rows + 1) * to_signed(0x9E3779B97F4A7C15)
    x = (x ^ shift_right(x, 30)) * to_signed(0xBF58476D1CE4E5B9)
    x = (x ^ shift_right(x, 27)) * to_signed(0x94D049BB133111EB)
    return shift_right(x ^ shift_right(x, 31), 1)


def half_of_rows(rows: Tensor) -> Tensor:
    """Which of the rows are in the first of two random halves, bool."""
    return scramble(rows) % 2 == 0


def groups_of_rows(rows: Tensor) -> Tensor:
    """The random group of each row, 0 to GROUPS - 1."""
    return scramble(rows) // 2 % GROUPS


class SampledRows:
    """At most `LARGEST_SAMPLE` random rows of a set, with their features."""

    def __init__(self) -> None:
        self.count = 0
        """Rows of the whole set."""
        self.parts: list[tuple[Tensor, Tensor]] = []
        """(row numbers, features), in float32 where nothing is lost."""

    def add(self, features: Tensor) -> Tensor:
        """Add the next rows of the set; their numbers, int64 (B,)."""
        rows = torch.arange(self.count, self.count + len(features))
        self.count += len(features)
        single = features.float()
        self.parts.append((rows, single if torch.equal(single.to(features.dtype), features) else features))
        if sum(len(part) for part, _ in self.parts) > 2 * LARGEST_SAMPLE:
            self._prune()
        return rows

    def _prune(self) -> None:
        rows, features = (torch.cat(each) for each in zip(*self.parts, strict=True))
        kept = scramble(rows).argsort()[:LARGEST_SAMPLE].sort().values
        self.parts = [(rows[kept], features[kept])]

    def sample(self) -> tuple[Tensor, Tensor]:
        """(row numbers, features) of the sample, in the order of the rows."""
        if len(self.parts) > 1 or sum(len(part) for part, _ in self.parts) > LARGEST_SAMPLE:
            self._prune()
        return self.parts[0]

    def features(self) -> Tensor:
        """The features of the sample in float64."""
        return self.sample()[1].double()

    def replicates_of(self, influence: Tensor) -> Tensor:
        """`group_means` of the influence of each row of the sample, (N,)."""
        return group_means(influence, self.sample()[0], self.count)

    def replicates(self, influence: Callable[[Tensor], Tensor]) -> Tensor:
        """GROUPS times the summed influence of each group of rows, divided by their number, around 0: float64 (GROUPS,).

        `influence` gives that of each row of features (N, D), float64, up to a constant."""
        parts = self.sample()[1].split(CHUNK)
        return self.replicates_of(torch.cat([influence(part.double()) for part in parts]))


def group_means(influence: Tensor, rows: Tensor, count: int) -> Tensor:
    """The replicates around 0 from the influence of sampled rows (N,) of `count`."""
    centred = influence - influence.mean()
    sums = torch.zeros(GROUPS, dtype=torch.float64).index_add_(0, groups_of_rows(rows), centred)
    return sums * (GROUPS / len(rows)) * (len(rows) / count) ** 0.5
