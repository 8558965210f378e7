"""A prefix of a Google Cloud Storage bucket as a `Store`."""

from __future__ import annotations

import errno
import os
import uuid
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import IO, Any

from dmd2.errors import Refused, brief
from dmd2.io.local import atomic_write
from dmd2.io.store import CONCURRENT_REQUESTS, ObjectInfo

CHUNK_BYTES = 32 * 2**20
"""Objects from this size on are transferred in chunks of this size."""


class GcsStore:
    """A prefix of a Google Cloud Storage bucket."""

    def __init__(self, uri: str) -> None:
        self.bucket, _, prefix = uri.removeprefix("gs://").rstrip("/").partition("/")
        self.uri = f"gs://{self.bucket}/{prefix}".rstrip("/")
        self.prefix = f"{prefix}/" if prefix else ""
        self.local_folder: Path | None = None
        if not self.bucket:
            raise Refused(f"{uri} names no bucket; give gs://bucket/folder")

    def list_objects(self, prefix: str = "") -> list[ObjectInfo]:
        with self._translate_errors(prefix):
            blobs = _client(os.getpid()).list_blobs(self.bucket, prefix=self.prefix + prefix, retry=_retry())
            return [
                ObjectInfo(blob.name.removeprefix(self.prefix), blob.size, f"{blob.generation} {blob.crc32c}")
                for blob in blobs
                if not blob.name.endswith("/")  # placeholders of folders, which cloud consoles make
            ]

    def has_objects(self, prefix: str = "") -> bool:
        with self._translate_errors(prefix):
            blobs = _client(os.getpid()).list_blobs(
                self.bucket, prefix=self.prefix + prefix, max_results=2, retry=_retry()
            )
            return any(not blob.name.endswith("/") for blob in blobs)

    def read(self, name: str) -> bytes:
        with self._translate_errors(name):
            # The client retries less by itself: not while it reads the answer that there is no such object.
            return _retry()(lambda: self._blob(name).download_as_bytes(checksum="crc32c", retry=None))()

    def download(self, name: str, path: Path) -> None:
        from google.cloud.storage import transfer_manager

        with self._translate_errors(name), atomic_write(path) as draft:
            blob = self._blob(name)
            blob.reload(retry=_retry())
            if blob.size < CHUNK_BYTES:
                blob.download_to_filename(str(draft), checksum="crc32c", retry=_retry())
            else:
                transfer_manager.download_chunks_concurrently(
                    blob, str(draft), CHUNK_BYTES, {"retry": _retry()}, worker_type="thread"
                )

    def upload(self, path: Path, name: str) -> None:
        with self._translate_errors(name):
            blob = self._blob(name)
            blob.chunk_size = CHUNK_BYTES  # larger files are uploaded resumably, in chunks
            blob.upload_from_filename(str(path), checksum="crc32c", retry=_retry())

    def create(self, path: Path, name: str) -> None:
        with self._translate_errors(name), path.open("rb") as stream:
            self._write(name, stream, path.stat().st_size, generation=0)

    def write(self, name: str, data: bytes) -> None:
        with self._translate_errors(name):
            self._write(name, BytesIO(data), len(data), generation=None)

    def compare_and_swap(self, name: str, data: bytes, expected: str | None) -> str:
        with self._translate_errors(name):
            return self._write(name, BytesIO(data), len(data), int(expected or 0))

    def _write(self, name: str, stream: IO[bytes], size: int, generation: int | None) -> str:
        """The new generation. A `generation` is required of the object that is there now; 0 means no object."""
        from google.api_core.exceptions import Forbidden, PreconditionFailed

        mark = {"writer": uuid.uuid4().hex}
        blob = self._blob(name)
        blob.metadata, blob.chunk_size = mark, CHUNK_BYTES
        try:
            blob.upload_from_file(
                stream, size=size, content_type="application/octet-stream", checksum="crc32c",
                if_generation_match=generation, retry=_retry(),
            )  # fmt: skip
        except (Forbidden, PreconditionFailed):
            blob = self._find_blob(name)
            if blob and blob.metadata == mark:  # the answer to this very write was lost, and it was repeated
                return str(blob.generation)
            if blob and generation == 0:  # an account that may only create can be answered Forbidden
                raise FileExistsError(
                    errno.EEXIST, "changed by another process meanwhile", f"{self.uri}/{name}"
                ) from None
            raise
        return str(blob.generation)

    def version(self, name: str) -> str | None:
        with self._translate_errors(name):
            blob = self._find_blob(name)
            return str(blob.generation) if blob else None

    def delete(self, names: Iterable[str]) -> None:
        with ThreadPoolExecutor(CONCURRENT_REQUESTS) as pool:
            list(pool.map(self._delete, names))

    def _delete(self, name: str) -> None:
        with suppress(FileNotFoundError), self._translate_errors(name):
            self._blob(name).delete(retry=_retry())

    def _blob(self, name: str) -> Any:
        return _client(os.getpid()).bucket(self.bucket).blob(self.prefix + name)

    def _find_blob(self, name: str) -> Any:
        """The object with its metadata; None if there is none."""
        return _client(os.getpid()).bucket(self.bucket).get_blob(self.prefix + name, retry=_retry())

    @contextmanager
    def _translate_errors(self, name: str) -> Iterator[None]:
        """Turn the errors of the client library into an `OSError` with the address of the object."""
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
    """Retry for up to five minutes, with growing pauses of random length. Every call here may be repeated: it writes a
    whole object, and a repetition with a required generation is refused if the object has changed since."""
    from google.cloud.storage.retry import DEFAULT_RETRY

    seconds = float(os.environ.get("DMD2_RETRY_S", "300"))
    return DEFAULT_RETRY.with_delay(initial=0.5, maximum=30, multiplier=2).with_timeout(seconds)
