"""Rows of named arrays, bytes and texts in one LMDB file, read at random.

A row's value of column c has the key `<row, 12 digits>/<c>`; the key `table` holds a JSON text with the version of
the layout, the number of rows and each column's dtype and shape: a reader needs nothing else. The same columns and
rows give the same bytes of the file, on machines of the same page size, byte order and version of LMDB; elsewhere
the same keys and values.
"""

from __future__ import annotations

import errno
import fcntl
import json
import math
import operator
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, Self
from weakref import WeakValueDictionary

import lmdb
import numpy as np

from dmd2.errors import Refused, near_miss

Value = np.ndarray | bytes | str
Row = dict[str, Value]

VERSION = 1
HEADER = b"table"  # sorts behind every row, so that it too can be appended
ROWS_PER_BATCH, BYTES_PER_BATCH = 1000, 64 << 20
FIRST_MAP = 1 << 20
"""Bytes of the map at first; it doubles whenever it is full."""
NUMBERS = ("uint8", "float16", "float32", "int64", "float64", "int8", "int16", "uint16", "int32", "uint32", "uint64", "bool", "complex64", "complex128")  # fmt: skip


@dataclass(frozen=True)
class Column:
    """What each row holds under one name."""

    dtype: str
    """One of NUMBERS, or "bytes" or "text" for rows of any length."""
    shape: tuple[int, ...] = ()
    """Of one row."""

    def __post_init__(self) -> None:
        known = [*NUMBERS, "bytes", "text"]
        if self.dtype not in known:
            raise Refused(f"no column has dtype {self.dtype!r}; {near_miss(self.dtype, known)}")
        if any(size < 0 for size in self.shape) or (self.shape and not self.is_numeric):
            raise Refused(
                f"no column of {self.dtype} has rows of shape {self.shape}; give sizes of numbers only, and none below 0"
            )

    @property
    def is_numeric(self) -> bool:
        return self.dtype in NUMBERS

    @property
    def size(self) -> int:
        """Bytes of a row of numbers."""
        return np.dtype(self.dtype).itemsize * math.prod(self.shape)

    def __str__(self) -> str:
        return f"{self.dtype} {self.shape}" if self.is_numeric else self.dtype

    def encode(self, value: Value | int) -> bytes | None:
        """The stored bytes of the value, or None if it does not have the dtype and shape of the column."""
        if self.dtype == "bytes":
            return bytes(value) if isinstance(value, bytes) else None
        if self.dtype == "text":
            return _encode_utf8(value) if isinstance(value, str) else None
        array = _exact_array(value, self.dtype) if isinstance(value, int) else value
        if not isinstance(array, np.ndarray | np.generic) or array.shape != self.shape:
            return None
        return array.tobytes() if array.dtype == np.dtype(self.dtype) else None

    def decode(self, stored: memoryview) -> Value:
        if self.dtype == "bytes":
            return bytes(stored)
        if self.dtype == "text":
            return str(stored, "utf-8")
        return np.ndarray(self.shape, self.dtype, stored).copy()  # aligned, and torch may write to it


