"""LMDB files as the DMD2 reference code writes them: a key `<array>_<row>_data` for each row, and `<array>_shape`.

The type of the rows is not stored: images are uint8, labels int64, latents float16, prompts UTF-8.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from dmd2.data.lmdb_table import OpenFile, open_file
from dmd2.errors import Refused


@dataclass
class ReferenceLmdb:
    """Named arrays in a data.mdb, read row by row in any process."""

    path: Path
    file: OpenFile

    @classmethod
    def open(cls, path: Path) -> ReferenceLmdb:
        return cls(path, open_file(path))

    def shape(self, array: str) -> tuple[int, ...]:
        """The shape of an array, with its number of rows first; empty if there is none."""
        found = self._get(f"{array}_shape")
        try:
            return tuple(int(part) for part in found.split()) if found else ()
        except ValueError:
            raise Refused(f"{self.path}: {array}_shape is no list of numbers; get the file again") from None

    def row(self, array: str, row: int, size: int = 0) -> bytes:
        """The bytes of a row, which must be `size` many if it is given."""
        found = self._get(f"{array}_{row}_data")
        if found is None or (size and len(found) != size):
            there = "missing" if found is None else f"{len(found)} bytes long, not {size}"
            raise Refused(f"{self.path}: row {row} of {array} is {there}; get the file again")
        return found

    def _get(self, key: str) -> bytes | None:
        if self.file.pid != os.getpid():
            self.file = open_file(self.path)
        found = self.file.transaction.get(key.encode())
        return None if found is None else bytes(found)
