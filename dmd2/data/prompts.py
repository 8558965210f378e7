"""Reading lists of prompts: text, CSV, JSON Lines or Parquet files, or the pickled list that DMD2 published.

A pickle is a program. Here it is read only if it does nothing but build lists, tuples, dicts and plain values: all of its opcodes are
checked before the first is executed.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import reprlib
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from dmd2.data.archives import open_parquet
from dmd2.data.captions import check_different, clean, lines_of, read_csv, read_jsonl, require_column
from dmd2.errors import Refused, brief, near_miss
from dmd2.io.storage import fetch_file

COLUMN_ADVICE = "choose one by column:address"
PLAIN_OPCODES = {
    "PROTO", "FRAME", "STOP", "MARK", "NONE", "NEWTRUE", "NEWFALSE", "INT", "BININT", "BININT1", "BININT2",
    "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES",
    "SHORT_BINBYTES", "BINBYTES8", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "EMPTY_LIST", "LIST",
    "APPEND", "APPENDS", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_DICT", "DICT", "SETITEM",
    "SETITEMS", "PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE", "GET", "BINGET", "LONG_BINGET",
}  # fmt: skip
"""Opcodes of a pickle that can only build lists, tuples, dicts and plain values."""


def read_prompts(address: str) -> list[str]:
    """The prompts of a local or remote file, in order; blank ones are dropped, duplicates are kept. None in a pickled list, which the
    reference's lists have, is an empty prompt.

    Args:
        address: A .txt, .jsonl, .csv, .parquet or .pkl file; `column:address` chooses the field or column.
    """
    column, colon, rest = address.partition(":")
    chosen = bool(colon) and "/" not in column and not rest.startswith("//")
    address = rest if chosen else address
    suffix = Path(address).suffix.lower()
    if suffix not in READERS:
        raise Refused(
            f"{address} is no file of prompts by its suffix {suffix!r}: {near_miss(suffix, READERS)}"
        )
    if chosen and suffix not in (".jsonl", ".csv", ".parquet"):
        raise Refused(f"{address} has no columns to choose {column!r} from; give the address alone")
    try:
        path = fetch_file(address)
        found = list(READERS[suffix](path, address, column if chosen else ""))
    except (FileNotFoundError, IsADirectoryError):
        raise Refused(f"{address} does not exist or is no file; give a file of prompts") from None
    for index, prompt in enumerate(found):
        if not isinstance(prompt, str) and not (prompt is None and READERS[suffix] is _pickle):
            raise Refused(
                f"{address}: prompt {index} is {reprlib.repr(prompt)}, a {type(prompt).__name__}; all must be strings"
            )
    prompts = [
        "" if prompt is None else text for prompt in found if prompt is None or (text := clean(prompt))
    ]
    if not prompts:
        raise Refused(f"{address} holds no prompts; give at least one")
    return prompts


def _text(path: Path, address: str, column: str) -> list[str]:
    return lines_of(path.read_bytes(), address)


def _jsonl(path: Path, address: str, column: str) -> Iterator[Any]:
    return _fields(read_jsonl(path.read_bytes(), address), column, address)


def _csv(path: Path, address: str, column: str) -> Iterator[Any]:
    return _fields(read_csv(path.read_bytes(), address), column, address)


def _fields(lines: Iterator[tuple[int, dict[str, Any]]], column: str, address: str) -> Iterator[Any]:
    for number, fields in lines:
        column = require_column(list(fields), column, f"{address}: line {number}", COLUMN_ADVICE)
        yield fields[column]


def _parquet(path: Path, address: str, column: str) -> Iterator[Any]:
    with open_parquet(address) as file:
        check_different(file.schema_arrow.names, address)
        name = require_column(file.schema_arrow.names, column, address, COLUMN_ADVICE)
        for batch in file.iter_batches(columns=[name], use_threads=False):
            yield from batch.column(0).to_pylist()


def _pickle(path: Path, address: str, column: str) -> Sequence[Any]:
    data = path.read_bytes()
    try:
        if forbidden := forbidden_opcode(io.BytesIO(data), PLAIN_OPCODES):
            raise Refused(
                f"{address} is a pickle that does more than list strings ({forbidden}), so nothing of it was run; save the prompts "
                "as a text file"
            )
        found = PlainUnpickler(io.BytesIO(data), encoding="utf-8").load()
    except Refused:
        raise
    except Exception as error:  # both raise anything on a broken file
        raise Refused(f"{address} is no pickle, or not all of it ({brief(error)}); copy it again") from None
    if not isinstance(found, list | tuple):
        raise Refused(f"{address} is a pickled {type(found).__name__}; a list of strings is needed")
    return found


def forbidden_opcode(stream: BinaryIO, allowed: Collection[str]) -> str:
    """The name of the first opcode of a pickle that is not allowed, or would only exhaust memory; empty if there is none."""
    size = stream.seek(0, io.SEEK_END)
    stream.seek(0)
    for opcode, argument, _ in pickletools.genops(stream):
        # An index of the memo far beyond the length of the file.
        far = "PUT" in opcode.name and isinstance(argument, int) and argument > size
        if opcode.name not in allowed or far:
            return opcode.name
    return ""


class PlainUnpickler(pickle.Unpickler):
    """An unpickler that refuses every class and function, as a second safeguard after the check of the opcodes."""

    def find_class(self, module: str, name: str) -> NoReturn:
        raise pickle.UnpicklingError(f"it names {module}.{name}"[:100])

    def persistent_load(self, key: object) -> NoReturn:
        raise pickle.UnpicklingError("it refers to something outside")


READERS: dict[str, Callable[[Path, str, str], Iterator[Any] | Sequence[Any]]] = {
    ".txt": _text,
    ".jsonl": _jsonl,
    ".csv": _csv,
    ".parquet": _parquet,
    ".pkl": _pickle,
    ".pickle": _pickle,
}
