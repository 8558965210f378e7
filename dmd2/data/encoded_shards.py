"""Shards of tensors, made one after the other: latents and pairs. Interrupted work continues with those that have no result file yet."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Mapping

import numpy as np
from pydantic import BaseModel
from torch import Tensor

from dmd2.data.shard_table import TRAIN, ShardInfo
from dmd2.data.shard_writer import ShardWriter
from dmd2.data.unit_results import RESULTS, UnitResults, read_unit_files
from dmd2.io.staging import Draft
from dmd2.progress import Progress


class EncodedShard(BaseModel):
    """The result of making one shard. It is written after the shard is in its final place."""

    shard: ShardInfo
    bytes: dict[str, int] = {}
    """Total bytes of all samples, by suffix; empty for pairs and what was encoded elsewhere."""
    seconds: float
    captions_cut: int = 0
    """Number of captions that are longer than the window of the text encoder."""


WriteShard = Callable[[int, ShardWriter, EncodedShard, Callable[[int], None]], None]
"""(number of the shard, its writer, its result, called with numbers of samples that are done): write the samples, count them and what else
the result says."""


def write_missing_shards(
    label: str, unit: str, counts: Mapping[int, int], write: WriteShard, draft: Draft, show: bool = True
) -> UnitResults[EncodedShard]:
    """Write those of the shards that are not there yet; the results of all of them.

    Args:
        label: What the progress bar calls it.
        unit: What it counts.
        counts: {number of a shard: number of its samples}.
        show: Whether to show the progress bar.
    """
    results = UnitResults(EncodedShard, read_unit_files(draft.store, RESULTS, counts))
    done = sum(count for number, count in counts.items() if number in results)
    with Progress(label, sum(counts.values()), unit, done, show) as progress:
        for number in (number for number in counts if number not in results):
            results.add(number, _write_shard(number, write, draft, progress.advance))
    return results


def _write_shard(number: int, write: WriteShard, draft: Draft, count: Callable[[int], None]) -> bytes:
    """Write a shard, then its result file; return the content of that."""
    start, shard = time.monotonic(), ShardInfo(file=f"{TRAIN}-{number:06d}.tar", split=TRAIN)
    result = EncodedShard(shard=shard, seconds=0)
    with ShardWriter(result.shard, draft.path, draft.store) as writer:
        write(number, writer, result, count)
    result.seconds = round(time.monotonic() - start, 3)
    text = result.model_dump_json().encode()
    draft.store.write(f"{RESULTS}/{number:06d}.json", text)
    return text


def npy_bytes(part: Tensor) -> bytes:
    stream = io.BytesIO()
    np.save(stream, part.numpy(), allow_pickle=False)
    return stream.getvalue()
