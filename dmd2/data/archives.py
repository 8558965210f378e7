"""Reading files that contain many others: tar, zip, Parquet and IDX files.

Nothing is extracted to disk, and a truncated file is refused instead of being read as a shorter one. What a header claims is compared
with the bytes that are there before memory is taken for it. Every process opens its own file handle, because a handle opened before
a fork has one position that all processes share.
"""

from __future__ import annotations

import gzip
import itertools
import lzma
import os
import posixpath
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import lru_cache
from math import prod
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from dmd2.data.account import Account
from dmd2.errors import ADVICE, Refused, brief
from dmd2.io.storage import fetch_file

Pixels = NDArray[np.uint8]
ZIP_ERRORS = (
    zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, EOFError, OSError, ValueError, RuntimeError,
)  # fmt: skip
"""What zipfile raises on broken files; RuntimeError on encrypted ones and on unknown compressions."""
MAX_HEADER = 2**20
"""Bytes of a long name or of extended headers in a tar."""
MAX_INFLATION, ALWAYS_FINE = 200, 2**26
"""Compressed data of more than this many times its size is refused, if it has more than this many bytes. Images and labels
compress by 1 to 20."""


def is_hidden(name: str) -> bool:
    """Whether a file or one of its folders starts with a dot, or it is of the extra files of macOS."""
    parts = name.split("/")
    return any(part.startswith(".") and part not in (".", "..") for part in parts) or "__MACOSX" in parts


@contextmanager
def refuse_broken(where: str, what: str, *errors: type[Exception]) -> Iterator[None]:
    """Turn these errors of a library about a broken file into a `Refused` with one sentence. Those of the system are left as they
    are: a full disk is no broken file."""
    caught: tuple[type[Exception], ...] = (*errors, RecursionError)
    try:
        yield
    except caught as error:
        if isinstance(error, OSError) and error.errno in ADVICE:
            raise
        raise Refused(
            f"{where} is no {what}, or not all of it ({brief(error)}); make or copy it again"
        ) from None


def check_inflation(where: str, packed: int, size: int) -> None:
    """Refuse compressed data whose header claims that it becomes much larger, as that of images never does."""
    if size > max(ALWAYS_FINE, MAX_INFLATION * packed):
        raise Refused(
            f"{where} says that its {packed:,} bytes become {size:,}, more than {MAX_INFLATION} times as many, which "
            "no images do; make it again without compression if it is meant"
        )


