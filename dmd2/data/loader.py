"""Reading shards from the local disk, or from remote storage through a cache that all processes of a machine share.

A shard is compared with its manifest before a sample of it is used. Memory holds only the offsets of the samples in their shards.
Which samples a step gets is decided in `order`.
"""

from __future__ import annotations

import io
import itertools
import math
import os
import tarfile
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dmd2.config import LoaderConfig
from dmd2.data.cache import ShardCache
from dmd2.data.lmdb_table import Table
from dmd2.data.order import Order
from dmd2.data.shard_table import ShardTable
from dmd2.errors import Refused
from dmd2.io.artifact import Manifest, check_file, read_manifest
from dmd2.io.storage import join_uri, open_store

EMBEDDINGS = (".emb", ".pool")
"""Suffixes of stored embeddings of a caption."""
MAX_OPEN_SHARDS = 400
"""Upper limit of shards that one process keeps open; the usual limit of open files is 1,024."""


class RawBatch(NamedTuple):
    image: Tensor
    """uint8 (B, C, H, W); of latents float16 (B, 2, C, h, w): mean and standard deviation."""
    label: Tensor
    """int64 (B,)."""
    text: tuple[str, ...] = ()
    """Captions; an empty string where there is none."""
    embeddings: tuple[Tensor, ...] = ()
    """Stored embeddings of the captions: hidden states (B, L, D), float16, and pooled (B, P)."""


class RawSample(NamedTuple):
    data: bytes | np.ndarray
    """Encoded image, NPY, or the array itself."""
    label: int
    text: str
    embeddings: tuple[np.ndarray, ...] = ()


class TarShard:
    """A tar shard on the disk, with the offsets of its samples."""

    def __init__(self, path: Path, embeddings: bool = False) -> None:
        """
        Args:
            embeddings: Whether stored embeddings are read with a sample.
        """
        self.path = path
        self.file = path.open("rb", buffering=0)
        spans: dict[str, list[tuple[int, int]]] = {
            suffix: [] for suffix in (".png", ".npy", ".cls", *(EMBEDDINGS if embeddings else ()))
        }
        keys: list[str] = []
        texts: dict[int, tuple[int, int]] = {}
        with tarfile.open(path) as members:
            for member in members:
                key, suffix = os.path.splitext(member.name)
                if not keys or keys[-1] != key:
                    keys.append(key)
                if suffix == ".txt":
                    texts[len(keys) - 1] = member.offset_data, member.size
                elif suffix in spans:
                    spans[suffix].append((member.offset_data, member.size))
        self.payload = np.array(spans[".png"] or spans[".npy"], dtype=np.int64).reshape(-1, 2)
        self.label = np.array([int(self._read(*span)) for span in spans[".cls"]], dtype=np.int64)
        self.text = texts
        stored = (spans[suffix] for suffix in EMBEDDINGS if spans.get(suffix))
        self.embeddings = [np.array(each, dtype=np.int64).reshape(-1, 2) for each in stored]
        parts = (self.payload, self.label, *self.embeddings)
        self.is_complete = all(len(part) == len(keys) for part in parts)

    def __len__(self) -> int:
        return len(self.payload)

    def sample(self, index: int) -> RawSample:
        data, *embeddings = (
            self._read(*map(int, spans[index])) for spans in (self.payload, *self.embeddings)
        )
        return RawSample(data, *self.label_and_text(index), tuple(map(decode_array, embeddings)))

    def label_and_text(self, index: int) -> tuple[int, str]:
        text = self._read(*self.text[index]).decode() if index in self.text else ""
        return int(self.label[index]), text

    def keys(self) -> list[str]:
        """Keys of the samples, read from the file again, since training does not need them."""
        self.file.seek(0)
        with tarfile.open(fileobj=self.file) as members:
            return list(dict.fromkeys(os.path.splitext(name)[0] for name in members.getnames()))

    def _read(self, offset: int, size: int) -> bytes:
        return os.pread(self.file.fileno(), size, offset)


class LmdbShard:
    """A split in an LMDB table, with the interface of a tar shard."""

    def __init__(self, path: Path) -> None:
        self.table = Table(path)
        self.is_complete = True

    def __len__(self) -> int:
        return len(self.table)

    def keys(self) -> list[str]:
        """Keys of the samples; a table has only row numbers."""
        return [f"{index:012d}" for index in range(len(self))]

    def sample(self, index: int) -> RawSample:
        row = self.table[index]
        image, label, text = row["image"], row["label"], row["text"]
        assert isinstance(image, np.ndarray)
        assert isinstance(label, np.ndarray)
        assert isinstance(text, str)
        return RawSample(image, int(label), text)

    def label_and_text(self, index: int) -> tuple[int, str]:
        sample = self.sample(index)
        return sample.label, sample.text


