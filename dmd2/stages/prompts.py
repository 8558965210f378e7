"""Which classes or texts are sampled: for previews, for the evaluation, and from a file of prompts while training."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

from dmd2.config import FamilyConfig
from dmd2.data.loader import RawBatch, Shards
from dmd2.data.prompts import read_prompts
from dmd2.models.family import CondPair, ModelFamily, Prompt
from dmd2.rng import Rng
from dmd2.stages.inputs import read_captions
from dmd2.training.rollout import Prompts

SMALL = 64
"""Images of at most this many pixels along a side are shown in grids of 8 rows of 10; larger ones in 2 rows of 4."""


def grid_columns(family: FamilyConfig) -> int:
    """Columns of a picture grid; each shows one class, so there are no more columns than classes."""
    return min(10 if family.image[1] <= SMALL else 4, family.classes)


def grid_cells(family: FamilyConfig) -> int:
    """Images of a picture grid."""
    return grid_columns(family) * (8 if family.image[1] <= SMALL else 2)


def grid_classes(family: FamilyConfig) -> list[Prompt]:
    """The class of each cell of a picture grid: column i shows class i."""
    return [cell % grid_columns(family) for cell in range(grid_cells(family))]


def preview_prompts(family: FamilyConfig, shards: Shards, prompts: str = "") -> list[Prompt]:
    """One prompt per cell of a picture grid: classes, or texts from the file of prompts or else from the captions."""
    if family.prompts == "classes":
        return grid_classes(family)
    texts = read_prompts(prompts) if prompts else read_captions(shards, grid_cells(family))
    return repeat_prompts(texts, grid_cells(family))


def prompts_of_images(family: FamilyConfig, images: RawBatch) -> list[Prompt]:
    """The labels of real images, or their captions for a text-to-image family."""
    return images.label.tolist() if family.prompts == "classes" else list(images.text)


def repeat_prompts(prompts: Sequence[Prompt], count: int) -> list[Prompt]:
    """`count` prompts: the given ones again and again, in their order."""
    return list(itertools.islice(itertools.cycle(prompts), count))


def prompt_sampler(family: ModelFamily, prompts: str, device: torch.device) -> Prompts:
    """A function that draws one prompt of a file for each row and returns their conditioning on `device`."""
    texts = read_prompts(prompts)

    def draw(rng: Rng) -> CondPair:
        cond, uncond = family.condition([texts[i] for i in rng.indices(len(texts))])
        return CondPair(cond.to(device), uncond.to(device))

    return draw


def rows_of_prompts(texts: Sequence[str], rows: range) -> list[Prompt]:
    """The texts of these rows of a batch, counted through the file again and again."""
    return [texts[row % len(texts)] for row in rows]
