"""Where files lie: one interface over a local folder and a prefix of a bucket (`gs://`).

A `Store` holds named files; a name is relative, with forward slashes. A file is there whole or not at all: locally
it gets its name once it is complete, on a bucket an object appears when its last byte has arrived and its crc32c
agrees. What can be retried is retried, with jitter. What goes wrong is an `OSError` that names the object.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import shutil
import stat
import uuid
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol

from dmd2.errors import Refused, brief

LARGE = 32 * 2**20
"""Bytes from which an object is transferred in pieces."""
TOGETHER = 16
"""Requests at a time, where many are made."""
PRIVATE = re.compile(r"\.(.*\.)?(partial|lock)")
"""Names of files that are not whole, and of locks."""


class Entry(NamedTuple):
    name: str
    size: int
    """Bytes."""
    version: str
    """Changes with the content."""


Entries = list[Entry]


class Store(Protocol):
    uri: str

    def list(self, prefix: str = "") -> Entries:
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


def at(uri: str | Path) -> Store:
    """The store of a folder, which need not be there yet."""
    return Local(local(uri)) if is_local(uri) else Bucket(str(uri))


def is_local(uri: str | Path) -> bool:
    scheme, separator, _ = str(uri).partition("://")
    if separator and scheme not in ("file", "gs"):
        raise Refused(f"{uri}: storage of scheme {scheme!r} is not supported; give a local path or gs://")
    return not separator or scheme == "file"


def local(uri: str | Path) -> Path:
    """The local path that a URI names."""
    if not is_local(uri):
        raise Refused(f"{uri} is on a bucket; a local path is needed here")
    return Path(str(uri).removeprefix("file://")).expanduser()


def join(uri: str | Path, name: str) -> str:
    return f"{str(uri).rstrip('/')}/{name}"


def cache() -> Path:
    """Where copies of what lies on a bucket are kept, and drafts of what will."""
    return Path(os.environ.get("DMD2_CACHE", "~/.cache/dmd2")).expanduser()


def fetched(uri: str | Path) -> Path:
    """A local path with the content of one file: the file itself, or a copy of this version of the object."""
    if is_local(uri):
        return local(uri)
    folder, _, name = str(uri).rpartition("/")
    store = at(folder)
    version = f"{uri} {store.generation(name)}"
    path = cache() / "files" / hashlib.sha256(version.encode()).hexdigest() / name
    if not path.is_file():
        store.fetch(name, path)
    return path


class Local:
    """A folder of this machine."""

    def __init__(self, path: Path) -> None:
        self.path, self.uri = path, str(path)

    def list(self, prefix: str = "") -> Entries:
        paths = self.path.rglob("*") if self.path.is_dir() else ()
        whole = (path for path in paths if not PRIVATE.fullmatch(path.name))
        found = [(p.relative_to(self.path).as_posix(), state) for p in whole if (state := _state(p))]
        return sorted(
            Entry(name, s.st_size, str(s.st_mtime_ns)) for name, s in found if name.startswith(prefix)
        )

    def read(self, name: str) -> bytes:
        return (self.path / name).read_bytes()

    def fetch(self, name: str, path: Path) -> None:
        with replaced(path) as draft:
            shutil.copyfile(self.path / name, draft)

    def put(self, path: Path, name: str) -> None:
        with replaced(self.path / name) as draft:
            shutil.copyfile(path, draft)

    def put_many(self, folder: Path, names: Sequence[str]) -> None:
        for name in names:
            self.put(folder / name, name)

    def write(self, name: str, data: bytes, generation: int | None = None) -> int:
        path = self.path / name
        if generation is None:
            return self._replace(path, data)
        with locked(path.with_name(f".{path.name}.lock")):
            if self.generation(name) != generation:
                raise FileExistsError(errno.EEXIST, "changed by another process meanwhile", str(path))
            return self._replace(path, data)

    def _replace(self, path: Path, data: bytes) -> int:
        with replaced(path) as draft:
            draft.write_bytes(data)
        return _generation(data)

    def generation(self, name: str) -> int:
        path = self.path / name
        return _generation(path.read_bytes()) if path.is_file() else 0

    def delete(self, names: Iterable[str]) -> None:
        for name in names:
            (self.path / name).unlink(missing_ok=True)


class Bucket:
    """A prefix of a Google Cloud Storage bucket."""

    def __init__(self, uri: str) -> None:
        self.bucket, _, prefix = uri.removeprefix("gs://").rstrip("/").partition("/")
        self.uri = f"gs://{self.bucket}/{prefix}".rstrip("/")
        self.prefix = f"{prefix}/" if prefix else ""
        if not self.bucket:
            raise Refused(f"{uri} names no bucket; give gs://bucket/folder")

    def list(self, prefix: str = "") -> Entries:
        with self._told(prefix):
            blobs = _client(os.getpid()).list_blobs(self.bucket, prefix=self.prefix + prefix, retry=_retry())
            return [
                Entry(blob.name.removeprefix(self.prefix), blob.size, f"{blob.generation} {blob.crc32c}")
                for blob in blobs
                if not blob.name.endswith("/")  # consoles make these, in place of folders
            ]

    def read(self, name: str) -> bytes:
        with self._told(name):
            return self._blob(name).download_as_bytes(checksum="crc32c", retry=_retry())

    def fetch(self, name: str, path: Path) -> None:
        from google.cloud.storage import transfer_manager

        with self._told(name), replaced(path) as draft:
            blob = self._blob(name)
            blob.reload(retry=_retry())
            if blob.size < LARGE:
                blob.download_to_filename(str(draft), checksum="crc32c", retry=_retry())
            else:
                transfer_manager.download_chunks_concurrently(
                    blob, str(draft), LARGE, {"retry": _retry()}, worker_type="thread"
                )

    def put(self, path: Path, name: str) -> None:
        with self._told(name):
            blob = self._blob(name)
            blob.chunk_size = LARGE  # larger ones go up resumably, piece by piece
            blob.upload_from_filename(str(path), checksum="crc32c", retry=_retry())

    def put_many(self, folder: Path, names: Sequence[str]) -> None:
        from google.cloud.storage import transfer_manager

        with self._told(""):
            pairs = [(str(folder / name), self._blob(name)) for name in names]
            settings = {"checksum": "crc32c", "retry": _retry()}
            results = transfer_manager.upload_many(pairs, upload_kwargs=settings, worker_type="thread")
        for name, result in zip(names, results, strict=True):
            if result is not None:
                with self._told(name):
                    raise result

    def write(self, name: str, data: bytes, generation: int | None = None) -> int:
        from google.api_core.exceptions import PreconditionFailed

        mark = {"writer": uuid.uuid4().hex}
        with self._told(name):
            blob = self._blob(name)
            blob.metadata = mark
            try:
                blob.upload_from_string(
                    data, "application/octet-stream", checksum="crc32c",
                    if_generation_match=generation, retry=_retry(),
                )  # fmt: skip
            except PreconditionFailed:  # by this very write, perhaps, if its first answer was lost
                blob = self._there(name)
                if not blob or blob.metadata != mark:
                    raise
            return int(blob.generation)

    def generation(self, name: str) -> int:
        with self._told(name):
            blob = self._there(name)
            return int(blob.generation) if blob else 0

    def delete(self, names: Iterable[str]) -> None:
        with ThreadPoolExecutor(TOGETHER) as pool:
            list(pool.map(self._delete, names))

    def _delete(self, name: str) -> None:
        with suppress(FileNotFoundError), self._told(name):
            self._blob(name).delete(retry=_retry())

    def _blob(self, name: str) -> Any:
        return _client(os.getpid()).bucket(self.bucket).blob(self.prefix + name)

    def _there(self, name: str) -> Any:
        """With what the bucket knows of the object; None if there is none."""
        return _client(os.getpid()).bucket(self.bucket).get_blob(self.prefix + name, retry=_retry())

    @contextmanager
    def _told(self, name: str) -> Iterator[None]:
        """What the library raises, as an OSError with the address of the object."""
        from google.api_core import exceptions as api
        from google.auth.exceptions import GoogleAuthError
        from google.cloud.exceptions import GoogleCloudError
        from google.cloud.storage.exceptions import DataCorruption, InvalidResponse
        from requests import RequestException

        where = f"{self.uri}/{name}"
        try:
            yield
        except api.NotFound:
            raise FileNotFoundError(errno.ENOENT, "no such object", where) from None
        except (api.Forbidden, api.Unauthorized, GoogleAuthError) as error:
            raise PermissionError(errno.EACCES, f"no permission ({brief(error)})", where) from None
        except api.PreconditionFailed:
            raise FileExistsError(errno.EEXIST, "changed by another process meanwhile", where) from None
        except (GoogleCloudError, api.RetryError, DataCorruption, InvalidResponse, RequestException) as error:
            raise OSError(
                errno.EIO, f"the bucket does not answer as it should ({brief(error)})", where
            ) from None


@lru_cache(maxsize=1)
def _client(pid: int) -> Any:
    """One client per process: connections must not be shared across a fork."""
    from google.cloud.storage import Client

    return Client(project=None)  # objects need none, and mounted credentials often name none


def _retry() -> Any:
    """For up to five minutes, with growing pauses of random length. Every call is one that may be repeated: it
    writes a whole object, and with a demanded generation a repetition that comes too late is refused."""
    from google.cloud.storage.retry import DEFAULT_RETRY

    seconds = float(os.environ.get("DMD2_RETRY_S", "300"))
    return DEFAULT_RETRY.with_delay(initial=0.5, maximum=30, multiplier=2).with_timeout(seconds)


def write(path: Path, text: str) -> None:
    """Write a local file whole or not at all."""
    with replaced(path) as draft:
        draft.write_text(text)


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A hidden path beside `path` that takes its name if nothing goes wrong."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield draft
        flush(draft)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


@contextmanager
def locked(path: Path, wait: bool = True, shared: bool = False) -> Iterator[IO[str]]:
    """Hold a lock of this machine; the kernel lets go if the process dies. Without `wait`: BlockingIOError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as lock:
        kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        fcntl.flock(lock, kind if wait else kind | fcntl.LOCK_NB)
        yield lock


def flush(path: Path) -> None:
    """Have the file on the disk before anything refers to it: a name may survive a lost node, its content not."""
    with path.open("rb") as stream:
        os.fsync(stream.fileno())


def _state(path: Path) -> os.stat_result | None:
    """None if it is no file, or has just gone."""
    try:
        state = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return state if stat.S_ISREG(state.st_mode) else None


def sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _generation(data: bytes) -> int:
    return int(hashlib.sha256(data).hexdigest()[:15], 16)
