"""Picture grids of samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from PIL import Image

from dmd2.config import Config, FamilyConfig
from dmd2.image_grid import image_grid
from dmd2.io.local import atomic_write
from dmd2.model import Model
from dmd2.models.family import ModelFamily, Prompt, make_family
from dmd2.stages.prompts import grid_columns

Sampler = Callable[[Sequence[Prompt], int], torch.Tensor]
"""(prompts, seed) -> images, uint8 (N, C, H, W)."""


def sample_grid(family: FamilyConfig, sampler: Sampler, prompts: Sequence[Prompt], seed: int) -> Image.Image:
    """Sample the prompts and lay the images out in the columns of the family's picture grid."""
    return image_grid(sampler(prompts, seed), grid_columns(family))


def preview_family(config: Config, teacher: Model, folder: Path) -> ModelFamily:
    """The teacher's family, or the same family with the VAE of `distill.preview_vae`, which decodes the previews."""
    vae = config.distill.preview_vae
    return make_family(config.family, folder, vae) if vae else teacher.family


def save_png(picture: Image.Image, path: Path) -> None:
    with atomic_write(path) as draft:
        picture.save(draft, format="PNG")
