"""Reading shards in an order that is a pure function of (seed, epoch, position).

An epoch shuffles the shards, groups them into blocks that fit in memory, and shuffles the images of each block.
Step k of a run takes the positions k * batch ... (k + 1) * batch - 1, whatever was read before: a resumed run
needs to remember nothing but its step. A shard is compared with its manifest before an image of it is used.
"""

from __future__ import annotations

import io
import itertools
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from webdataset.tariterators import group_by_keys, tar_file_expander

from dmd2.errors import Refused
from dmd2.storage import File, Manifest, check_file, local, read


class Batch(NamedTuple):
    image: Tensor
    """uint8 (B, C, H, W)."""
    label: Tensor
    """int64 (B,)."""


class Shards:
    """One split of a shards folder."""

    def __init__(self, folder: str | Path, split: str) -> None:
        self.folder = local(folder)
        self.manifest: Manifest = read(folder, "shards")
        listed = {file.path: file for file in self.manifest.files}
        shards = [shard for shard in self.manifest.facts["shards"] if shard["split"] == split]
        if not shards:
            raise Refused(f"{folder} holds no {split} images; shard again with --data.holdout above 0")
        self.files: list[File] = [listed[shard["file"]] for shard in shards]
        self.counts: list[int] = [shard["images"] for shard in shards]
        self._checked: set[int] = set()

    def __len__(self) -> int:
        return sum(self.counts)

    def load(self, index: int) -> list[tuple[bytes, int]]:
        """All images of a shard, still encoded, with their labels."""
        path = self.folder / self.files[index].path
        if index not in self._checked:
            check_file(path, self.files[index])
            self._checked.add(index)
        with path.open("rb") as stream:
            files = tar_file_expander([{"url": str(path), "stream": stream}])
            samples = [(sample["png"], int(sample["cls"])) for sample in group_by_keys(files)]
        if len(samples) != self.counts[index]:
            raise Refused(
                f"{path} holds {len(samples)} images, its manifest says {self.counts[index]}; shard again"
            )
        return samples

    def in_order(self, count: int) -> Batch:
        """The first `count` images, or all there are."""
        samples = itertools.chain.from_iterable(self.load(index) for index in range(len(self.files)))
        return decode(list(itertools.islice(samples, count)))


class Stream:
    """Batches of a split, for one rank of a world."""

    def __init__(
        self, shards: Shards, batch: int, seed: int, shards_in_memory: int, rank: int = 0, world: int = 1
    ) -> None:
        if batch % world:
            raise Refused(
                f"a batch of {batch} images cannot be divided among {world} processes; choose a multiple"
            )
        self.shards, self.batch, self.seed = shards, batch, seed
        self.rank, self.world = rank, world
        self.block_shards = min(shards_in_memory, len(shards.counts))
        self._loaded: OrderedDict[int, list[tuple[bytes, int]]] = OrderedDict()
        self._permutations = lru_cache(maxsize=2)(self._permutation)
        self._epochs = lru_cache(maxsize=2)(self._epoch)

    def batches(self, first_step: int) -> Iterator[Batch]:
        """What this rank sees from that step on, for ever."""
        for step in itertools.count(first_step):
            yield decode(
                [
                    self._sample(p)
                    for p in range(step * self.batch + self.rank, (step + 1) * self.batch, self.world)
                ]
            )

    def _sample(self, position: int) -> tuple[bytes, int]:
        epoch, place = divmod(position, len(self.shards))
        shards, starts = self._epochs(epoch)
        block = bisect_right(starts, place) - 1
        index = int(self._permutations(epoch, block)[place - starts[block]])
        for shard in self._members(shards, block):
            if index < self.shards.counts[shard]:
                return self._load(shard)[index]
            index -= self.shards.counts[shard]
        raise AssertionError("a position beyond its block")

    def _epoch(self, epoch: int) -> tuple[list[int], list[int]]:
        """The order of the shards, and the position at which each block starts."""
        shards = np.random.default_rng([self.seed, epoch]).permutation(len(self.shards.counts)).tolist()
        sizes = [
            sum(self.shards.counts[s] for s in self._members(shards, b))
            for b in range(-(-len(shards) // self.block_shards))
        ]
        return shards, [0, *itertools.accumulate(sizes)][:-1]

    def _permutation(self, epoch: int, block: int) -> np.ndarray:
        shards, _ = self._epochs(epoch)
        size = sum(self.shards.counts[s] for s in self._members(shards, block))
        return np.random.default_rng([self.seed, epoch, block]).permutation(size)

    def _members(self, shards: list[int], block: int) -> list[int]:
        return shards[block * self.block_shards : (block + 1) * self.block_shards]

    def _load(self, shard: int) -> list[tuple[bytes, int]]:
        """A shard's images, kept while it is among the most recently used."""
        if shard not in self._loaded:
            self._loaded[shard] = self.shards.load(shard)
            if len(self._loaded) > 2 * self.block_shards:
                self._loaded.popitem(last=False)
        self._loaded.move_to_end(shard)
        return self._loaded[shard]


def decode(samples: list[tuple[bytes, int]]) -> Batch:
    images = np.stack([_pixels(png) for png, _ in samples])
    return Batch(torch.from_numpy(images), torch.tensor([label for _, label in samples]))


def _pixels(png: bytes) -> np.ndarray:
    """uint8 (C, H, W)."""
    pixels = np.asarray(Image.open(io.BytesIO(png)))
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