class Shards:
    """One split of an artifact of shards, latents or pairs."""

    def __init__(self, folder: str | Path, split: str, kind: str = "shards", cache_gb: float = 50.0) -> None:
        self.uri, self.split = str(folder), split
        self.manifest: Manifest = read_manifest(folder, kind)
        self.files = ShardTable(folder, self.manifest, split)
        self.counts = self.files.counts
        if not self.counts:
            raise Refused(f"{folder} holds no {split} images; shard again with --data.holdout above 0")
        self._starts = np.concatenate([[0], np.cumsum(self.counts)])
        store = open_store(folder)
        self._folder = store.local_folder or Path()
        self._cache = None if store.local_folder else ShardCache(store, int(cache_gb * 1e9))
        self._open: OrderedDict[int, TarShard | LmdbShard] = OrderedDict()
        self._lock = threading.Lock()
        self._checked: set[int] = set()
        self.max_open = 64

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def has_embeddings(self) -> bool:
        """Whether samples have embeddings of captions in place of the captions."""
        return bool(self.manifest.facts.get("embeddings"))

    @property
    def reads_embeddings(self) -> bool:
        """Whether samples have embeddings of captions, in place of the captions or beside them."""
        return self.has_embeddings or bool(self.manifest.facts.get("text_encoders"))

    def sample(self, shard: int, index: int) -> RawSample:
        return self._open_shard(shard).sample(index)

    def keys(self, shard: int) -> list[str]:
        """Keys of the samples of a shard."""
        return self._open_shard(shard).keys()

    def evenly_spaced(self, count: int) -> RawBatch:
        """`count` samples at even distances over the whole split (all samples if there are fewer), so that sorted data is covered evenly."""
        return self.select(self.even_positions(count))

    def evenly_spaced_batches(self, count: int, batch: int) -> Iterator[RawBatch]:
        """The samples of `evenly_spaced(count)`, `batch` at a time."""
        indices = self.even_positions(count)
        for start in range(0, len(indices), batch):
            yield self.select(indices[start : start + batch])

    def even_positions(self, count: int) -> np.ndarray:
        """Indices of the samples of `evenly_spaced(count)`."""
        total = len(self)
        return np.arange(min(count, total)) * total // min(count, total)

    def labels_and_texts(self, places: Iterable[int]) -> list[tuple[int, str]]:
        """Labels and captions of the samples at these indices, without their images."""
        return [self._open_shard(shard).label_and_text(index) for shard, index in self._locate(places)]

    def select(self, places: Iterable[int]) -> RawBatch:
        """The samples at these indices of the whole split."""
        return collate([self.sample(shard, index) for shard, index in self._locate(places)])

    def _locate(self, places: Iterable[int]) -> Iterator[tuple[int, int]]:
        """(shard, index in it) of these indices of the whole split."""
        wanted = list(places)
        shards = np.searchsorted(self._starts, wanted, side="right") - 1
        return ((int(s), int(p - self._starts[s])) for s, p in zip(shards, wanted, strict=True))

    def _open_shard(self, shard: int) -> TarShard | LmdbShard:
        """The opened shard; the least recently used one is closed if more than `max_open` are open."""
        with self._lock:
            tar = self._open.pop(shard, None) or self._load_shard(shard)
            self._open[shard] = tar
            if len(self._open) > self.max_open:
                self._open.popitem(last=False)
        return tar

    def _load_shard(self, shard: int) -> TarShard | LmdbShard:
        file = self.files[shard]
        opener: Callable[[Path], TarShard | LmdbShard] = (
            LmdbShard if file.path.endswith(".lmdb") else partial(TarShard, embeddings=self.reads_embeddings)
        )
        if self._cache:
            tar = self._cache.open(file, opener)
        else:
            path = self._folder / file.path
            if shard not in self._checked:
                check_file(path, file)
                self._checked.add(shard)
            tar = opener(path)
        if not tar.is_complete or len(tar) != self.counts[shard]:
            raise Refused(
                f"{join_uri(self.uri, file.path)} holds {len(tar)} images, its manifest says {self.counts[shard]}; shard again"
            )
        return tar


class DataLoader:
    """Batches of a split for one rank."""

    def __init__(
        self, shards: Shards, batch: int, seed: int, settings: LoaderConfig, rank: int = 0, world: int = 1
    ) -> None:
        if batch % world:
            raise Refused(
                f"a batch of {batch} images cannot be divided among {world} processes; choose a multiple"
            )
        self.shards, self.batch_size, self.settings = shards, batch, settings
        self.rank, self.world = rank, world
        self.order = Order(shards.counts, seed, settings.shuffle_block, settings.lanes)
        reach = self.order.lanes // math.gcd(self.order.lanes, world)
        shards.max_open = min(MAX_OPEN_SHARDS, 2 * settings.shuffle_block * reach)

    def batch(self, step: int) -> RawBatch:
        """This rank's rows of the batch of a step."""
        positions = range(step * self.batch_size + self.rank, (step + 1) * self.batch_size, self.world)
        return collate([self.shards.sample(*self.order.sample(p)) for p in positions])

    def batches(self, first_step: int) -> Iterator[RawBatch]:
        """This rank's batches from `first_step` on, without end; `prefetch` of them are loaded ahead by threads."""
        steps = itertools.count(first_step)
        if not self.settings.prefetch:
            yield from map(self.batch, steps)
        with ThreadPoolExecutor(self.settings.threads, "loader") as pool:
            coming: deque[Future[RawBatch]] = deque()
            try:
                while True:
                    while len(coming) <= self.settings.prefetch:
                        coming.append(pool.submit(self.batch, next(steps)))
                    yield coming.popleft().result()
            finally:
                pool.shutdown(wait=False, cancel_futures=True)


def collate(samples: list[RawSample]) -> RawBatch:
    arrays = np.stack([decode_array(sample.data) for sample in samples])
    labels = torch.tensor([sample.label for sample in samples])
    parts = zip(*(sample.embeddings for sample in samples), strict=True)
    embeddings = tuple(torch.from_numpy(np.stack(part)) for part in parts)
    return RawBatch(torch.from_numpy(arrays), labels, tuple(sample.text for sample in samples), embeddings)


def decode_array(data: bytes | np.ndarray) -> np.ndarray:
    """uint8 (C, H, W) of an encoded PNG, the array of NPY data, or the array itself."""
    if isinstance(data, np.ndarray):
        return data
    if data.startswith(b"\x93NUMPY"):
        return np.load(io.BytesIO(data), allow_pickle=False)
    pixels = np.asarray(Image.open(io.BytesIO(data), formats=("PNG",)))
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