class PlainTarInfo(tarfile.TarInfo):
    """A member of a tar that holds its bytes as they are, so that no header can claim more than the file has.

    Sparse members are refused: a few bytes of them stand for any number of zeros."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> PlainTarInfo:
        header = super().frombuf(buf, encoding, errors)
        if header.size < 0 or (header.type in HEADERS and header.size > MAX_HEADER):
            raise tarfile.ReadError(f"a header claims {header.size:,} bytes")
        if header.type == tarfile.GNUTYPE_SPARSE:
            raise _sparse()
        return header

    def _proc_gnusparse_00(self, *_: object) -> NoReturn:
        raise _sparse()

    _proc_gnusparse_01 = _proc_gnusparse_10 = _proc_gnusparse_00


HEADERS = (
    tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE,
)  # fmt: skip
"""Types of members that say something about the next one."""


def _sparse() -> tarfile.ReadError:
    return tarfile.ReadError("it has sparse files; make it without --sparse")


@contextmanager
def open_tar(uri: str, part: tarfile.TarInfo | None = None) -> Iterator[tarfile.TarFile]:
    """Open a tar, or the tar that is the member `part` of it."""
    path = fetch_file(uri)
    broken = tarfile.TarError, EOFError, ValueError, OverflowError, IndexError
    with refuse_broken(uri, "tar file", *broken), tarfile.open(path, "r:", tarinfo=PlainTarInfo) as tar:
        if part is None:
            yield tar
        else:
            stream = tar.extractfile(part)
            with tarfile.open(fileobj=stream, mode="r:", tarinfo=PlainTarInfo) as inner:
                yield inner


def members(tar: tarfile.TarFile, where: str, account: Account) -> Iterator[tarfile.TarInfo]:
    """The regular files of a tar, in order. Hidden ones, links and devices are left out. A tar without its end is refused."""
    stream: Any = tar.fileobj
    length = stream.seek(0, os.SEEK_END)
    while (member := tar.next()) is not None:
        tar.members.clear()  # type: ignore[attr-defined]  # it remembers all of them otherwise
        if member.size < 0:  # by an extended header
            raise tarfile.ReadError(f"{member.name} claims {member.size} bytes")
        if member.isfile() and member.offset_data + member.size > length:
            raise tarfile.ReadError(f"{member.name} would end at byte {member.offset_data + member.size:,}")
        if is_hidden(member.name) and not member.isdir():
            account.leave_out("hidden files", f"{where}/{member.name}")
        elif member.isfile():
            yield member
        elif not member.isdir():
            account.leave_out("links, pipes and devices in an archive", f"{where}/{member.name}")
    stream.seek(tar.offset)
    end = stream.read(2 * tarfile.RECORDSIZE)
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


def grouped_samples(
    uri: str, wanted: Collection[str], account: Account, noticed: Collection[str] = ()
) -> Iterator[tuple[str, dict[str, bytes]]]:
    """(name of the sample, {suffix: content}) for each run of members with the same key, as WebDataset groups them.

    Only members with a suffix in `wanted` are read; those in `noticed` are there, with an empty content. The suffix is what follows
    the first dot of the file name.
    """
    with open_tar(uri) as tar:
        for key, group in itertools.groupby(members(tar, uri, account), lambda member: _key(member)[0]):
            found: dict[str, bytes] = {}
            for member in group:
                suffix = _key(member)[1]
                if suffix in found:
                    raise Refused(f"{uri}/{member.name} is there twice; give every sample its own key")
                if suffix in wanted:
                    found[suffix] = read_member(tar, member)
                elif suffix in noticed:
                    found[suffix] = b""
                else:
                    what = f".{suffix} files" if suffix else "files without a suffix"
                    account.leave_out(f"{what} in an archive", f"{uri}/{member.name}")
            yield f"{uri}/{key}", found


def _key(member: tarfile.TarInfo) -> tuple[str, str]:
    above, name = posixpath.split(member.name)
    key, _, suffix = name.partition(".")
    return posixpath.join(above, key), suffix.lower()


@lru_cache(maxsize=4)
def open_zip(uri: str, process: int) -> zipfile.ZipFile:
    """Opened once per process: a handle opened before a fork has one position that all processes share."""
    path = fetch_file(uri)
    with refuse_broken(uri, "zip file", *ZIP_ERRORS):
        return zipfile.ZipFile(path)


def read_zip_member(uri: str, name: str) -> bytes:
    archive = open_zip(uri, os.getpid())
    with refuse_broken(f"{uri}/{name}", "file in a zip", *ZIP_ERRORS):
        check_zip_member(archive, uri, name)
        return archive.read(name)


def check_zip_member(archive: zipfile.ZipFile, uri: str, name: str) -> int:
    """The size of a member of a zip; refused if the file is too short for it, or if it inflates too much."""
    info = archive.getinfo(name)
    assert archive.fp is not None
    if info.compress_size > os.fstat(archive.fp.fileno()).st_size:
        raise zipfile.BadZipFile(f"{name} claims {info.compress_size:,} bytes")
    check_inflation(f"{uri}/{name}", info.compress_size, info.file_size)
    return info.file_size


def npz_array(archive: zipfile.ZipFile, uri: str, name: str) -> NDArray[Any]:
    """An array of an npz file, whose header is compared with the size of the member before memory is taken."""
    size = check_zip_member(archive, uri, f"{name}.npy")
    with archive.open(f"{name}.npy") as stream:
        version = np.lib.format.read_magic(stream)
        if version not in NPY_HEADERS:
            raise ValueError(f"{name} is of version {version} of the format npy")
        shape, _, dtype = NPY_HEADERS[version](stream)
        if dtype.hasobject:
            raise ValueError(f"{name} holds objects of Python")
        if prod(shape) * dtype.itemsize != size - stream.tell():
            raise ValueError(f"{name} is {dtype} {shape}, which is not {size - stream.tell():,} bytes")
    with archive.open(f"{name}.npy") as stream:
        return np.lib.format.read_array(stream, allow_pickle=False)


NPY_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


@contextmanager
def open_parquet(uri: str) -> Iterator[Any]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    path = fetch_file(uri)
    broken = ArrowException, OSError, ValueError, AttributeError, TypeError, KeyError, OverflowError
    with refuse_broken(uri, "Parquet file", *broken), ParquetFile(path) as file:
        groups = [file.metadata.row_group(number) for number in range(file.metadata.num_row_groups)]
        check_inflation(uri, os.stat(path).st_size, sum(group.total_byte_size for group in groups))
        yield file


def idx_array(uri: str, dimensions: int) -> Pixels:
    """The uint8 array of an IDX file: two zero bytes, type 8, number of dimensions, sizes (4 bytes each), values."""
    path, packed = fetch_file(uri), uri.endswith(".gz")
    broken = refuse_broken(uri, "IDX file", EOFError, gzip.BadGzipFile, zlib.error)
    with broken, gzip.open(path) if packed else path.open("rb") as stream:
        head, there = stream.read(4 + 4 * dimensions), path.stat().st_size
        shape = [int.from_bytes(head[at : at + 4], "big") for at in range(4, 4 + 4 * dimensions, 4)]
        known = len(head) == 4 + 4 * dimensions and head[:4] == bytes([0, 0, 8, dimensions])
        if packed:
            check_inflation(uri, there, prod(shape))
        data = stream.read(prod(shape) + 1) if known and (packed or prod(shape) < there) else b""
    if not known or len(data) != prod(shape):
        raise Refused(
            f"{uri} is no IDX file of bytes in {dimensions} dimensions, or not all of it; copy it again"
        )
    return np.frombuffer(data, np.uint8).reshape(shape)
