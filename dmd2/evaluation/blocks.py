"""Measurements of a set of images, in blocks of rows that any process can make, in any order.

A block is one file of the unfinished evaluation, written whole or not at all. So ranks and machines share the blocks of a set, and an
interrupted evaluation goes on with those that are missing. The folder of a set is named by the digest of all that decides its
images and how they are measured, so that blocks of another network or another precision are not taken for those of this one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from dmd2.errors import Refused, brief
from dmd2.evaluation.evaluator import Measured
from dmd2.io.storage import join_uri
from dmd2.io.store import Store
from dmd2.models.family import Prompt

FOLDER = ".blocks"
"""In the draft of an evaluation."""


@dataclass(frozen=True)
class MeasuredBlocks:
    """The blocks of one set of images that are measured already."""

    store: Store
    folder: str
    prompts: Sequence[Prompt]
    """Of all rows of the set."""
    size: int
    """Rows of a block; the last one may have fewer."""

    def rows(self) -> list[range]:
        """The rows of each block."""
        count = len(self.prompts)
        return [range(start, min(start + self.size, count)) for start in range(0, count, self.size)]

    def starts(self) -> set[int]:
        """The first rows of the blocks that are there."""
        return {int(Path(info.name).stem) for info in self.store.list_objects(f"{self.folder}/")}

    def write(self, rows: range, measured: Measured) -> None:
        self.store.write(self._name(rows), safetensors.torch.save(dict(measured)))

    def read(self, rows: range) -> dict[str, Tensor]:
        try:
            return safetensors.torch.load(self.store.read(self._name(rows)))
        except SafetensorError as error:
            name = join_uri(self.store.uri, self._name(rows))
            raise Refused(f"{name} is damaged ({brief(error)}); remove it and evaluate again") from None

    def read_all(self) -> Iterator[tuple[Measured, Sequence[Prompt]]]:
        """(measurements, prompts) of each block, in the order of the rows; one block is in memory at a time."""
        for rows in self.rows():
            yield self.read(rows), self.prompts[rows.start : rows.stop]

    def column(self, name: str) -> Tensor:
        """One measurement of all rows, (N, D)."""
        return torch.cat([self.read(rows)[name] for rows in self.rows()])

    def _name(self, rows: range) -> str:
        return f"{self.folder}/{rows.start:08d}.safetensors"
