"""Reading files that contain many others: tar, zip, Parquet and IDX files.

Nothing is extracted to disk, and a truncated file is refused instead of being read as a shorter one. Every process opens
its own file handle, because a handle opened before a fork has one position that all processes share.
"""

from __future__ import annotations

import gzip
import itertools
import os
import posixpath
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dmd2.errors import Refused, brief
from dmd2.io.storage import fetch_file

Pixels = NDArray[np.uint8]


def is_hidden(name: str) -> bool:
    name = name.removeprefix("./")
    return "/." in f"/{name}" or name.startswith("__MACOSX/")


@contextmanager
def refuse_broken(where: str, what: str, *errors: type[Exception]) -> Iterator[None]:
    """Turn these errors of a library about a broken file into a `Refused` with one sentence."""
    try:
        yield
    except errors as error:
        raise Refused(
            f"{where} is no {what}, or not all of it ({brief(error)}); make or copy it again"
        ) from None


@contextmanager
def open_tar(uri: str, part: tarfile.TarInfo | None = None) -> Iterator[tarfile.TarFile]:
    """Open a tar, or the tar that is the member `part` of it."""
    path = fetch_file(uri)
    with refuse_broken(uri, "tar file", tarfile.TarError, EOFError), tarfile.open(path, "r:") as tar:
        if part is None:
            yield tar
        else:
            with tarfile.open(fileobj=tar.extractfile(part), mode="r:") as inner:
                yield inner


def members(tar: tarfile.TarFile, where: str) -> Iterator[tarfile.TarInfo]:
    """The regular files of a tar, in order; hidden ones are left out. A tar without its end is refused."""
    while (member := tar.next()) is not None:
        tar.members.clear()  # type: ignore[attr-defined]  # it remembers all of them otherwise
        if member.isfile() and not is_hidden(member.name):
            yield member
    assert tar.fileobj is not None
    tar.fileobj.seek(tar.offset)
    end = tar.fileobj.read(2 * tarfile.RECORDSIZE)
    if end[: tarfile.BLOCKSIZE] != bytes(tarfile.BLOCKSIZE):  # tarfile takes a broken header for the end
        raise Refused(f"{where} is no tar file, or not all of it (it has no end); make or copy it again")
    if end.strip(b"\0"):
        raise Refused(
            f"{where} goes on behind its end, as tars put together with cat do; use tar -A for that"
        )


def read_member(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    stream = tar.extractfile(member)
    assert stream is not None
    return stream.read()


def grouped_samples(uri: str, wanted: set[str]) -> Iterator[tuple[str, dict[str, bytes]]]:
    """(name of the sample, {suffix: content}) for each run of members with the same key, as WebDataset groups them.

    Only members with a suffix in `wanted` are read. The suffix is what follows the first dot of the file name.
    """
    with open_tar(uri) as tar:
        for key, group in itertools.groupby(members(tar, uri), lambda member: _key(member)[0]):
            found: dict[str, bytes] = {}
            for member in group:
                suffix = _key(member)[1]
                if suffix in found:
                    raise Refused(f"{uri}/{member.name} is there twice; give every sample its own key")
                if suffix in wanted:
                    found[suffix] = read_member(tar, member)
            yield f"{uri}/{key}", found


def _key(member: tarfile.TarInfo) -> tuple[str, str]:
    above, name = posixpath.split(member.name)
    key, _, suffix = name.partition(".")
    return posixpath.join(above, key), suffix.lower()


@lru_cache(maxsize=4)
def open_zip(uri: str, process: int) -> zipfile.ZipFile:
    """Opened once per process: a handle opened before a fork has one position that all processes share."""
    return zipfile.ZipFile(fetch_file(uri))


def read_zip_member(uri: str, name: str) -> bytes:
    return open_zip(uri, os.getpid()).read(name)


@contextmanager
def open_parquet(uri: str) -> Iterator[Any]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    path = fetch_file(uri)
    with (
        refuse_broken(uri, "Parquet file", ArrowException, OSError, ValueError, AttributeError),
        ParquetFile(path) as file,
    ):
        yield file


def idx_array(uri: str, dimensions: int) -> Pixels:
    """The uint8 array of an IDX file: two zero bytes, type 8, number of dimensions, sizes (4 bytes each), values."""
    data = fetch_file(uri).read_bytes()
    with refuse_broken(uri, "IDX file", EOFError, gzip.BadGzipFile, zlib.error):
        data = gzip.decompress(data) if uri.endswith(".gz") else data
    start = 4 + 4 * dimensions
    whole = len(data) >= start and data[:4] == bytes([0, 0, 8, dimensions])
    shape = [int.from_bytes(data[at : at + 4], "big") for at in range(4, start, 4)]
    if not whole or len(data) != start + prod(shape):
        raise Refused(
            f"{uri} is no IDX file of bytes in {dimensions} dimensions, or not all of it; copy it again"
        )
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)
