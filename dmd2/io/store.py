"""What a place that holds files can do."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

CONCURRENT_REQUESTS = 16
"""Requests at a time, where many are made."""


class ObjectInfo(NamedTuple):
    name: str
    size: int
    """Bytes."""
    version: str
    """Changes with the content."""


ObjectInfos = list[ObjectInfo]


class Store(Protocol):
    uri: str

    def list(self, prefix: str = "") -> ObjectInfos:
        """Every file whose name starts so, sorted by name; none if there is nothing."""

    def read(self, name: str) -> bytes: ...

    def fetch(self, name: str, path: Path) -> None:
        """Copy to a local path, whole or not at all."""

    def put(self, path: Path, name: str) -> None:
        """Copy from a local path, whole or not at all."""

    def put_many(self, folder: Path, names: Sequence[str]) -> None:
        """Copy these files of a local folder, each under its name."""

    def write(self, name: str, data: bytes, generation: int | None = None) -> int:
        """Write whole or not at all, and return the new generation; `generation` demands the one that is there
        now (0: no file), or nothing is written and it is a FileExistsError."""

    def generation(self, name: str) -> int:
        """Changes with the content; 0 if there is no file."""

    def delete(self, names: Iterable[str]) -> None:
        """Those that are there."""
