"""A prefix of a Google Cloud Storage bucket as a `Store`."""

from __future__ import annotations

import errno
import os
import uuid
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from dmd2.errors import Refused, brief
from dmd2.io.local import atomic_write
from dmd2.io.store import CONCURRENT_REQUESTS, ObjectInfo, ObjectInfos

CHUNK_BYTES = 32 * 2**20
"""Bytes from which an object is transferred in pieces."""


class GcsStore:
    """A prefix of a Google Cloud Storage bucket."""

    def __init__(self, uri: str) -> None:
        self.bucket, _, prefix = uri.removeprefix("gs://").rstrip("/").partition("/")
        self.uri = f"gs://{self.bucket}/{prefix}".rstrip("/")
        self.prefix = f"{prefix}/" if prefix else ""
        if not self.bucket:
            raise Refused(f"{uri} names no bucket; give gs://bucket/folder")

    def list(self, prefix: str = "") -> ObjectInfos:
        with self._told(prefix):
            blobs = _client(os.getpid()).list_blobs(self.bucket, prefix=self.prefix + prefix, retry=_retry())
            return [
                ObjectInfo(blob.name.removeprefix(self.prefix), blob.size, f"{blob.generation} {blob.crc32c}")
                for blob in blobs
                if not blob.name.endswith("/")  # consoles make these, in place of folders
            ]

    def read(self, name: str) -> bytes:
        with self._told(name):
            return self._blob(name).download_as_bytes(checksum="crc32c", retry=_retry())

    def fetch(self, name: str, path: Path) -> None:
        from google.cloud.storage import transfer_manager

        with self._told(name), atomic_write(path) as draft:
            blob = self._blob(name)
            blob.reload(retry=_retry())
            if blob.size < CHUNK_BYTES:
                blob.download_to_filename(str(draft), checksum="crc32c", retry=_retry())
            else:
                transfer_manager.download_chunks_concurrently(
                    blob, str(draft), CHUNK_BYTES, {"retry": _retry()}, worker_type="thread"
                )

    def put(self, path: Path, name: str) -> None:
        with self._told(name):
            blob = self._blob(name)
            blob.chunk_size = CHUNK_BYTES  # larger ones go up resumably, piece by piece
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
        with ThreadPoolExecutor(CONCURRENT_REQUESTS) as pool:
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
