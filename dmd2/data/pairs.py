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
from dmd2.data.encoded_shards import EncodedShard, npy_bytes, write_missing_shards
from dmd2.data.shard_writer import ShardWriter
from dmd2.data.unit_results import UnitResults
from dmd2.io.staging import Draft
from dmd2.rng import seed_of_part

SamplePairs = Callable[[Sequence[str], int], tuple[Tensor, Tensor]]
"""(prompts, seed) -> noise and the teacher's samples, each (B, C, h, w)."""


def write_pairs(
    config: Config, prompts: Sequence[str], sample_pairs: SamplePairs, draft: Draft
) -> UnitResults[EncodedShard]:
    """Write `pairs.count` pairs as shards; prompts are repeated in turn if there are fewer."""
    settings = config.pairs
    places = [
        range(start, min(start + settings.per_shard, settings.count))
        for start in range(0, settings.count, settings.per_shard)
    ]

    def write(number: int, writer: ShardWriter, result: EncodedShard, count: Callable[[int], None]) -> None:
        mine = places[number]
        for first in range(mine.start, mine.stop, settings.batch):
            rows = range(first, min(first + settings.batch, mine.stop))
            texts = [prompts[row % len(prompts)] for row in rows]
            eps, x = sample_pairs(texts, seed_of_part(config.seed, first))
            for row, text, pair in zip(rows, texts, torch.stack((eps, x), 1).half(), strict=True):
                writer.add(f"{row:08d}", {"npy": npy_bytes(pair), "cls": b"0", "txt": text.encode()})
            result.shard.images += len(rows)
            count(len(rows))

    return write_missing_shards("pairs", "pairs", dict(enumerate(map(len, places))), write, draft)
