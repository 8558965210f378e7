"""A cache of remote shards on the local disk: limited in size, least recently used first out, shared by all processes.

A shard gets its name in the cache after its SHA-256 was compared with the manifest, so the cache never contains a truncated or
changed shard. A shard that is evicted while it is open stays readable until it is closed.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from dmd2.io.artifact import ArtifactFile, copy_verified
from dmd2.io.local import delete_least_recently_used, file_lock
from dmd2.io.storage import cache
from dmd2.io.store import Store

Opened = TypeVar("Opened")


class ShardCache:
    def __init__(self, store: Store, limit: int) -> None:
        self.store, self.limit, self.folder = store, limit, cache() / "shards"
        """`limit` in bytes, for all shards of all folders."""

    def path(self, file: ArtifactFile) -> Path:
        """Local path of the shard, which is downloaded first if the cache lacks it."""
        path = self.folder / file.sha256
        with file_lock(self.folder / f".{file.sha256}.lock"):
            if path.is_file():
                os.utime(path)
            else:
                self._fetch(file, path)
        return path

    def open(self, file: ArtifactFile, opener: Callable[[Path], Opened]) -> Opened:
        """Open the shard, and download it again if another process evicted it in between."""
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
        """Delete the least recently used shards until at most `limit` bytes are left."""
        with file_lock(self.folder / ".lock"):
            delete_least_recently_used(self.folder.glob("[0-9a-f]*"), limit)
