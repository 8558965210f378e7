"""The kernel distance of two sets of features: KID (Binkowski et al. 2018), unbiased for any number of images.

It is computed of all pairs of images, or of 10,000 random ones of a larger set, instead of random subsets of 1,000: the value is that of one
subset of all images, and its interval follows from the influence of each image.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor

from dmd2.errors import Refused
from dmd2.evaluation.confidence import margin
from dmd2.evaluation.influence import CHUNK, SampledRows
from dmd2.evaluation.metrics import ImageBatch, Score

Kernel = Callable[[Tensor, Tensor], Tensor]
"""(N, D), (M, D) -> (N, M)."""


def cubic(a: Tensor, b: Tensor) -> Tensor:
    """KID's kernel (x y / D + 1)^3 (sec. 3), of the last two axes."""
    return (a @ b.mT / a.shape[-1] + 1) ** 3


class KernelState:
    """A sample of the features of a set."""

    def __init__(self, kernel: Kernel = cubic, scale: float = 1.0) -> None:
        self.sample = SampledRows()
        self.kernel, self.scale = kernel, scale

    def update(self, batch: ImageBatch) -> None:
        self.sample.add(batch.features)

    def score(self, reference: Self) -> Score:
        """The unbiased squared maximum mean discrepancy (eq. 3), times `scale`."""
        fake, real = self.sample.features(), reference.sample.features()
        if (size := min(len(fake), len(real))) < 2:
            raise Refused(
                f"a kernel distance compares at least 2 images of each set, not {size}; evaluate more"
            )
        within, between = self._rows(fake, fake), self._rows(fake, real)
        real_within, real_between = self._rows(real, real), self._rows(real, fake)
        own, theirs = (
            _without_diagonal(rows, x, self.kernel) for rows, x in ((within, fake), (real_within, real))
        )
        value = self.scale * float(own.mean() + theirs.mean() - 2 * between.mean())
        moved = self.sample.replicates_of(2 * self.scale * (own - between))
        moved = moved + reference.sample.replicates_of(2 * self.scale * (theirs - real_between))
        replicates = (value + moved).tolist()
        width = margin(replicates)
        return Score(value, (value - width, value + width), replicates)

    def _rows(self, a: Tensor, b: Tensor) -> Tensor:
        """The mean of the kernel of each row of a with all rows of b, (N,)."""
        return torch.cat([self.kernel(part, b).mean(1) for part in a.split(CHUNK)])


def _without_diagonal(means: Tensor, x: Tensor, kernel: Kernel) -> Tensor:
    """The mean of the kernel of each row with the other rows, from that with all rows."""
    count = len(x)
    diagonal = kernel(x[:, None], x[:, None]).flatten()
    return (means * count - diagonal) / (count - 1)
