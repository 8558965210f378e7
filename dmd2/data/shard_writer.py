"""Writing one tar file of samples, whose size and checksums are computed meanwhile."""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress
from pathlib import Path
from typing import Self

import google_crc32c
from webdataset import TarWriter

from dmd2.data.shard_table import ShardInfo
from dmd2.errors import Refused
from dmd2.io.artifact import MANIFEST
from dmd2.io.storage import move_file
from dmd2.io.store import Store


class ShardWriter:
    """Writes one tar file in a local folder; then it is closed, which gives `shard` its size and checksums, or discarded."""

    def __init__(self, shard: ShardInfo, folder: Path, store: Store) -> None:
        self.shard, self.store = shard, store
        self.file = HashingFile(folder / f".{shard.file}.{os.getpid()}.partial")
        self.writer = TarWriter(self.file, user="", group="", mtime=0, encoder=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            if kind is None:
                self.close()
        finally:
            self.discard()

    def add(self, key: str, sample: dict[str, bytes]) -> None:
        """Write the members of a sample, `<key>.<suffix>`, sorted by suffix."""
        self.writer.write({"__key__": key} | sample)

    def close(self) -> None:
        """Move the file to its final place."""
        self.writer.close()
        self.file.close()
        if not self.store.local_folder and self.store.version(MANIFEST):
            raise Refused(f"{self.store.uri} was finished by others meanwhile; there is nothing left to do")
        move_file(self.file.path, self.shard.file, self.store)
        self.shard.size, self.shard.sha256 = self.file.size, self.file.sha256.hexdigest()
        self.shard.crc32c = self.file.crc32c.hexdigest().decode()

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
