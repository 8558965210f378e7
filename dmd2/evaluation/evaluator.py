"""Accumulation of all metrics of an evaluation over sets of images, in one pass over each set.

Only a batch of images is in memory at a time, and its features are computed once for all metrics.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dmd2.config import EvaluateConfig
from dmd2.evaluation.features import FeatureExtractor
from dmd2.evaluation.metrics import ImageBatch, Metric, MetricState, Score
from dmd2.models.family import Prompt

BATCH = 64
"""Images in a call of the feature network, at most."""
States = dict[str, MetricState]
"""{name of a metric: its state of one set of images}."""


@dataclass(frozen=True)
class Evaluator:
    """Computes the states of several metrics."""

    new_state: dict[str, Callable[[], MetricState]]
    """{name of a metric: makes an empty state}."""
    features: Callable[[Tensor], Tensor] | None
    """uint8 (B, C, H, W) -> float64 (B, D); None if no metric uses features."""
    facts: dict[str, Any]
    """What the manifest says about the features."""

    @classmethod
    def load(
        cls,
        metrics: Sequence[Metric],
        settings: EvaluateConfig,
        load_features: Callable[[], FeatureExtractor],
        device: torch.device,
    ) -> Evaluator:
        """The evaluator of these metrics; `load_features` is called only if one of them uses features."""
        new_state = {metric.name: metric.prepare(settings, device) for metric in metrics}
        if not any(metric.uses_features for metric in metrics):
            return cls(new_state, None, {"features": "none"})
        features = load_features()
        return cls(new_state, features, features.facts)

    def accumulate(self, batches: Iterable[tuple[Tensor, Sequence[Prompt]]]) -> States:
        """The states of a set of images that arrives as batches of (images, prompts)."""
        states = {name: new() for name, new in self.new_state.items()}
        for images, prompts in batches:
            for start in range(0, len(images), BATCH):
                batch = self._batch(images[start : start + BATCH], prompts[start : start + BATCH])
                for state in states.values():
                    state.update(batch)
        return states

    def _batch(self, images: Tensor, prompts: Sequence[Prompt]) -> ImageBatch:
        features = self.features(images) if self.features else torch.empty(len(images), 0).double()
        return ImageBatch(images, prompts, features)


def score_states(states: States, reference: States) -> dict[str, Score]:
    """{name of a metric: score of the set against the reference set}."""
    return {name: state.score(reference[name]) for name, state in states.items()}
