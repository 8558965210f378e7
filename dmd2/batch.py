"""What the networks work on: samples, and what they were made from."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dmd2.io.tensors import to_device
from dmd2.rng import Rng


@dataclass(frozen=True, kw_only=True)
class Conditioning:
    """One row per sample. A family fills the fields it knows and reads no other."""

    label: Tensor | None = None
    """Class index, int64 (B,)."""
    text: Tensor | None = None
    """Token embeddings, (B, L, D)."""
    pooled: Tensor | None = None
    """Whole-prompt embedding, (B, D)."""
    size: Tensor | None = None
    """SDXL micro-conditioning: original size, crop, target size in pixels, (B, 6)."""

    def map(self, f: Callable[[Tensor], Tensor]) -> Conditioning:
        fields = {k: v for k, v in self.__dict__.items() if v is not None}
        return dataclasses.replace(self, **{k: f(v) for k, v in fields.items()})

    def __getitem__(self, rows: slice) -> Conditioning:
        return self.map(lambda t: t[rows])

    def to(self, device: torch.device) -> Conditioning:
        return self.map(lambda t: to_device(t, device))

    def cat(self, other: Conditioning) -> Conditioning:
        pairs = {k: (v, getattr(other, k)) for k, v in self.__dict__.items() if v is not None}
        return Conditioning(**{k: torch.cat(pair) for k, pair in pairs.items()})


@dataclass(frozen=True)
class Batch:
    """Clean samples and what they show."""

    x: Tensor
    """(B, C, H, W), float32, in the space of the family: pixels in [-1, 1], or scaled latents."""
    cond: Conditioning
    uncond: Conditioning
    """The unconditional counterpart of `cond`, for guidance."""
    rng: Rng = field(default_factory=Rng)
    """What is drawn for these rows comes from here."""

    def to(self, device: torch.device) -> Batch:
        return Batch(to_device(self.x, device), self.cond.to(device), self.uncond.to(device), self.rng)

    def split(self, size: int) -> list[Batch]:
        """Parts of `size` rows, the last one shorter; a size of 0 makes no parts of it."""
        starts = range(0, len(self.x), size or len(self.x))
        rows = [slice(start, start + (size or len(self.x))) for start in starts]
        return [Batch(self.x[r], self.cond[r], self.uncond[r], self.rng[r]) for r in rows]
