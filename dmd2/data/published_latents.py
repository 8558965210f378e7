"""Latents with captions as the DMD2 reference code stores them, `.pt` files or an LMDB, and its LMDB of ODE pairs.

Latents are samples of the VAE's posterior, scaled as the diffusion model sees them; a shard holds them as mean, with a standard
deviation of 0. Pairs are noise and the teacher's sample, with the embeddings of a prompt in place of its text. Of a `.pt` file,
tensors, texts and arrays of texts are read, and nothing in it is executed.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dmd2.data.captions import decode_text
from dmd2.data.encoded_shards import EncodedShard, npy_bytes, write_missing_shards
from dmd2.data.reference_lmdb import ReferenceLmdb
from dmd2.data.shard_writer import ShardWriter
from dmd2.data.unit_results import UnitResults
from dmd2.errors import Refused, brief
from dmd2.io.staging import Draft


class Row(NamedTuple):
    """A row of the published data, in float16."""

    tensors: Tensor
    """(2, C, h, w): a latent as mean and standard deviation, or noise and the teacher's sample."""
    text: str = ""
    embeddings: Mapping[str, Tensor] = MappingProxyType({})
    """Of the prompt, by suffix in the shard: hidden states (L, D), and pooled (P,)."""


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
"""Bytes of a value in an LMDB of latents or pairs, which does not say its type."""
NOISE, SAMPLES = "latents", "images"
"""Arrays of an LMDB of pairs; the noise may be a whole trajectory, which starts with it."""
EMBEDDINGS = {"emb": "prompt_embeds_list", "pool": "pooled_prompt_embeds"}
"""Suffix in a shard -> array of an LMDB of pairs."""


@dataclass(frozen=True)
class Part:
    """Rows that become one shard."""

    count: int
    read: Callable[[], Iterator[Row]]


def holds_pairs(source: Path) -> bool:
    """Whether it is an LMDB of ODE pairs."""
    table = _open_lmdb(source)
    return table is not None and bool(table.shape(EMBEDDINGS["emb"]))


def _open_lmdb(source: Path) -> ReferenceLmdb | None:
    if source.suffix == ".mdb" or (source / "data.mdb").is_file():
        return ReferenceLmdb.open(source / "data.mdb" if source.is_dir() else source)
    return None


def find_parts(source: Path, per_shard: int) -> list[Part]:
    """The rows of a folder of .pt files, one such file, or an LMDB, `per_shard` together."""
    if table := _open_lmdb(source):
        if table.shape(EMBEDDINGS["emb"]):
            return _parts(table.shape(SAMPLES)[0], per_shard, partial(_pair_rows, table, _pair_shapes(table)))
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
        yield _as_moments(latents[row].half(), prompts[row])


def _as_moments(latent: Tensor, text: str) -> Row:
    return Row(torch.stack((latent, torch.zeros_like(latent))), text)


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
    shape = table.shape("latents")
    if len(shape) != 4 or not table.shape("prompts"):
        raise Refused(
            f"{table.path} holds no latents (N, C, h, w) with prompts; give one of latents as DMD2 stores them"
        )
    return shape


def _lmdb_rows(table: ReferenceLmdb, shape: tuple[int, ...], rows: range) -> Iterator[Row]:
    for row in rows:
        latent = _half(table, "latents", row, shape)
        yield _as_moments(latent, decode_text(table.row("prompts", row), f"{table.path}: prompt {row}"))


def _half(table: ReferenceLmdb, array: str, row: int, shape: tuple[int, ...]) -> Tensor:
    data = table.row(array, row, FLOAT16 * math.prod(shape))
    return torch.from_numpy(np.frombuffer(data, np.float16).reshape(shape).copy())


def _pair_shapes(table: ReferenceLmdb) -> dict[str, tuple[int, ...]]:
    """Array of an LMDB of pairs -> shape of its rows."""
    dimensions = {SAMPLES: (4,), NOISE: (4, 5), EMBEDDINGS["emb"]: (3,), EMBEDDINGS["pool"]: (2,)}
    shapes = {array: table.shape(array) for array in dimensions}
    count = shapes[SAMPLES][:1]
    for array, shape in shapes.items():
        if len(shape) not in dimensions[array] or shape[:1] != count or min(shape) < 1:
            raise Refused(
                f"{table.path} holds no ODE pairs as DMD2 stores them: {array} is {shape or 'missing'}; get the file again"
            )
    return {array: shape[1:] for array, shape in shapes.items()}


def _pair_rows(table: ReferenceLmdb, shapes: dict[str, tuple[int, ...]], rows: range) -> Iterator[Row]:
    for row in rows:
        found = {array: _half(table, array, row, shape) for array, shape in shapes.items()}
        noise = found[NOISE] if found[NOISE].ndim == found[SAMPLES].ndim else found[NOISE][0]
        embeddings = {suffix: found[array] for suffix, array in EMBEDDINGS.items()}
        if noise.shape != found[SAMPLES].shape:
            raise Refused(
                f"{table.path}: noise {tuple(noise.shape)} and sample {tuple(found[SAMPLES].shape)} of row {row} differ in shape; get the file again"
            )
        yield Row(torch.stack((noise, found[SAMPLES])), embeddings=embeddings)


def write_published_latents(
    parts: Sequence[Part], shape: tuple[int, int, int], draft: Draft
) -> UnitResults[EncodedShard]:
    """Write each part as a shard, those that have no result file yet."""

    def write(number: int, writer: ShardWriter, result: EncodedShard, count: Callable[[int], None]) -> None:
        part = parts[number]
        for place, row in enumerate(part.read()):
            _check(row, shape, f"row {place} of shard {number}")
            embeddings = {suffix: npy_bytes(tensor) for suffix, tensor in row.embeddings.items()}
            text = {} if embeddings else {"txt": row.text.encode()}
            writer.add(f"{place:08d}", {"npy": npy_bytes(row.tensors), "cls": b"0"} | text | embeddings)
        result.shard.images, result.shard.histogram = part.count, {0: part.count}
        count(part.count)

    counts = {number: part.count for number, part in enumerate(parts)}
    return write_missing_shards("convert", "samples", counts, write, draft)


def _check(row: Row, shape: tuple[int, int, int], what: str) -> None:
    found = tuple(row.tensors.shape[1:])
    if found != shape:
        raise Refused(f"{what} has shape {found}, the recipe's network takes {shape}; use its recipe")
    if not all(tensor.isfinite().all() for tensor in (row.tensors, *row.embeddings.values())):
        raise Refused(f"{what} has infinite or NaN values; get the file again")
