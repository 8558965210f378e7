"""Patches of images at full resolution, whose Frechet distance is patch FID (Lin et al. 2024, SDXL-Lightning).

FID reduces images to the 299 pixels of its network and does not see their details. A patch of 299 pixels from the centre of each image is not
reduced.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dmd2.config import EvaluateConfig
from dmd2.errors import Refused
from dmd2.evaluation.features import load_pretrained
from dmd2.evaluation.measurements import Measurement
from dmd2.models.family import Prompt

SIDE = 299
"""Pixels along a side of a patch."""


def measurement(settings: EvaluateConfig, device: torch.device) -> Measurement:
    """The features of the patch of each image."""
    if settings.features == "classifier":
        raise Refused(
            "patch_fid needs features of a network of photographs, and evaluate.features is classifier; leave patch_fid out of evaluate.metrics"
        )
    extract = load_pretrained(settings, "evaluate", device)

    def measure(images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        return extract.measure(centre_patches(images))

    return Measurement(measure, extract.digest, {"patches": f"{SIDE} pixels, {extract.facts['features']}"})


def centre_patches(images: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, C, SIDE, SIDE); refused if the images are not larger."""
    height, width = images.shape[-2:]
    if min(height, width) <= SIDE:
        raise Refused(
            f"patch FID compares patches of {SIDE} pixels of larger images, and these have {height}x{width}; leave patch_fid out of "
            "evaluate.metrics"
        )
    top, left = (height - SIDE) // 2, (width - SIDE) // 2
    return images[..., top : top + SIDE, left : left + SIDE]