class TableWriter:
    """Writes a table in a hidden file beside `path`, which gets its name when the `with` ends without an error."""

    _env: lmdb.Environment
    _lock: IO[bytes]

    def __init__(self, path: str | Path, columns: Mapping[str, Column]) -> None:
        self.path, self.columns = Path(path).absolute(), dict(columns)
        self._draft = self.path.with_name(f".{self.path.name}.partial")
        self._count = self._bytes = 0
        self._rows: list[tuple[bytes, bytes]] = []
        wrong = [name for name in columns if not re.fullmatch(r"[\w.-]{1,64}", name, re.ASCII)]
        if wrong or not columns:
            raise Refused(
                f"{path}: columns {list(columns)} cannot be named in a table; give one or more names of letters, digits and _.-"
            )

    def __enter__(self) -> Self:
        if self.path.exists():
            raise Refused(f"{self.path} exists; choose another path or remove it")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = _lock_draft(self._draft)
        try:
            with _system_errors(self.path):
                self._env = lmdb.open(
                    str(self._draft), subdir=False, map_size=FIRST_MAP, lock=False, sync=False
                )
        except BaseException:
            self._drop()
            raise
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        finished = False
        try:
            if kind is None:
                self._finish()
                finished = True
        finally:
            self._env.close()
            if finished:
                self._lock.close()
            else:
                self._drop()

    def append(self, row: Mapping[str, Value | int]) -> None:
        """One value for every column; an int stands for a number of a column whose shape is ()."""
        if row.keys() != self.columns.keys():
            raise Refused(
                f"row {self._count} of {self.path} has columns {sorted(row)}, the table has {sorted(self.columns)}; "
                "give each of them once"
            )
        values = {name: self._encode(name, row[name]) for name in sorted(row)}
        self._rows += [(_key(name, self._count), value) for name, value in values.items()]
        self._bytes += sum(map(len, values.values()))
        self._count += 1
        if self._count % ROWS_PER_BATCH == 0 or self._bytes >= BYTES_PER_BATCH:
            self._commit()

    def _encode(self, name: str, value: Value | int) -> bytes:
        encoded = self.columns[name].encode(value)
        if encoded is None:
            given = f"{value.dtype} {value.shape}" if isinstance(value, np.ndarray) else _describe(value)
            raise Refused(
                f"row {self._count} of {self.path}: column {name!r} takes {self.columns[name]}, not {given}; convert it"
            )
        return encoded

    def _commit(self) -> None:
        """Write the rows at hand in one transaction, again from its start if the map was too small."""
        while True:
            try:
                with _system_errors(self.path), self._env.begin(write=True) as transaction:
                    for key, value in self._rows:
                        transaction.put(key, value, append=True)
                break
            except lmdb.MapFullError:
                self._env.set_mapsize(2 * self._env.info()["map_size"])
        self._rows, self._bytes = [], 0

    def _finish(self) -> None:
        columns = {name: asdict(column) for name, column in self.columns.items()}
        about = {"version": VERSION, "rows": self._count, "columns": columns}
        self._rows.append((HEADER, json.dumps(about).encode()))
        self._commit()
        with _system_errors(self.path):
            self._env.sync(True)  # the name may survive a lost node, the content must too
        self._env.close()
        self._draft.replace(self.path)

    def _drop(self) -> None:
        self._draft.unlink(missing_ok=True)
        self._lock.close()


