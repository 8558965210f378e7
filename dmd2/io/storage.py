"""Addresses of files and folders: local paths, `gs://`, and any other scheme that has a row in `SCHEMES`.

Code that reads or writes files asks `open_store` for the `Store` of an address, and never looks at the address itself.
"""

from __future__ import annotations

import errno
import hashlib
import os
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from platformdirs import user_cache_path

from dmd2.errors import Refused
from dmd2.io.gcs import GcsStore
from dmd2.io.local import LocalStore, delete_least_recently_used, fsync
from dmd2.io.store import CONCURRENT_REQUESTS, Store

SCHEMES: dict[str, Callable[[str], Store]] = {"file": LocalStore, "gs": GcsStore}
"""scheme -> (address) -> its store. An address without a scheme is a local path."""


def open_store(uri: str | Path) -> Store:
    """The store of a folder, which need not exist yet. Makes no request."""
    scheme, separator, _ = str(uri).partition("://")
    factory = SCHEMES.get(scheme if separator else "file")
    if factory is None:
        known = ", ".join(f"{name}://" for name in sorted(SCHEMES))
        raise Refused(
            f"{uri}: storage of scheme {scheme!r} is not supported; give a local path or one of {known}"
        )
    return factory(str(uri))


def is_remote(uri: str) -> bool:
    """Whether the address is of a known scheme whose files do not lie on this machine."""
    scheme, separator, _ = uri.partition("://")
    return bool(separator) and scheme in SCHEMES and open_store(uri).local_folder is None


def local_path(uri: str | Path) -> Path:
    """The path of an address that must be local."""
    path = open_store(uri).local_folder
    if path is None:
        raise Refused(f"{uri} is not on this machine; a local path is needed here")
    return path


def join_uri(uri: str | Path, name: str) -> str:
    return f"{str(uri).rstrip('/')}/{name}"


def cache() -> Path:
    """Folder for copies of remote files and for drafts of remote artifacts: `$DMD2_CACHE`, or the user's cache folder."""
    named = os.environ.get("DMD2_CACHE")
    return Path(named).expanduser() if named else user_cache_path("dmd2")


def exists(uri: str | Path) -> bool:
    """Whether there is a file at this address."""
    if path := open_store(uri).local_folder:
        return path.is_file()
    folder, _, name = str(uri).rpartition("/")
    return open_store(folder).version(name) is not None


def fetch_file(uri: str | Path) -> Path:
    """A local path with the content of one file: the file itself, or a cached copy of its present version.

    The copies of all processes have at most `cache_limit` bytes together: the least recently used ones are deleted. A copy is
    kept for `SPARED_S` seconds, in which its user opens it, and stays readable while it is open."""
    if path := open_store(uri).local_folder:
        return path
    folder, _, name = str(uri).rpartition("/")
    store = open_store(folder)
    version = f"{uri} {store.version(name)}"
    path = cache() / "files" / hashlib.sha256(version.encode()).hexdigest() / name
    with suppress(FileNotFoundError):
        os.utime(path)
        return path
    _delete_old_copies(cache_limit())
    try:
        store.download(name, path)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        _delete_old_copies(0)
        store.download(name, path)
    _delete_old_copies(cache_limit(), path)
    return path


SPARED_S = 60
"""A copy that was used less than so many seconds ago is not deleted: its user may be about to open it."""


def cache_limit() -> float:
    """Bytes of the copies of remote files, sources and teachers, in the cache: `$DMD2_CACHE_GB`, or 50 GB."""
    named = os.environ.get("DMD2_CACHE_GB", "50")
    try:
        if (limit := float(named)) > 0:
            return limit * 1e9
    except ValueError:
        pass
    raise Refused(f"DMD2_CACHE_GB is {named!r}; give a number of gigabytes above 0")


def _delete_old_copies(limit: float, fetched: Path | None = None) -> None:
    now, old, size = time.time(), [], 0
    for path in (cache() / "files").glob("*/[!.]*"):
        with suppress(FileNotFoundError):  # another process deletes copies too
            state = path.stat()
            is_old = path != fetched and now - state.st_mtime >= SPARED_S
            old += [path] if is_old else []
            size += 0 if is_old else state.st_size
    delete_least_recently_used(old, limit - size)


def upload_files(folder: Path, names: Iterable[str], store: Store) -> None:
    """Copy files of a local folder into the store, each under its own name, several at a time."""
    with ThreadPoolExecutor(CONCURRENT_REQUESTS) as pool:
        list(pool.map(lambda name: store.upload(folder / name, name), names))


def download_files(store: Store, names: Iterable[str], folder: Path) -> None:
    """Copy files of the store into a local folder, each under its own name, several at a time."""
    with ThreadPoolExecutor(CONCURRENT_REQUESTS) as pool:
        list(pool.map(lambda name: store.download(name, folder / name), names))


def move_file(path: Path, name: str, store: Store) -> None:
    """Move a local file into the store, whole or not at all. Into a local folder it is renamed, not copied: both must
    lie on the same disk."""
    if store.local_folder:
        fsync(path)
        path.replace(store.local_folder / name)
    else:
        store.upload(path, name)
        path.unlink()
