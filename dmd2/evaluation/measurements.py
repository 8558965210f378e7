"""What is measured of each image: one table, `MEASUREMENTS`.

A measurement is what a network says of an image, such as its features. It is computed once per image, for all metrics that read it,
and is all that is kept of the image: scores are computed from stored measurements, without sampling again. `features`, the
network that `evaluate.features` names, can depend on the data, so that it is loaded by the stage. Importing this module imports
no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from dmd2.config import EvaluateConfig
    from dmd2.models.family import Prompt

FEATURES = "features"


def _no_facts(prompts: Sequence[Prompt]) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class Measurement:
    """A network that measures images."""

    measure: Callable[[Tensor, Sequence[Prompt]], Tensor]
    """(uint8 (B, 1 or 3, H, W), prompts) -> (B, D) on the CPU, in one network call."""
    weights: str
    """sha256 of the weights."""
    facts: dict[str, Any]
    """What the manifest says about it."""
    prompt_facts: Callable[[Sequence[Prompt]], dict[str, Any]] = _no_facts
    """What the manifest says about the prompts as this network sees them."""


def _clip(settings: EvaluateConfig, device: torch.device) -> Measurement:
    from dmd2.evaluation.clip_score import Clip

    clip = Clip(settings.clip, device)
    facts = {"clip_model": f"{settings.clip}, sha256 {clip.digest[:12]}"}
    return Measurement(clip.measure, clip.digest, facts, clip.count_cut)


def _patches(settings: EvaluateConfig, device: torch.device) -> Measurement:
    from dmd2.evaluation import patches

    return patches.measurement(settings, device)


def _classes(settings: EvaluateConfig, device: torch.device) -> Measurement:
    from dmd2.evaluation import inception_score

    return inception_score.measurement(settings, device)


def _clip_images(settings: EvaluateConfig, device: torch.device) -> Measurement:
    from dmd2.evaluation import image_embeddings

    return image_embeddings.clip_images(settings, device)


def _dinov2(settings: EvaluateConfig, device: torch.device) -> Measurement:
    from dmd2.evaluation import image_embeddings

    return image_embeddings.dinov2(settings, device)


MEASUREMENTS: dict[str, Callable[[EvaluateConfig, torch.device], Measurement]] = {
    "clip": _clip,
    "patches": _patches,
    "classes": _classes,
    "clip_images": _clip_images,
    "dinov2": _dinov2,
}
"""{name: loads the network}; `features` is not among them."""
