"""Pairs: noise, and what the teacher made of it. The data of the regression that may come before a distillation.

A sample is `<key>.npy`, float16 (2, C, h, w), noise and answer, and `<key>.txt`, the prompt, in the shards of latents.
A unit is one shard; its noise has the shard's number in its seed, so what was interrupted continues with the shards
that have no receipt, and the bytes do not depend on how often it was.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dmd2.config import Config
from dmd2.data.latents import Receipt, npy
from dmd2.data.shards import RECEIPTS, TRAIN, OpenShard, Shard, notes
from dmd2.io.staging import Draft
from dmd2.progress import Progress
from dmd2.rng import seed_of_part

Teacher = Callable[[Sequence[str], int], tuple[Tensor, Tensor]]
"""(prompts, seed) -> noise and answer, each (B, C, h, w)."""


def write_pairs(config: Config, prompts: Sequence[str], teacher: Teacher, draft: Draft) -> list[Receipt]:
    """Sample the prompts, in turn and as often as it takes, into shards."""
    settings = config.pairs
    there = notes(draft.store, RECEIPTS)
    receipts = {number: Receipt.model_validate_json(text) for number, text in there.items()}
    done = sum(receipt.shard.images for receipt in receipts.values())
    starts = range(0, settings.count, settings.per_shard)
    with Progress("pairs", settings.count, "pairs", done) as progress:
        for number, start in enumerate(starts):
            if number not in receipts:
                places = range(start, min(start + settings.per_shard, settings.count))
                shard = _shard(number, places, config, prompts, teacher, draft, progress.advance)
                receipts[number] = Receipt(shard=shard, bytes={}, seconds=0)
                draft.store.write(
                    f"{RECEIPTS}/{number:06d}.json", receipts[number].model_dump_json().encode()
                )
    return [receipts[number] for number in range(len(starts))]


def _shard(
    number: int,
    places: range,
    config: Config,
    prompts: Sequence[str],
    teacher: Teacher,
    draft: Draft,
    count: Callable[[int], None],
) -> Shard:
    shard = Shard(file=f"{TRAIN}-{number:06d}.tar", split=TRAIN)
    written = OpenShard(shard.file, draft.path, draft.store)
    try:
        for first in range(places.start, places.stop, config.pairs.batch):
            rows = range(first, min(first + config.pairs.batch, places.stop))
            texts = [prompts[row % len(prompts)] for row in rows]
            eps, answer = teacher(texts, seed_of_part(config.seed, first))
            for row, text, pair in zip(rows, texts, torch.stack((eps, answer), 1).half(), strict=True):
                written.add(f"{row:08d}", {"npy": npy(pair), "cls": b"0", "txt": text.encode()})
            count(len(rows))
        shard.images = len(places)
        return shard.model_copy(update=written.finish())
    finally:
        written.drop()
