"""The order in which samples are read: a pure function of (seed, epoch, position).

Each epoch shuffles the shards and divides their sequence into lanes that are read in parallel: position p belongs to lane
p mod lanes. Within a lane, the images of a block of shards are shuffled. Step k of a run reads positions k * batch to
(k + 1) * batch - 1 on any number of processes, so a resumed run needs no state but its step. If the number of processes divides
the number of lanes, each process reads its own shards only.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np


class Order:
    """A permutation of all samples for each epoch.

    Memory: 8 bytes per shard, and 4 bytes per image of the two most recently used blocks of each lane.
    """

    def __init__(self, counts: Sequence[int], seed: int, block: int, lanes: int) -> None:
        self.counts = np.asarray(counts, dtype=np.int64)
        self.total, self.seed, self.block = int(self.counts.sum()), seed, block
        self.lanes = min(lanes, self.total)
        self._epoch = lru_cache(maxsize=2)(self._shuffled_shards)
        self._permutation = lru_cache(maxsize=2 * self.lanes)(self._shuffled_block)

    def sample(self, position: int) -> tuple[int, int]:
        """(shard, index in the shard) of a position, counted from the start of the first epoch."""
        epoch, place = divmod(position, self.total)
        shards, starts = self._epoch(epoch)
        row, lane = divmod(place, self.lanes)
        first, _ = self._lane(lane)
        low, high, block = self._block_around(first + row, lane, starts)
        place = low + int(self._permutation(epoch, lane, block, high - low)[first + row - low])
        at = int(np.searchsorted(starts, place, side="right")) - 1
        return int(shards[at]), place - int(starts[at])

    def shards_of(self, epoch: int, lane: int) -> list[int]:
        """The shards that a lane reads in an epoch, in reading order."""
        shards, starts = self._epoch(epoch)
        first, last = self._lane(lane)
        low, high = np.searchsorted(starts, [first, last - 1], side="right") - 1
        return shards[low : high + 1].tolist()

    def _lane(self, lane: int) -> tuple[int, int]:
        """The places [first, last) of a lane; the first lanes are one longer if lanes do not divide the total."""
        length, longer = divmod(self.total, self.lanes)
        return lane * length + min(lane, longer), (lane + 1) * length + min(lane + 1, longer)

    def _block_around(self, place: int, lane: int, starts: np.ndarray) -> tuple[int, int, int]:
        """The places [low, high) that are shuffled together with `place`, and the block's number in its lane."""
        first, last = self._lane(lane)
        head, at = (int(i) - 1 for i in np.searchsorted(starts, [first, place], side="right"))
        block = (at - head) // self.block
        begin = head + block * self.block
        end = min(begin + self.block, len(starts) - 1)
        return max(first, int(starts[begin])), min(last, int(starts[end])), block

    def _shuffled_shards(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The shuffled non-empty shards, and the offset at which each starts, followed by the total."""
        filled = np.flatnonzero(self.counts)
        shards = filled[np.random.default_rng([self.seed, epoch]).permutation(len(filled))]
        return shards, np.concatenate([[0], np.cumsum(self.counts[shards])])

    def _shuffled_block(self, epoch: int, lane: int, block: int, size: int) -> np.ndarray:
        generator = np.random.default_rng([self.seed, epoch, 1 + block, lane])
        return generator.permutation(size).astype(np.uint32)
