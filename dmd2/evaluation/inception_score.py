"""The Inception Score (Salimans et al. 2016): how sure a classifier is of each image, and how many classes there are among all.

exp(E_x KL(p(y | x) || p(y))), the mean over `SPLITS` random parts of the images as published. It does not look at real images. Inception's
classes are read without the bias of the last layer, as in the original.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Self

import torch
from cleanfid.inception_torchscript import InceptionV3W
from torch import Tensor

from dmd2.config import EvaluateConfig
from dmd2.errors import Refused
from dmd2.evaluation.confidence import margin
from dmd2.evaluation.efficientnet import EfficientNet
from dmd2.evaluation.features import load_pretrained, reduced_to
from dmd2.evaluation.inception import Inception
from dmd2.evaluation.influence import scramble
from dmd2.evaluation.measurements import Measurement
from dmd2.evaluation.metrics import Score
from dmd2.evaluation.neighbours import KeptFeatures
from dmd2.models.family import Prompt

SPLITS = 10


def measurement(settings: EvaluateConfig, device: torch.device) -> Measurement:
    """The probabilities of the classes of ImageNet, by the network that `evaluate.features` names."""
    if settings.features == "classifier":
        raise Refused(
            "inception_score needs the classes of a network of photographs, and evaluate.features is classifier; leave inception_score out of "
            "evaluate.metrics"
        )
    found = reduced_to(settings.resize, load_pretrained(settings, "evaluate", device))
    extract = replace(found, network=_classes_of(found.network))

    def measure(images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        return extract.measure(images)

    return Measurement(measure, extract.digest, {"classes": str(extract.facts["features"])})


def _classes_of(network: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """(B, 3, h, w) with values 0 to 255 -> probabilities (B, K)."""
    if isinstance(network, EfficientNet):
        return lambda images: network.logits(images).softmax(1)
    if isinstance(network, Inception):
        return network.probabilities
    assert isinstance(network, InceptionV3W)
    return lambda images: network.base(images, no_output_bias=True)


class InceptionScoreState(KeptFeatures):
    """The probabilities of the classes of each image."""

    def score(self, reference: Self) -> Score:
        """The mean over the parts; their spread gives the interval of 95 %."""
        probabilities = self.features
        if (count := len(probabilities)) < SPLITS:
            raise Refused(
                f"the Inception Score is the mean over {SPLITS} parts, and a set has only {count} images; evaluate more"
            )
        shuffled = probabilities[scramble(torch.arange(count)).argsort()]
        ends = [part * count // SPLITS for part in range(SPLITS + 1)]
        values = [_score(shuffled[start:end]) for start, end in pairwise(ends)]
        value, width = sum(values) / SPLITS, margin(values)
        return Score(value, (value - width, value + width), values)


def _score(p: Tensor) -> float:
    """exp of the mean KL divergence of each row p(y | x) from the mean of all rows."""
    mean = p.mean(0)
    return float((torch.xlogy(p, p) - torch.xlogy(p, mean)).sum(1).mean().exp())
