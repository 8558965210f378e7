"""Whether a model repeats training images: the nearest training image of each sample, by the distance of features.

Held-out images are as near to the training images as new images of the same kind are. So the samples that lie nearer than all but
`QUANTILE` of the held-out images are counted: without memorisation they are about as many, with it more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dmd2.evaluation.neighbours import CHUNK
from dmd2.models.family import Prompt

QUANTILE = 0.05
PAIRS = 8
"""Samples that are shown with their nearest training image."""


@dataclass(frozen=True)
class Neighbours:
    """The nearest training image of each image of a set."""

    distances: Tensor
    """(N,)"""
    rows: Tensor
    """(N,), among the training images."""

    @classmethod
    def of(cls, features: Tensor, training: Tensor) -> Neighbours:
        """Of features (N, D) among (M, D)."""
        found = [torch.cdist(part, training).min(dim=1) for part in features.split(CHUNK)]
        return cls(torch.cat([each.values for each in found]), torch.cat([each.indices for each in found]))

    def share_nearer(self, held_out: Neighbours) -> float:
        """The share of the images that are nearer than all but `QUANTILE` of the held-out ones."""
        return float((self.distances < held_out.distances.quantile(QUANTILE)).double().mean())

    def nearest(self, prompts: Sequence[Prompt]) -> list[dict[str, Any]]:
        """The images that are nearest to a training image, nearest first, with their prompts."""
        return [
            {
                "row": row,
                "training_row": int(self.rows[row]),
                "distance": float(self.distances[row]),
                "prompt": prompts[row],
            }
            for row in self.distances.argsort()[:PAIRS].tolist()
        ]
