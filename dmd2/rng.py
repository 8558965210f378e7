"""Random numbers that have an address: (seed, step, row of the batch).

Each row of a batch has a stream of its own, so what it draws depends neither on the rows beside it nor on how many
processes or parts the batch is divided among; and nothing has to be kept between steps, so a resumed run draws what
the uninterrupted one would have drawn. What decides how many network calls are made is drawn from (seed, step) alone
and is the same for all rows, or sharded training would deadlock.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


class Rng:
    """The streams of some rows. Without streams, the numbers are those of torch's global generator."""

    def __init__(self, seeds: Sequence[int] = (), device: torch.device | None = None) -> None:
        self.seeds = tuple(seeds)
        self.device = device or torch.device("cpu")
        self._streams = [torch.Generator(self.device).manual_seed(seed) for seed in self.seeds]

    @classmethod
    def at(cls, seed: int, step: int, rows: range, device: torch.device) -> Rng:
        """The streams of these rows of the whole batch of a step."""
        words = np.random.SeedSequence([seed, step]).generate_state(max(rows, default=0) + 1, np.uint64)
        return cls([int(words[row]) for row in rows], device)

    def __getitem__(self, rows: slice) -> Rng:
        """The very streams of these rows: what one draws, the other has drawn."""
        part = Rng((), self.device)
        part.seeds, part._streams = self.seeds[rows], self._streams[rows]
        return part

    def normal(self, *shape: int) -> Tensor:
        """(B, *shape), float32."""
        return torch.stack([torch.randn(shape, generator=g, device=self.device) for g in self._streams])

    def normal_like(self, x: Tensor) -> Tensor:
        """As `x` (B, ...)."""
        return self.normal(*x.shape[1:]) if self._streams else torch.randn_like(x)

    def integers(self, low: int, high: int, like: Tensor) -> Tensor:
        """Of [low, high), int64 (B,), beside `like` (B, ...)."""
        if not self._streams:
            return torch.randint(low, high, (len(like),), device=like.device)
        return torch.cat(
            [torch.randint(low, high, (1,), generator=g, device=self.device) for g in self._streams]
        )

    def choose(self, count: int) -> list[int]:
        """A number of [0, count) for each row, known to the host; from a stream beside the others."""
        return [int(np.random.default_rng([seed, count]).integers(count)) for seed in self.seeds]


def reseed(seed: int) -> None:
    """Give torch's global generator a state of its own, for what is drawn while objects are built."""
    torch.manual_seed(int(np.random.SeedSequence([seed]).generate_state(1, np.uint64)[0]))


def draw_shared(seed: int, step: int, count: int) -> int:
    """A number in [0, count) that is the same for all rows and processes."""
    return int(np.random.default_rng([seed, step]).integers(count))


def seed_of_part(seed: int, first: int) -> int:
    """Of samples that are drawn with one seed, from the `first` of all on: a part can be drawn again alone."""
    return seed * 1_000_003 + first
