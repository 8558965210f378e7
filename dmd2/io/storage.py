"""Where files lie: one interface over a local folder and a prefix of a bucket (`gs://`).

A `Store` holds named files; a name is relative, with forward slashes. A file is there whole or not at all: locally
it gets its name once it is complete, on a bucket an object appears when its last byte has arrived and its crc32c
agrees. What can be retried is retried, with jitter. What goes wrong is an `OSError` that names the object.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from dmd2.errors import Refused
from dmd2.io.gcs import GcsStore
from dmd2.io.local import LocalStore
from dmd2.io.store import Store


def open_store(uri: str | Path) -> Store:
    """The store of a folder, which need not be there yet."""
    return LocalStore(local_path(uri)) if is_local(uri) else GcsStore(str(uri))


def is_local(uri: str | Path) -> bool:
    scheme, separator, _ = str(uri).partition("://")
    if separator and scheme not in ("file", "gs"):
        raise Refused(f"{uri}: storage of scheme {scheme!r} is not supported; give a local path or gs://")
    return not separator or scheme == "file"


def local_path(uri: str | Path) -> Path:
    """The local path that a URI names."""
    if not is_local(uri):
        raise Refused(f"{uri} is on a bucket; a local path is needed here")
    return Path(str(uri).removeprefix("file://")).expanduser()


def join_uri(uri: str | Path, name: str) -> str:
    return f"{str(uri).rstrip('/')}/{name}"


def cache() -> Path:
    """Where copies of what lies on a bucket are kept, and drafts of what will."""
    return Path(os.environ.get("DMD2_CACHE", "~/.cache/dmd2")).expanduser()


def fetch_file(uri: str | Path) -> Path:
    """A local path with the content of one file: the file itself, or a copy of this version of the object."""
    if is_local(uri):
        return local_path(uri)
    folder, _, name = str(uri).rpartition("/")
    store = open_store(folder)
    version = f"{uri} {store.generation(name)}"
    path = cache() / "files" / hashlib.sha256(version.encode()).hexdigest() / name
    if not path.is_file():
        store.fetch(name, path)
    return path
