"""ODE pairs: noise and the sample that the teacher's sampler makes of it. Training data of the regression warm-up.

A sample is `<key>.npy`, float16 (2, C, h, w): noise and the teacher's sample; and `<key>.txt`, the prompt. The unit of work is one
shard. The seed of the noise depends only on the position of the pair, so interrupted work continues with the shards that have no
result file yet and gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dmd2.config import Config
from dmd2.data.latents import EncodedShard, npy_bytes
from dmd2.data.shard_table import TRAIN, ShardInfo
from dmd2.data.shard_writer import ShardWriter
from dmd2.data.unit_results import RESULTS, read_unit_files
from dmd2.io.staging import Draft
from dmd2.progress import Progress
from dmd2.rng import seed_of_part

SamplePairs = Callable[[Sequence[str], int], tuple[Tensor, Tensor]]
"""(prompts, seed) -> noise and the teacher's samples, each (B, C, h, w)."""


def write_pairs(
    config: Config, prompts: Sequence[str], sample_pairs: SamplePairs, draft: Draft
) -> list[EncodedShard]:
    """Write `pairs.count` pairs as shards; prompts are repeated in turn if there are fewer."""
    settings = config.pairs
    there = read_unit_files(draft.store, RESULTS)
    results = {number: EncodedShard.model_validate_json(text) for number, text in there.items()}
    done = sum(result.shard.images for result in results.values())
    starts = range(0, settings.count, settings.per_shard)
    with Progress("pairs", settings.count, "pairs", done) as progress:
        for number, start in enumerate(starts):
            if number not in results:
                places = range(start, min(start + settings.per_shard, settings.count))
                shard = _write_shard(number, places, config, prompts, sample_pairs, draft, progress.advance)
                results[number] = EncodedShard(shard=shard, bytes={}, seconds=0)
                draft.store.write(f"{RESULTS}/{number:06d}.json", results[number].model_dump_json().encode())
    return [results[number] for number in range(len(starts))]


def _write_shard(
    number: int,
    places: range,
    config: Config,
    prompts: Sequence[str],
    sample_pairs: SamplePairs,
    draft: Draft,
    count: Callable[[int], None],
) -> ShardInfo:
    shard = ShardInfo(file=f"{TRAIN}-{number:06d}.tar", split=TRAIN)
    writer = ShardWriter(shard.file, draft.path, draft.store)
    try:
        for first in range(places.start, places.stop, config.pairs.batch):
            rows = range(first, min(first + config.pairs.batch, places.stop))
            texts = [prompts[row % len(prompts)] for row in rows]
            eps, x = sample_pairs(texts, seed_of_part(config.seed, first))
            for row, text, pair in zip(rows, texts, torch.stack((eps, x), 1).half(), strict=True):
                writer.add(f"{row:08d}", {"npy": npy_bytes(pair), "cls": b"0", "txt": text.encode()})
            count(len(rows))
        shard.images = len(places)
        return shard.model_copy(update=writer.close())
    finally:
        writer.discard()
