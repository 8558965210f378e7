"""What the ranks of a training share: one draft of the output, the rows of each batch, the facts of the result."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from dmd2.batch import Batch
from dmd2.config import Config
from dmd2.data.loader import DataLoader, RawBatch, Shards
from dmd2.data.shard_table import TRAIN
from dmd2.io.staging import Draft, draft_artifact, join_draft
from dmd2.parallel.ranks import World
from dmd2.rng import Rng
from dmd2.stages.networks import parameter_count


@contextmanager
def draft_for_all_ranks(
    world: World, out: str, kind: str, config: Config, inputs: dict[str, str]
) -> Iterator[Draft]:
    """A resumable draft that all ranks write into: rank 0 creates it, and publishes it after all ranks have finished."""
    if not world.is_main:
        token, draft = world.broadcast_int(), join_draft(out, kind)
        draft.exchange.join(token)
        if draft.exchange.on_other_machine and world.local_rank == 0:
            draft.exchange.download_latest("checkpoints/")
        world.barrier()
        yield draft
        world.barrier()
        world.barrier()
        world.shutdown()
        return
    with draft_artifact(out, kind, config, inputs, resumable=True) as draft:
        draft.exchange.announce(token := secrets.randbits(62))
        world.broadcast_int(token)
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
    """A function from a step to this rank's rows of the batches from that step on, read with their random numbers."""
    shards = Shards(data, TRAIN, kind, config.loader.cache_gb)
    stream = DataLoader(shards, batch, config.seed, config.loader, world.rank, world.size)
    rows = world.local_rows(batch)

    def batches(first: int) -> Iterator[Batch]:
        for step, part in enumerate(stream.batches(first), first):
            yield read_batch(part, Rng.at(config.seed, step, rows, world.device)).to(world.device)

    return batches


def training_facts(network: nn.Module, steps: int, batch: int) -> dict[str, Any]:
    """What the manifest of a trained network records: parameters, optimizer steps, images seen."""
    return {"parameters": parameter_count(network), "steps": steps, "images": steps * batch}
