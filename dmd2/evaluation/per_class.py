"""Per-class FID: the mean of the Frechet distances of the images of each class to the real images of that class."""

from __future__ import annotations

from typing import Self

import torch

from dmd2.errors import Refused
from dmd2.evaluation.frechet import FrechetState, frechet_distance
from dmd2.evaluation.metrics import ImageBatch, Score
from dmd2.evaluation.neighbours import mean_score

FEWEST = 2
"""Images of a class from which it has a covariance."""


class PerClassState:
    """The moments of the features of each class."""

    def __init__(self) -> None:
        self.classes: dict[int, FrechetState] = {}

    def update(self, batch: ImageBatch) -> None:
        for prompt in sorted({_label(prompt) for prompt in batch.prompts}):
            rows = torch.tensor([each == prompt for each in batch.prompts])
            state = self.classes.setdefault(prompt, FrechetState())
            state.update(batch._replace(features=batch.features[rows]))

    def score(self, reference: Self) -> Score:
        """The mean over the classes of the real images; each class is one value for the interval, which is that of other classes."""
        distances = []
        for label, real in sorted(reference.classes.items()):
            mine = self.classes.get(label, FrechetState())
            if min(mine.count, real.count) < FEWEST:
                raise Refused(
                    f"class {label} has {mine.count} generated and {real.count} real images, and per-class FID needs at least {FEWEST} of "
                    "each, better thousands; evaluate more"
                )
            distances.append(frechet_distance(mine.gaussian(), real.gaussian()))
        score = mean_score(torch.tensor(distances, dtype=torch.float64))
        return Score(score.value, score.interval)


def _label(prompt: object) -> int:
    if not isinstance(prompt, int):
        raise Refused(
            "per-class FID compares images of the same class, and this network is told texts; leave class_fid out of evaluate.metrics"
        )
    return prompt
