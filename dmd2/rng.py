"""Random numbers that have an address: (seed, step, row of the batch).

Each row of a batch has its own generator, so its numbers depend neither on the other rows nor on the number of ranks or
micro-batches. No state is kept between steps, so a resumed run draws the same numbers as an uninterrupted one. Numbers that
decide how many network calls are made come from (seed, step) alone and are the same on all ranks: otherwise sharded training
would deadlock.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


class Rng:
    """One generator per row. Without any seeds, numbers come from torch's global generator."""

    def __init__(self, seeds: Sequence[int] = (), device: torch.device | None = None) -> None:
        self.seeds = tuple(seeds)
        self.device = device or torch.device("cpu")
        self._generators = [torch.Generator(self.device).manual_seed(seed) for seed in self.seeds]

    @classmethod
    def at(cls, seed: int, step: int, rows: range, device: torch.device) -> Rng:
        """The generators of these rows, counted through the global batch of a step."""
        seeds = np.random.SeedSequence([seed, step]).generate_state(max(rows, default=0) + 1, np.uint64)
        return cls([int(seeds[row]) for row in rows], device)

    def __getitem__(self, rows: slice) -> Rng:
        """The same generators of these rows, not copies: numbers drawn from one are also consumed in the other."""
        part = Rng((), self.device)
        part.seeds, part._generators = self.seeds[rows], self._generators[rows]
        return part

    def normal(self, *shape: int) -> Tensor:
        """Gaussian noise (B, *shape), float32."""
        return torch.stack([torch.randn(shape, generator=g, device=self.device) for g in self._generators])

    def normal_like(self, x: Tensor) -> Tensor:
        """Gaussian noise in the shape of x (B, ...), float32."""
        return self.normal(*x.shape[1:]) if self._generators else torch.randn_like(x)

    def integers(self, low: int, high: int, like: Tensor) -> Tensor:
        """Uniform integers in [low, high), int64 (B,), on the device of `like` (B, ...)."""
        if not self._generators:
            return torch.randint(low, high, (len(like),), device=like.device)
        return torch.cat(
            [torch.randint(low, high, (1,), generator=g, device=self.device) for g in self._generators]
        )

    def indices(self, count: int) -> list[int]:
        """An index in [0, count) for each row, as Python numbers; the generators are not advanced."""
        return [int(np.random.default_rng([seed, count]).integers(count)) for seed in self.seeds]


def reseed(seed: int) -> None:
    """Seed torch's global generator, which initializes the networks that are built next."""
    torch.manual_seed(int(np.random.SeedSequence([seed]).generate_state(1, np.uint64)[0]))


def generator(seed: int, step: int, name: str, device: torch.device) -> torch.Generator:
    """A generator of a step for numbers that belong to no row, the same on all ranks."""
    seeds = np.random.SeedSequence([seed, step, *name.encode()]).generate_state(1, np.uint64)
    return torch.Generator(device).manual_seed(int(seeds[0]))


def draw_shared(seed: int, step: int, count: int) -> int:
    """A uniform integer in [0, count) that is the same on all ranks."""
    return int(np.random.default_rng([seed, step]).integers(count))


def seed_of_part(seed: int, first: int) -> int:
    """The seed of the part of a set of samples that begins at sample `first`, so that each part can be drawn again alone."""
    return seed * 1_000_003 + first