class Table:
    """A table that `TableWriter` made: `table[i]`, `table.column(name, i)`, `len(table)`.

    It may be forked and pickled: each process opens the file for itself.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).absolute()
        self._file = open_file(self.path)
        try:
            header = json.loads(bytes(self._get(HEADER) or b""))
            version = header["version"]
        except (ValueError, TypeError, KeyError):
            raise Refused(
                f"{path} is an LMDB file, but no table: its key {HEADER.decode()!r} does not describe columns; "
                "make it with TableWriter"
            ) from None
        if version != VERSION:
            raise Refused(
                f"{path} is a table of layout {version}, this version reads {VERSION}; make it again"
            )
        self._count: int = header["rows"]
        self.columns = {
            name: Column(column["dtype"], tuple(column["shape"]))
            for name, column in header["columns"].items()
        }

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Row:
        return {name: self.column(name, index) for name in self.columns}

    def __iter__(self) -> Iterator[Row]:
        return (self[index] for index in range(len(self)))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.path,)

    def column(self, name: str, index: int) -> Value:
        """One value of a row. An array is a copy that belongs to the caller.

        Raises:
            Refused: There is no such column or row, or the stored value is not of the column's dtype and shape.
        """
        if name not in self.columns:
            raise Refused(f"{self.path} has no column {name!r}; {near_miss(name, self.columns)}")
        if not 0 <= operator.index(index) < len(self):
            raise Refused(f"{self.path} has no row {index}; it has {len(self)}, counted from 0")
        column, stored = self.columns[name], self._get(_key(name, index))
        if stored is None:
            raise Refused(f"{self.path} lacks row {index} of {name!r}; it is incomplete, make it again")
        if column.is_numeric and len(stored) != column.size:
            raise Refused(
                f"{self.path}: row {index} of {name!r} has {len(stored)} bytes, {column} takes {column.size}; "
                "it was changed, make it again"
            )
        try:
            return column.decode(stored)
        except UnicodeDecodeError:
            raise Refused(
                f"{self.path}: row {index} of {name!r} is no UTF-8 text; it was changed, make it again"
            ) from None

    def _get(self, key: bytes) -> memoryview | None:
        if self._file.pid != os.getpid():
            self._file = open_file(self.path)
        return self._file.transaction.get(key)


class OpenFile:
    """A file that is open in one process, with a transaction for all reads."""

    def __init__(self, path: Path) -> None:
        self.pid = os.getpid()
        try:
            self.env = lmdb.open(str(path), subdir=False, readonly=True, lock=False, readahead=False)
        except lmdb.Error as error:
            if error.code == errno.EACCES:
                raise PermissionError(error.code, "not readable", str(path)) from error
            reason = str(error).removeprefix(f"{path}: ")
            raise Refused(f"{path} cannot be opened as an LMDB database ({reason}); make it again") from None
        self.transaction = self.env.begin(buffers=True)

    @property
    def min_size(self) -> int:
        """Bytes that the file must have. Reading pages beyond the end of a truncated file would be a bus error."""
        return int(self.env.stat()["psize"] * (self.env.info()["last_pgno"] + 1))

    def close(self) -> None:
        self.transaction.abort()
        self.env.close()


_OPEN_FILES: WeakValueDictionary[tuple[int, int], OpenFile] = WeakValueDictionary()
"""By device and inode: LMDB opens a file once per process."""


def open_file(path: Path) -> OpenFile:
    """The file, opened once per process. A handle inherited by a fork is closed first, because LMDB counts open handles."""
    if not path.is_file():
        raise Refused(f"{path} is not a file of LMDB; give the path of one")
    stat = path.stat()
    there = _OPEN_FILES.get((stat.st_dev, stat.st_ino))
    if there is not None and there.pid == os.getpid():
        return there
    if there is not None:
        there.close()
    opened = OpenFile(path)
    if stat.st_size < opened.min_size:
        raise Refused(f"{path} is truncated to {stat.st_size} bytes; copy or make it again")
    _OPEN_FILES[stat.st_dev, stat.st_ino] = opened
    return opened


def _lock_draft(draft: Path) -> IO[bytes]:
    """The draft file, emptied and locked until it is closed or this process ends."""
    lock = draft.open("ab")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # It may have been renamed to a finished table before it was locked.
        ours = draft.exists() and os.path.samestat(os.fstat(lock.fileno()), draft.stat())
    except BlockingIOError:
        ours = False
    if not ours:
        lock.close()
        raise Refused(f"another process is writing {draft}; wait for it, or choose another path")
    lock.truncate(0)
    return lock


@contextmanager
def _system_errors(path: Path) -> Iterator[None]:
    """Raise system errors of LMDB as OSError with the path. LMDB reports a full disk as EIO."""
    try:
        yield
    except lmdb.Error as error:
        if error.code <= 0:
            raise
        number = errno.ENOSPC if error.code == errno.EIO else error.code
        raise OSError(number, f"cannot write ({error})", str(path)) from error


def _key(name: str, index: int) -> bytes:
    return f"{index:012d}/{name}".encode()


def _encode_utf8(text: str) -> bytes | None:
    try:
        return text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair
        return None


def _exact_array(value: int, dtype: str) -> np.ndarray | None:
    """The number as that dtype, or None where it cannot be exactly that number."""
    try:
        with np.errstate(over="ignore"):
            array = np.array(value, dtype)
    except OverflowError:
        return None
    return array if array.item() == value else None


def _describe(value: object) -> str:
    text = " ".join(f"{type(value).__name__} {value!r}".split())
    return text if len(text) <= 60 else f"{text[:57]}..."
