"""What networks work on: batches of samples, and what each sample is conditioned on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

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

    def to(self, device: torch.device) -> Batch:
        return Batch(to_device(self.x, device), self.cond.to(device), self.uncond.to(device), self.rng)

    def split(self, size: int) -> list[Batch]:
        """Micro-batches of `size` rows, the last one possibly shorter; `size` 0 gives the whole batch as one."""
        starts = range(0, len(self.x), size or len(self.x))
        rows = [slice(start, start + (size or len(self.x))) for start in starts]
        return [Batch(self.x[r], self.cond.rows(r), self.uncond.rows(r), self.rng[r]) for r in rows]
