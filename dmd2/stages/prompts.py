"""Which classes or texts are sampled."""

from __future__ import annotations

import itertools

from dmd2.config import EdmConfig, FamilyConfig
from dmd2.data.prompts import read_prompts
from dmd2.data.stream import RawBatch, Shards
from dmd2.models.family import Prompt
from dmd2.stages.inputs import captions

SMALL = 64
"""Pixels along a side up to which a picture grid has 8 rows of 10; of larger images, 2 rows of 4."""


def columns(family: FamilyConfig) -> int:
    """Of a picture grid: a class each, as far as ten go."""
    return min(10 if family.image[1] <= SMALL else 4, family.classes)


def cells(family: FamilyConfig) -> int:
    return columns(family) * (8 if family.image[1] <= SMALL else 2)


def classes(family: EdmConfig) -> list[Prompt]:
    return [cell % columns(family) for cell in range(cells(family))]


def pictured(family: FamilyConfig, shards: Shards, prompts: str = "") -> list[Prompt]:
    """What the pictures of a run show: each class in a column, prompts of a file, or captions of the data."""
    if isinstance(family, EdmConfig):
        return classes(family)
    texts = read_prompts(prompts) if prompts else captions(shards, cells(family))
    return list(itertools.islice(itertools.cycle(texts), cells(family)))


def balanced(family: FamilyConfig, holdout: RawBatch, count: int) -> list[Prompt]:
    """What to draw, in the shares of the held-out images."""
    shown = holdout.label.tolist() if isinstance(family, EdmConfig) else holdout.text
    return list(itertools.islice(itertools.cycle(shown), count))
