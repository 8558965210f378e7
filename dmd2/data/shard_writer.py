"""Writing one tar file of samples, whose size and checksums are computed meanwhile."""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import google_crc32c
from webdataset import TarWriter

from dmd2.errors import Refused
from dmd2.io.artifact import MANIFEST
from dmd2.io.storage import move_file
from dmd2.io.store import Store


class ShardWriter:
    """Writes one tar file in a local folder and computes its size and checksums; then it is closed or discarded."""

    def __init__(self, name: str, folder: Path, store: Store) -> None:
        self.name, self.store = name, store
        self.file = HashingFile(folder / f".{name}.{os.getpid()}.partial")
        self.writer = TarWriter(self.file, user="", group="", mtime=0, encoder=False)

    def add(self, key: str, sample: dict[str, bytes]) -> None:
        """Write the members of a sample, `<key>.<suffix>`, sorted by suffix."""
        self.writer.write({"__key__": key} | sample)

    def close(self) -> dict[str, Any]:
        """Move the file to its final place, and return its size and checksums."""
        self.writer.close()
        self.file.close()
        if not self.store.local_folder and self.store.version(MANIFEST):
            raise Refused(f"{self.store.uri} was finished by others meanwhile; there is nothing left to do")
        move_file(self.file.path, self.name, self.store)
        return self.file.facts()

    def discard(self) -> None:
        with suppress(ValueError, OSError):  # already closed, or no room for the end of it
            self.writer.close()
        self.file.close()
        self.file.path.unlink(missing_ok=True)


class HashingFile:
    """A file whose size, SHA-256 and crc32c are computed while it is written."""

    def __init__(self, path: Path) -> None:
        self.path, self.size = path, 0
        self.file = path.open("wb")
        self.sha256, self.crc32c = hashlib.sha256(), google_crc32c.Checksum()

    def write(self, data: bytes) -> int:
        self.size += len(data)
        self.sha256.update(data)
        self.crc32c.update(bytes(data))
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()

    def close(self) -> None:
        self.file.close()

    def facts(self) -> dict[str, Any]:
        return {
            "size": self.size,
            "sha256": self.sha256.hexdigest(),
            "crc32c": self.crc32c.hexdigest().decode(),
        }
