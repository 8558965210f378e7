"""What networks work on: batches of samples, and what each sample is conditioned on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from dmd2.io.tensors import to_device
from dmd2.rng import Rng


class Conditioning(Mapping[str, Tensor]):
    """What samples are conditioned on: named tensors with one row per sample. Which names there are is up to the family.

    The families of this package use `label`, int64 (B,), the class; `text`, (B, L, D), the embeddings of L tokens; `pooled`,
    (B, P), the embedding of the whole text; and `size`, (B, 6), SDXL's original size, corner of the crop and target size in pixels.
    """

    def __init__(self, **tensors: Tensor) -> None:
        self._tensors = tensors

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._tensors:
            raise KeyError(
                f"the samples are conditioned on {', '.join(self) or 'nothing'}, and the network needs {name}"
            )
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def map(self, f: Callable[[Tensor], Tensor]) -> Conditioning:
        """`f` of each tensor."""
        return Conditioning(**{name: f(tensor) for name, tensor in self.items()})

    def rows(self, rows: slice) -> Conditioning:
        """The conditioning of these samples."""
        return self.map(lambda tensor: tensor[rows])

    def to(self, device: torch.device) -> Conditioning:
        return self.map(lambda tensor: to_device(tensor, device))

    def cat(self, other: Conditioning) -> Conditioning:
        """The samples of this one, then those of the other, which must have the same names."""
        return Conditioning(**{name: torch.cat((tensor, other[name])) for name, tensor in self.items()})


class CondPair(NamedTuple):
    """The conditioning of a batch of samples."""

    cond: Conditioning
    uncond: Conditioning
    """Its unconditional counterpart for guidance; empty for a network that is always conditioned."""

    def to(self, device: torch.device) -> CondPair:
        return CondPair(self.cond.to(device), self.uncond.to(device))

    def rows(self, rows: slice) -> CondPair:
        """The conditioning of these samples."""
        return CondPair(self.cond.rows(rows), self.uncond.rows(rows))


@dataclass(frozen=True)
class Batch:
    """Clean samples x0 and their conditioning, B rows each."""

    x: Tensor
    """(B, C, H, W), float32, in the space of the family: pixels in [-1, 1], or scaled latents."""
    cond: Conditioning
    uncond: Conditioning
    """The unconditional counterpart of `cond`, for guidance."""
    rng: Rng = field(default_factory=Rng)
    """The random numbers of these rows."""
    of_fakes: CondPair | None = None
    """What the fake samples of the step are conditioned on; None = the conditioning of the real samples."""

    def to(self, device: torch.device) -> Batch:
        cond, uncond = CondPair(self.cond, self.uncond).to(device)
        of_fakes = self.of_fakes and self.of_fakes.to(device)
        return Batch(to_device(self.x, device), cond, uncond, self.rng, of_fakes)

    def split(self, size: int) -> list[Batch]:
        """Micro-batches of `size` rows, the last one possibly shorter; `size` 0 gives the whole batch as one."""
        starts = range(0, len(self.x), size or len(self.x))
        rows = [slice(start, start + (size or len(self.x))) for start in starts]
        return [self._rows(part) for part in rows]

    def for_fakes(self) -> Batch:
        """The batch with the conditioning of the fake samples."""
        return self if self.of_fakes is None else replace(self, **self.of_fakes._asdict(), of_fakes=None)

    def _rows(self, rows: slice) -> Batch:
        cond, uncond = CondPair(self.cond, self.uncond).rows(rows)
        of_fakes = self.of_fakes and self.of_fakes.rows(rows)
        return Batch(self.x[rows], cond, uncond, self.rng[rows], of_fakes)
