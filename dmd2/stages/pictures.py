"""Picture grids of samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from PIL import Image

from dmd2.config import FamilyConfig
from dmd2.image_grid import image_grid
from dmd2.io.local import atomic_write
from dmd2.models.family import Prompt
from dmd2.stages.prompts import columns

Sampler = Callable[[Sequence[Prompt], int], torch.Tensor]
"""(prompts, seed) -> images, uint8 (N, C, H, W)."""


def picture_of(family: FamilyConfig, sampler: Sampler, prompts: Sequence[Prompt], seed: int) -> Image.Image:
    return image_grid(sampler(prompts, seed), columns(family))


def save_png(picture: Image.Image, path: Path) -> None:
    with atomic_write(path) as draft:
        picture.save(draft, format="PNG")
