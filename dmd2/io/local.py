"""Files of this machine, and a folder of them as a `Store`."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import shutil
import stat
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from dmd2.io.store import ObjectInfo, ObjectInfos

TEMPORARY_NAMES = re.compile(r"\.(.*\.)?(partial|lock)")
"""Names of files that are not whole, and of locks."""


class LocalStore:
    """A folder of this machine."""

    def __init__(self, path: Path) -> None:
        self.path, self.uri = path, str(path)

    def list(self, prefix: str = "") -> ObjectInfos:
        paths = self.path.rglob("*") if self.path.is_dir() else ()
        whole = (path for path in paths if not TEMPORARY_NAMES.fullmatch(path.name))
        found = [(p.relative_to(self.path).as_posix(), state) for p in whole if (state := _state(p))]
        return sorted(
            ObjectInfo(name, s.st_size, str(s.st_mtime_ns)) for name, s in found if name.startswith(prefix)
        )

    def read(self, name: str) -> bytes:
        return (self.path / name).read_bytes()

    def fetch(self, name: str, path: Path) -> None:
        with atomic_write(path) as draft:
            shutil.copyfile(self.path / name, draft)

    def put(self, path: Path, name: str) -> None:
        with atomic_write(self.path / name) as draft:
            shutil.copyfile(path, draft)

    def put_many(self, folder: Path, names: Sequence[str]) -> None:
        for name in names:
            self.put(folder / name, name)

    def write(self, name: str, data: bytes, generation: int | None = None) -> int:
        path = self.path / name
        if generation is None:
            return self._replace(path, data)
        with file_lock(path.with_name(f".{path.name}.lock")):
            if self.generation(name) != generation:
                raise FileExistsError(errno.EEXIST, "changed by another process meanwhile", str(path))
            return self._replace(path, data)

    def _replace(self, path: Path, data: bytes) -> int:
        with atomic_write(path) as draft:
            draft.write_bytes(data)
        return _digest_token(data)

    def generation(self, name: str) -> int:
        path = self.path / name
        return _digest_token(path.read_bytes()) if path.is_file() else 0

    def delete(self, names: Iterable[str]) -> None:
        for name in names:
            (self.path / name).unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a local file whole or not at all."""
    with atomic_write(path) as draft:
        draft.write_text(text)


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A hidden path beside `path` that takes its name if nothing goes wrong."""
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
    """Hold a lock of this machine; the kernel lets go if the process dies. Without `wait`: BlockingIOError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as lock:
        kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        fcntl.flock(lock, kind if wait else kind | fcntl.LOCK_NB)
        yield lock


def fsync(path: Path) -> None:
    """Have the file on the disk before anything refers to it: a name may survive a lost node, its content not."""
    with path.open("rb") as stream:
        os.fsync(stream.fileno())


def sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _state(path: Path) -> os.stat_result | None:
    """None if it is no file, or has just gone."""
    try:
        state = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return state if stat.S_ISREG(state.st_mode) else None


def _digest_token(data: bytes) -> int:
    return int(hashlib.sha256(data).hexdigest()[:15], 16)
