"""Confidence in scores: from the influence of single images to intervals of scores and of their differences.

The error of a score comes from the images that happened to be drawn, generated and real. To first order the score moves with each image
by its influence (the infinitesimal jackknife, Jaeckel 1972), so the images are divided into `GROUPS` random groups, and a *replicate* is
the score moved by `GROUPS` times the summed influence of one group: the replicates are independent, their mean is the score, and their
spread gives its standard error with `GROUPS` - 1 degrees of freedom. Images of the same row are in the same group in every set. Student
and teacher have the noise and the real images in common, and differences of their replicates keep what they have in common.

A replicate is one number, so a manifest holds them all, and whoever reads it can compare any scores. Importing this imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

GROUPS = 20
"""Groups of images, and so replicates of a score."""
NORMAL = 1.959964
"""97.5 % quantile of the normal distribution."""


def margin(replicates: Sequence[float]) -> float:
    """Half the width of the interval of 95 % around the mean of independent replicates, by Student's t."""
    count = len(replicates)
    mean = sum(replicates) / count
    variance = sum((each - mean) ** 2 for each in replicates) / (count - 1)
    return student_t(count - 1) * math.sqrt(variance / count)


def student_t(freedom: int) -> float:
    """97.5 % quantile of Student's distribution, by its expansion around the normal one; to 1 % from 4 degrees of freedom on."""
    z = NORMAL
    return (
        z
        + (z**3 + z) / (4 * freedom)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * freedom**3)
    )
