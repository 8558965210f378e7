"""FID of the student during training: at each checkpoint, its samples are compared with training samples.

Every process draws an equal share of the samples, and the samples are the same for any number of processes. The processes exchange
only the moments of the features, in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dmd2.config import BestConfig
from dmd2.data.loader import RawBatch, Shards
from dmd2.errors import Refused
from dmd2.evaluation.frechet import FrechetState
from dmd2.evaluation.metrics import ImageBatch
from dmd2.io.local import atomic_write
from dmd2.io.tensors import load_tensors, save_tensors
from dmd2.models.family import ModelFamily, Prompt
from dmd2.parallel.ranks import World
from dmd2.rng import Rng, seed_of_part

MOMENTS = "moments"
"""The tensor in a file of kept moments."""
CHUNK = 16
"""Samples that share a seed and a network call."""


@dataclass(frozen=True)
class CheckpointScorer:
    """Scores the student with its current weights. Smaller is better."""

    features: Callable[[Tensor], Tensor]
    """uint8 (B, C, H, W) -> float64 (B, D)."""
    sample: Callable[[Sequence[Prompt], int], Tensor]
    """(prompts, seed) -> images of the student, uint8 (B, C, H, W)."""
    prompts: Mapping[range, Sequence[Prompt]]
    """{rows of a chunk: prompts of its samples}, for the chunks of this process."""
    count: int
    """Samples of all processes together."""
    seed: int
    reference: FrechetState
    """The features of the training samples."""
    world: World

    def __call__(self, report: Callable[[str], None]) -> float:
        """The FID on the main process, NaN on the others. `report` is called after each chunk with the progress, equally often on
        all processes; a collective call."""
        state = FrechetState()
        for rows in self.prompts:
            images = self.images(rows)
            report(f"scoring, {min(rows.stop, self.count)} of {self.count} samples")
            counted = max(0, self.count - rows.start)
            state.update(first_of(self.features, images, self.prompts[rows], counted))
        state.all_reduce(self.world)
        return state.score(self.reference).value if self.world.is_main else math.nan

    def images(self, rows: range) -> Tensor:
        """The samples of a chunk, uint8 (CHUNK, C, H, W)."""
        return self.sample(self.prompts[rows], seed_of_part(self.seed, rows.start))


def load_scorer(
    settings: BestConfig,
    features: Callable[[Tensor], Tensor],
    sample: Callable[[Sequence[Prompt], int], Tensor],
    shards: Shards,
    family: ModelFamily,
    prompts_for: Callable[[range, RawBatch], Sequence[Prompt]],
    world: World,
    kept: Path | None = None,
) -> CheckpointScorer:
    """Compute the features of the training samples and return the scorer; a collective call.

    Their moments are read from the file `kept` of the main process, if it is there, and are written to it otherwise.

    `prompts_for(rows, batch)` gives the prompts of the student's samples with these row numbers, from the training samples with the
    same numbers. One chunk is sampled at once, so that an error of sampling shows before the first training step."""
    count = min(settings.images, len(shards))
    if count < 2:
        raise Refused(
            f"{shards.uri} has {count} training image; scores of checkpoints need at least 2, better thousands"
        )
    positions, prompts, state = evenly_spaced(count, shards), {}, FrechetState()
    known = _read_moments(kept, world)
    for rows in chunks_of_rank(settings.images, world):
        batch = shards.select([positions[row % count] for row in rows])
        prompts[rows] = prompts_for(rows, batch)
        if known is not None:
            continue
        x = family.read(batch, Rng.at(settings.seed, 0, rows, world.device)).x
        counted = max(0, count - rows.start)
        state.update(first_of(features, family.decode_unchecked(x).cpu(), prompts[rows], counted))
    if known is None:
        state.all_reduce(world)
        _write_moments(kept, state.moments, world)
    else:
        state.moments = known
    scorer = CheckpointScorer(features, sample, prompts, settings.images, settings.seed, state, world)
    scorer.images(next(iter(prompts)))
    return scorer


def _read_moments(kept: Path | None, world: World) -> Tensor | None:
    """On all processes what the file of the main process holds; None if there is no file. A collective call."""
    found = load_tensors(kept)[MOMENTS] if kept and world.is_main and kept.exists() else None
    size = world.broadcast_int(0 if found is None else len(found))
    if not size:
        return None
    return world.all_reduce_sum(torch.zeros(size, size, dtype=torch.float64) if found is None else found)


def _write_moments(kept: Path | None, moments: Tensor, world: World) -> None:
    if kept and world.is_main:
        with atomic_write(kept) as scratch:
            save_tensors({MOMENTS: moments}, scratch)


def first_of(
    features: Callable[[Tensor], Tensor], images: Tensor, prompts: Sequence[Prompt], count: int
) -> ImageBatch:
    """The first `count` images of a chunk with their features; the whole chunk goes through the network, so that its bits do not
    depend on `count`."""
    return ImageBatch(prompts[:count], features(images)[:count])


def chunks_of_rank(count: int, world: World) -> Iterator[range]:
    """The rows of `count` samples that this process draws, `CHUNK` at a time.

    With sharded weights all processes must make equally many network calls, so the last chunks may lie beyond `count`: their samples
    are drawn and not counted."""
    for chunk in range(world.rank, world.size * math.ceil(count / (CHUNK * world.size)), world.size):
        yield range(chunk * CHUNK, (chunk + 1) * CHUNK)


def evenly_spaced(count: int, shards: Shards) -> np.ndarray:
    """Positions of `count` samples spread evenly over the shards; in runs of `CHUNK` consecutive samples where single ones would open
    more shards."""
    run = CHUNK if len(shards.counts) > count / CHUNK else 1
    starts = np.arange(math.ceil(count / run)) * len(shards) // math.ceil(count / run)
    positions = (starts[:, None] + np.arange(run)).ravel()[:count]
    return np.minimum(positions, len(shards) - 1)
