"""Measurement of images for all metrics of an evaluation, and the states of the metrics from what was measured.

The two are apart: measuring needs the images and the networks, block by block on any number of processes. States are then made from
the measurements of all blocks in the order of their rows, so that scores do not depend on who measured what.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dmd2.config import EvaluateConfig
from dmd2.evaluation.features import FeatureExtractor
from dmd2.evaluation.measurements import FEATURES, MEASUREMENTS, Measurement
from dmd2.evaluation.metrics import ImageBatch, Metric, MetricState, Score
from dmd2.models.family import Prompt

BATCH = 64
"""Images in a call of a network that measures, at most."""
States = dict[str, MetricState]
"""{name of a metric: its state of one set of images}."""
Measured = Mapping[str, Tensor]
"""{name of a measurement: (B, D)} of a block of images."""


@dataclass(frozen=True)
class Evaluator:
    """Computes the states of several metrics."""

    new_state: dict[str, Callable[[], MetricState]]
    """{name of a metric: makes an empty state}."""
    reads: dict[str, str]
    """{name of a metric: the measurement that it reads}."""
    measurements: dict[str, Measurement]

    @classmethod
    def load(
        cls,
        metrics: Sequence[Metric],
        settings: EvaluateConfig,
        load_features: Callable[[], FeatureExtractor],
        device: torch.device,
    ) -> Evaluator:
        """The evaluator of these metrics. Only what one of them reads is loaded, the features by `load_features`."""
        reads = {metric.name: metric.reads for metric in metrics}
        measurements = {
            name: _features(load_features()) if name == FEATURES else MEASUREMENTS[name](settings, device)
            for name in dict.fromkeys(reads.values())
        }
        return cls({metric.name: metric.new_state for metric in metrics}, reads, measurements)

    @property
    def facts(self) -> dict[str, Any]:
        """What the manifest says about the measurements."""
        facts: dict[str, Any] = {"features": "none"}
        for measurement in self.measurements.values():
            facts |= measurement.facts
        return facts

    def prompt_facts(self, prompts: Sequence[Prompt]) -> dict[str, Any]:
        """What the manifest says about the prompts as the networks see them."""
        return {k: v for each in self.measurements.values() for k, v in each.prompt_facts(prompts).items()}

    def measure(self, images: Tensor, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        """What is kept of a block of images, uint8 (B, C, H, W)."""
        starts = range(0, len(images), BATCH)
        parts = [(images[start : start + BATCH], prompts[start : start + BATCH]) for start in starts]
        return {
            name: torch.cat([each.measure(*part) for part in parts])
            for name, each in self.measurements.items()
        }

    def fold(self, blocks: Iterable[tuple[Measured, Sequence[Prompt]]]) -> States:
        """The states of a set of images from the measurements of its blocks, in the order of their rows."""
        states = {name: new() for name, new in self.new_state.items()}
        for measured, prompts in blocks:
            for start in range(0, len(prompts), BATCH):
                rows = slice(start, start + BATCH)
                for name, state in states.items():
                    state.update(ImageBatch(prompts[rows], measured[self.reads[name]][rows].double()))
        return states

    def accumulate(self, batches: Iterable[tuple[Tensor, Sequence[Prompt]]]) -> States:
        """The states of a set of images that arrives as batches of (images, prompts)."""
        return self.fold((self.measure(images, prompts), prompts) for images, prompts in batches)


def _features(extractor: FeatureExtractor) -> Measurement:
    return Measurement(extractor.measure, extractor.digest, extractor.facts)


def score_states(states: States, reference: States) -> dict[str, Score]:
    """{name of a metric: score of the set against the reference set}."""
    return {name: state.score(reference[name]) for name, state in states.items()}
