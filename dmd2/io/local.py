"""Local files: written atomically, locked, flushed to disk, digested; and a local folder as a `Store`."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import stat
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from dmd2.io.store import ObjectInfo

TEMPORARY_NAMES = re.compile(r"\.(.*\.)?(partial|lock)")
"""Names of lock files and of files that are being written. They are never listed."""


class LocalStore:
    """A folder of this machine."""

    def __init__(self, uri: str | Path) -> None:
        self.local_folder = Path(str(uri).removeprefix("file://")).expanduser()
        self.uri = str(self.local_folder)

    def list_objects(self, prefix: str = "") -> list[ObjectInfo]:
        folder = self.local_folder
        start = folder / prefix.rpartition("/")[0]
        paths = start.rglob("*") if start.is_dir() else ()
        whole = (path for path in paths if not TEMPORARY_NAMES.fullmatch(path.name))
        found = [(p.relative_to(folder).as_posix(), state) for p in whole if (state := _stat(p))]
        return sorted(
            ObjectInfo(name, s.st_size, str(s.st_mtime_ns)) for name, s in found if name.startswith(prefix)
        )

    def has_objects(self, prefix: str = "") -> bool:
        files = (Path(above, name) for above, _, names in os.walk(self.local_folder) for name in names)
        return any(path.relative_to(self.local_folder).as_posix().startswith(prefix) for path in files)

    def read(self, name: str) -> bytes:
        return (self.local_folder / name).read_bytes()

    def download(self, name: str, path: Path) -> None:
        with atomic_write(path) as draft:
            shutil.copyfile(self.local_folder / name, draft)

    def upload(self, path: Path, name: str) -> None:
        with atomic_write(self.local_folder / name) as draft:
            shutil.copyfile(path, draft)

    def create(self, path: Path, name: str) -> None:
        target = self.local_folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        draft = target.with_name(f".{target.name}.{uuid.uuid4().hex}.partial")
        try:
            shutil.copyfile(path, draft)
            fsync(draft)
            os.link(draft, target)  # unlike renaming, it fails if the name is taken
        finally:
            draft.unlink(missing_ok=True)

    def write(self, name: str, data: bytes) -> None:
        with atomic_write(self.local_folder / name) as draft:
            draft.write_bytes(data)

    def compare_and_swap(self, name: str, data: bytes, expected: str | None) -> str:
        path = self.local_folder / name
        with file_lock(path.with_name(f".{path.name}.lock")):
            if self.version(name) != expected:
                raise FileExistsError(errno.EEXIST, "changed by another process meanwhile", str(path))
            self.write(name, data)
        return hashlib.sha256(data).hexdigest()

    def version(self, name: str) -> str | None:
        path = self.local_folder / name
        return sha256(path) if path.is_file() else None

    def delete(self, names: Iterable[str]) -> None:
        for name in names:
            (self.local_folder / name).unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a local text file, whole or not at all."""
    with atomic_write(path) as draft:
        draft.write_text(text)


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, which is renamed to `path` at the end unless an exception is raised."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield draft
        fsync(draft)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


@contextmanager
def file_lock(path: Path, wait: bool = True, shared: bool = False) -> Iterator[IO[str]]:
    """Hold a lock file of this machine, which the kernel releases if the process dies.

    Raises:
        BlockingIOError: Another process holds the lock, and `wait` is false.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as lock:
        kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        fcntl.flock(lock, kind if wait else kind | fcntl.LOCK_NB)
        yield lock


def fsync(path: Path) -> None:
    """Flush a file to the disk, before it is renamed: after a power failure a name can survive without its content."""
    with path.open("rb") as stream:
        os.fsync(stream.fileno())


def delete_least_recently_used(files: Iterable[Path], limit: float) -> None:
    """Delete files, those that were used first first, until the others have at most `limit` bytes. The time of use is that of the
    last change. Files that are open stay readable until they are closed."""
    states = [(path, state) for path in files if (state := _stat(path))]
    size = sum(state.st_size for _, state in states)
    for path, state in sorted(states, key=lambda pair: pair[1].st_mtime_ns):
        if size <= limit:
            return
        path.unlink(missing_ok=True)
        size -= state.st_size


def sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _stat(path: Path) -> os.stat_result | None:
    """None if there is no regular file, or it was deleted meanwhile."""
    try:
        state = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return state if stat.S_ISREG(state.st_mode) else None


def content_digest(path: Path, pattern: str = "**/*") -> str:
    """The sha256 of a file, or of the names and digests of all files of a folder whose names match the pattern."""
    if path.is_file():
        return sha256(path)
    files = sorted(p for p in path.glob(pattern) if p.is_file())
    digests = [(str(p.relative_to(path)), sha256(p)) for p in files]
    return json_digest(digests)


def json_digest(value: Any) -> str:
    """The sha256 of a JSON value, whatever the order of the keys of its objects. Stored names and digests depend on it."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
