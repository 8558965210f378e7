"""The kernel distance of two sets of features: KID (Binkowski et al. 2018), unbiased for any number of images."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor

from dmd2.errors import Refused
from dmd2.evaluation.metrics import Score
from dmd2.evaluation.neighbours import KeptFeatures, mean_score

SUBSETS, SUBSET_SIZE = 100, 1000
"""Number and size of the random subsets over which the distance is averaged, as in the paper's code."""


class KernelState(KeptFeatures):
    """The features of a set."""

    def score(self, reference: Self) -> Score:
        """The mean over random subsets, always the same ones. Its interval is that of the subsets, which overlap in small sets."""
        fake, real = self.features, reference.features
        if (size := min(SUBSET_SIZE, len(fake), len(real))) < 2:
            raise Refused(f"KID compares at least 2 images of each set, not {size}; evaluate more")
        draw = torch.Generator().manual_seed(0)
        found = [
            kernel_distance(_subset(fake, size, draw), _subset(real, size, draw)) for _ in range(SUBSETS)
        ]
        return mean_score(torch.stack(found))


def kernel_distance(fake: Tensor, real: Tensor) -> Tensor:
    """The unbiased squared maximum mean discrepancy under the kernel (x y / D + 1)^3 (eq. 3 and sec. 3); features (N, D), (M, D)."""
    within = _mean_off_diagonal(_kernel(fake, fake)) + _mean_off_diagonal(_kernel(real, real))
    return within - 2 * _kernel(fake, real).mean()


def _kernel(a: Tensor, b: Tensor) -> Tensor:
    return (a @ b.T / a.shape[1] + 1) ** 3


def _mean_off_diagonal(kernel: Tensor) -> Tensor:
    count = len(kernel)
    return (kernel.sum() - kernel.trace()) / (count * (count - 1))


def _subset(features: Tensor, size: int, draw: torch.Generator) -> Tensor:
    return features[torch.randperm(len(features), generator=draw)[:size]]
