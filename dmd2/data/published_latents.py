"""Latents with captions as the DMD2 reference code stores them: `.pt` files, or an LMDB. They become shards of latents.

They are samples of the VAE's posterior, scaled as the diffusion model sees them; a shard holds them as mean, with a standard
deviation of 0. Of a `.pt` file, tensors, texts and arrays of texts are read, and nothing in it is executed.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dmd2.data.latents import EncodedShard, npy_bytes
from dmd2.data.reference_lmdb import ReferenceLmdb
from dmd2.data.shards import RESULTS, TRAIN, ShardInfo, ShardWriter, read_unit_files
from dmd2.errors import Refused, brief
from dmd2.io.staging import Draft
from dmd2.progress import Progress

Row = tuple[Tensor, str]
"""A latent (C, h, w), float16, and its caption."""
RECONSTRUCT = np.zeros(1).__reduce__()[0]
TEXT_ARRAY: list[Any] = [
    (RECONSTRUCT, "numpy.core.multiarray._reconstruct"),
    (RECONSTRUCT, "numpy._core.multiarray._reconstruct"),
    np.ndarray,
    np.dtype,
    type(np.dtype("U1")),
    type(np.dtype("O")),
]
"""What a pickle may name, beside tensors: an array of texts."""
FLOAT16 = 2
"""Bytes of a value of a latent in the LMDB, which does not say its type."""


@dataclass(frozen=True)
class Part:
    """Rows that become one shard."""

    count: int
    read: Callable[[], Iterator[Row]]


def find_parts(source: Path, per_shard: int) -> list[Part]:
    """The latents of a folder of .pt files, one such file, or an LMDB, `per_shard` together."""
    if source.suffix == ".mdb" or (source / "data.mdb").is_file():
        table = ReferenceLmdb.open(source / "data.mdb" if source.is_dir() else source)
        count, *shape = _lmdb_shape(table)
        return _parts(count, per_shard, partial(_lmdb_rows, table, tuple(shape)))
    paths = [source] if source.is_file() else sorted(source.glob("*.pt"))
    if not paths:
        raise Refused(
            f"{source} holds no .pt files and no data.mdb; give latents as DMD2's reference code stores them"
        )
    return [
        part for path in paths for part in _parts(len(_read_pt(path)[0]), per_shard, partial(_pt_rows, path))
    ]


def _parts(count: int, per_shard: int, rows: Callable[[range], Iterator[Row]]) -> list[Part]:
    ranges = [range(start, min(start + per_shard, count)) for start in range(0, count, per_shard)]
    return [Part(len(part), partial(rows, part)) for part in ranges]


def _pt_rows(path: Path, rows: range) -> Iterator[Row]:
    latents, prompts = _read_pt(path)
    for row in rows:
        yield latents[row].half(), prompts[row]


def _read_pt(path: Path) -> tuple[Tensor, list[str]]:
    """(latents (N, C, h, w), captions) of a file; pages of the latents are read when they are used."""
    try:
        with torch.serialization.safe_globals(TEXT_ARRAY):
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        latents, prompts = found["latents"], ["" if text is None else text for text in list(found["prompts"])]
    except (pickle.UnpicklingError, RuntimeError, KeyError, TypeError, ValueError, EOFError) as error:
        raise Refused(
            f"{path} holds no dict of `latents` and `prompts`, or does more than that ({brief(error)}); nothing of it was run"
        ) from None
    texts = all(isinstance(text, str) for text in prompts)
    if not isinstance(latents, Tensor) or latents.ndim != 4 or len(prompts) != len(latents) or not texts:
        raise Refused(f"{path} does not hold one text for each latent (N, C, h, w); get the file again")
    return latents, [str(text) for text in prompts]


def _lmdb_shape(table: ReferenceLmdb) -> tuple[int, ...]:
    """(N, C, h, w) of the latents in an LMDB."""
    if table.shape("prompt_embeds_list"):
        raise Refused(
            f"{table.path} holds ODE pairs with embeddings in place of their prompts, which this program does not train on; make pairs with dmd2 pairs"
        )
    shape = table.shape("latents")
    if len(shape) != 4 or not table.shape("prompts"):
        raise Refused(
            f"{table.path} holds no latents (N, C, h, w) with prompts; give one of latents as DMD2 stores them"
        )
    return shape


def _lmdb_rows(table: ReferenceLmdb, shape: tuple[int, ...], rows: range) -> Iterator[Row]:
    for row in rows:
        latent = table.row("latents", row, FLOAT16 * math.prod(shape))
        array = np.frombuffer(latent, np.float16).reshape(shape)
        yield torch.from_numpy(array.copy()), table.row("prompts", row).decode()


def write_published_latents(
    parts: Sequence[Part], shape: tuple[int, int, int], draft: Draft
) -> list[EncodedShard]:
    """Write each part as a shard, those that have no result file yet."""
    there = read_unit_files(draft.store, RESULTS)
    results = {number: EncodedShard.model_validate_json(text) for number, text in there.items()}
    total, done = sum(part.count for part in parts), sum(result.shard.images for result in results.values())
    with Progress("convert", total, "latents", done) as progress:
        for number, part in enumerate(parts):
            if number not in results:
                results[number] = _write_shard(number, part, shape, draft)
                draft.store.write(f"{RESULTS}/{number:06d}.json", results[number].model_dump_json().encode())
                progress.advance(part.count)
    return [results[number] for number in range(len(parts))]


def _write_shard(number: int, part: Part, shape: tuple[int, int, int], draft: Draft) -> EncodedShard:
    name = f"{TRAIN}-{number:06d}.tar"
    writer = ShardWriter(name, draft.path, draft.store)
    try:
        for row, (latent, text) in enumerate(part.read()):
            _check(latent, shape, f"latent {row} of shard {number}")
            moments = torch.stack((latent, torch.zeros_like(latent)))
            writer.add(f"{row:08d}", {"npy": npy_bytes(moments), "cls": b"0", "txt": text.encode()})
        shard = ShardInfo(file=name, split=TRAIN, images=part.count, histogram={0: part.count})
        return EncodedShard(shard=shard.model_copy(update=writer.close()), bytes={}, seconds=0)
    finally:
        writer.discard()


def _check(latent: Tensor, shape: tuple[int, int, int], what: str) -> None:
    if tuple(latent.shape) != shape:
        raise Refused(
            f"{what} has shape {tuple(latent.shape)}, the recipe's network takes {shape}; use its recipe"
        )
    if not latent.isfinite().all():
        raise Refused(f"{what} has infinite or NaN values; get the file again")
