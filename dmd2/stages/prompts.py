"""Which classes or texts are sampled: for previews, for the evaluation, and from a file of prompts while training."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch

from dmd2.batch import Batch, CondPair
from dmd2.config import Config, FamilyConfig
from dmd2.data.loader import RawBatch, Shards
from dmd2.data.prompts import read_prompts
from dmd2.models.family import ModelFamily, Prompt
from dmd2.stages.inputs import read_captions

Batches = Callable[[int], Iterator[Batch]]
"""(first step) -> the batches from that step on."""
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
    """One prompt per cell of a picture grid: classes, or texts from the file of prompts or else from the captions.

    Pairs with embeddings in place of captions give the empty text."""
    if family.prompts == "classes":
        return grid_classes(family)
    if shards.has_embeddings:  # in place of captions
        texts = [""]
    else:
        texts = read_prompts(prompts) if prompts else read_captions(shards, grid_cells(family))
    return repeat_prompts(texts, grid_cells(family))


def prompts_of_images(family: FamilyConfig, images: RawBatch) -> list[Prompt]:
    """The labels of real images, or their captions for a text-to-image family."""
    return images.label.tolist() if family.prompts == "classes" else list(images.text)


def repeat_prompts(prompts: Sequence[Prompt], count: int) -> list[Prompt]:
    """`count` prompts: the given ones again and again, in their order."""
    return list(itertools.islice(itertools.cycle(prompts), count))


def with_fake_prompts(
    batches: Batches, config: Config, family: ModelFamily, prompts: str, device: torch.device
) -> Batches:
    """The batches with what their fake samples are conditioned on (`distill.fake_prompts`): prompts of a file, uniform classes,
    captions of the next batch, or nothing of their own. A row's prompt does not depend on the number of processes."""
    if prompts:
        return _with_drawn_prompts(batches, family, read_prompts(prompts), device)
    if config.distill.fake_prompts == "batch":
        return batches
    if config.family.prompts == "classes":
        return _with_drawn_prompts(batches, family, range(config.family.classes), device)
    return _with_captions_of_next_batch(batches)


def _with_drawn_prompts(
    batches: Batches, family: ModelFamily, choices: Sequence[Prompt], device: torch.device
) -> Batches:
    def draw(batch: Batch) -> Batch:
        drawn = [choices[index] for index in batch.rng.indices(len(choices))]
        return replace(batch, of_fakes=family.condition(drawn).to(device))

    return lambda first: map(draw, batches(first))


def _with_captions_of_next_batch(batches: Batches) -> Batches:
    """The samples of the next batch are drawn independently of this one's, and are read and encoded anyway."""
    return lambda first: (
        replace(batch, of_fakes=CondPair(following.cond, following.uncond))
        for batch, following in itertools.pairwise(batches(first))
    )


def rows_of_prompts(texts: Sequence[str], rows: range) -> list[Prompt]:
    """The texts of these rows of a batch, counted through the file again and again."""
    return [texts[row % len(texts)] for row in rows]
