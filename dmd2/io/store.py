"""The interface of a storage scheme: named files under one address.

A name is relative, with forward slashes. A file is there whole or not at all. An implementation retries what can be
retried; what fails in the end is an `OSError` whose `filename` is the address of the file. A new scheme is one class
with these members and one row in `dmd2.io.storage.SCHEMES`.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple, Protocol

CONCURRENT_REQUESTS = 16
"""Requests that are made at a time, where there are many."""


class ObjectInfo(NamedTuple):
    """One file in a listing."""

    name: str
    size: int
    """Bytes."""
    fingerprint: str
    """Changes whenever the content changes. It can only be compared with another one of the same file."""


class Store(Protocol):
    """The files under one address."""

    uri: str

    @property
    def local_folder(self) -> Path | None:
        """The folder of this machine that holds the files, to be opened in place; None where they must be downloaded."""

    def list_objects(self, prefix: str = "") -> list[ObjectInfo]:
        """All files whose name starts with `prefix`, sorted by name; empty if there are none."""

    def has_objects(self, prefix: str = "") -> bool:
        """Whether there is a file whose name starts with `prefix`, without listing them all.

        Raises:
            FileNotFoundError: There is no such bucket.
        """

    def read(self, name: str) -> bytes:
        """The content of a file; FileNotFoundError if there is none."""

    def download(self, name: str, path: Path) -> None:
        """Copy a file to a local path, whole or not at all; FileNotFoundError if there is none."""

    def upload(self, path: Path, name: str) -> None:
        """Copy a local file here, whole or not at all."""

    def create(self, path: Path, name: str) -> None:
        """Like `upload`, but only if there is no such file. It needs no right to overwrite or to delete.

        Raises:
            FileExistsError: There is a file of this name. Nothing is written.
        """

    def write(self, name: str, data: bytes) -> None:
        """Write a file, whole or not at all."""

    def compare_and_swap(self, name: str, data: bytes, expected: str | None) -> str:
        """Write a file only if its version is still `expected` (None: there is no file), and return its new version.

        Raises:
            FileExistsError: Another process has changed the file. Nothing is written.
        """

    def version(self, name: str) -> str | None:
        """An opaque token for the present content of a file, for `compare_and_swap`; None if there is no file."""

    def delete(self, names: Iterable[str]) -> None:
        """Delete the files. Names without a file are ignored."""
