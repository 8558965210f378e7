"""Images in batches with their prompts, as `Evaluator.accumulate` takes them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from dmd2.config import EvaluateConfig, FamilyConfig
from dmd2.data.loader import Shards
from dmd2.evaluation.evaluator import BATCH
from dmd2.models.family import Prompt
from dmd2.progress import Progress
from dmd2.rng import seed_of_part
from dmd2.stages.pictures import Sampler
from dmd2.stages.prompts import prompts_of_images

Batches = Iterator[tuple[Tensor, Sequence[Prompt]]]
"""(images, prompts): uint8 (B, C, H, W), and what they were sampled for or are labelled with."""


def sampled_batches(title: str, sampler: Sampler, prompts: list[Prompt], settings: EvaluateConfig) -> Batches:
    """Images of all prompts; each batch has its own seed, so that it can be sampled again alone."""
    with Progress(f"evaluate {title}", len(prompts), "images") as progress:
        for start in range(0, len(prompts), settings.batch):
            batch = prompts[start : start + settings.batch]
            yield sampler(batch, seed_of_part(settings.seed, start)), batch
            progress.advance(len(batch))


def real_batches(family: FamilyConfig, shards: Shards, count: int) -> Batches:
    """Real images with their classes or captions: `count` at even distances, or all if there are fewer."""
    for batch in shards.evenly_spaced_batches(count, BATCH):
        yield batch.image, prompts_of_images(family, batch)
