"""What several processes that train at one folder share."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from dmd2.batch import Batch
from dmd2.config import Config
from dmd2.data.shards import TRAIN
from dmd2.data.stream import RawBatch, Shards, Stream
from dmd2.io.staging import Draft, draft_artifact, join_draft
from dmd2.parallel.ranks import World
from dmd2.rng import Rng
from dmd2.stages.networks import parameters


@contextmanager
def draft_for_all_ranks(
    world: World, out: str, kind: str, config: Config, inputs: dict[str, str]
) -> Iterator[Draft]:
    """A folder that all processes work at: the main one begins it, and gives it its name when all are done."""
    if not world.is_main:
        meeting, draft = world.broadcast_int(), join_draft(out, kind)
        draft.answer(meeting)
        if draft.apart and world.local_rank == 0:
            draft.take("checkpoints/")
        world.barrier()
        yield draft
        world.barrier()
        world.barrier()
        world.shutdown()
        return
    with draft_artifact(out, kind, config, inputs, resumable=True) as draft:
        draft.call(meeting := secrets.randbits(62))
        world.broadcast_int(meeting)
        world.barrier()
        yield draft
        world.barrier()
    world.barrier()
    world.shutdown()


def batch_reader(
    config: Config,
    data: str,
    batch: int,
    world: World,
    kind: str,
    read_batch: Callable[[RawBatch, Rng], Batch],
) -> Callable[[int], Iterator[Batch]]:
    """From a step on, this process's rows of each batch, with their random numbers."""
    shards = Shards(data, TRAIN, kind, config.loader.cache_gb)
    stream, rows = (
        Stream(shards, batch, config.seed, config.loader, world.rank, world.size),
        world.local_rows(batch),
    )

    def samples(first: int) -> Iterator[Batch]:
        for step, part in enumerate(stream.batches(first), first):
            yield read_batch(part, Rng.at(config.seed, step, rows, world.device)).to(world.device)

    return samples


def size_facts(network: nn.Module, steps: int, batch: int) -> dict[str, Any]:
    return {
        "parameters": parameters(network),
        "steps": steps,
        "images": steps * batch,
    }
