"""Shards of a bucket on the disk of this machine: bounded, least recently used out first, shared by its processes.

A shard gets its name in the cache after its bytes were compared with the manifest, so a truncated or changed one is
never there. Files that are open survive being dropped, until they are closed.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from dmd2.io.artifact import ArtifactFile, copy_verified
from dmd2.io.local import file_lock
from dmd2.io.storage import cache
from dmd2.io.store import Store

Opened = TypeVar("Opened")


class ShardCache:
    def __init__(self, store: Store, limit: int) -> None:
        self.store, self.limit, self.folder = store, limit, cache() / "shards"
        """`limit` in bytes, for all shards of all folders."""

    def path(self, file: ArtifactFile) -> Path:
        """Where the shard lies now."""
        path = self.folder / file.sha256
        with file_lock(self.folder / f".{file.sha256}.lock"):
            if path.is_file():
                os.utime(path)
            else:
                self._fetch(file, path)
        return path

    def open(self, file: ArtifactFile, opener: Callable[[Path], Opened]) -> Opened:
        """The shard, opened before another process makes room."""
        while True:
            with suppress(FileNotFoundError):
                return opener(self.path(file))

    def _fetch(self, file: ArtifactFile, path: Path) -> None:
        for left in self.folder.glob(f".*{file.sha256}*.partial"):  # by a process that was killed
            left.unlink(missing_ok=True)
        self._evict(self.limit - file.size)
        try:
            copy_verified(self.store, file, path)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            self._evict(0)
            copy_verified(self.store, file, path)

    def _evict(self, limit: int) -> None:
        """Drop shards, the one used longest ago first, until no more than `limit` bytes are left."""
        with file_lock(self.folder / ".lock"):
            there = sorted(
                (stat.st_mtime_ns, stat.st_size, path)
                for path in self.folder.glob("[0-9a-f]*")
                if (stat := path.stat())
            )
            size = sum(size for _, size, _ in there)
            for _, bytes_there, path in there:
                if size <= limit:
                    return
                path.unlink(missing_ok=True)
                size -= bytes_there
