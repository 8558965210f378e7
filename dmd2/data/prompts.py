"""Reading lists of prompts: text, JSON Lines or Parquet files, or the pickled list that DMD2 published.

A pickle is a program. Here it is read only if it does nothing but build lists, tuples, dicts and plain values: all of its opcodes are
checked before the first is executed.
"""

from __future__ import annotations

import io
import json
import pickle
import pickletools
import reprlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from dmd2.data.archives import open_parquet
from dmd2.errors import Refused, brief, near_miss
from dmd2.io.storage import fetch_file

PROMPT_COLUMNS = ("text", "caption", "prompt")
"""Names of the field or column with the prompt; the first one present is used, unless the address names one."""
PLAIN_OPCODES = {
    "PROTO", "FRAME", "STOP", "MARK", "NONE", "NEWTRUE", "NEWFALSE", "INT", "BININT", "BININT1", "BININT2",
    "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES",
    "SHORT_BINBYTES", "BINBYTES8", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "EMPTY_LIST", "LIST",
    "APPEND", "APPENDS", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_DICT", "DICT", "SETITEM",
    "SETITEMS", "PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE", "GET", "BINGET", "LONG_BINGET",
}  # fmt: skip
"""Opcodes of a pickle that can only build lists, tuples, dicts and plain values."""


def read_prompts(address: str) -> list[str]:
    """The prompts of a local or remote file, in order; blank ones are dropped, duplicates are kept.

    Args:
        address: A .txt, .jsonl, .parquet or .pkl file; `column:address` chooses the field or column.
    """
    column, colon, rest = address.partition(":")
    chosen = bool(colon) and "/" not in column and not rest.startswith("//")
    address = rest if chosen else address
    suffix = Path(address).suffix.lower()
    if suffix not in READERS:
        raise Refused(
            f"{address} is no file of prompts by its suffix {suffix!r}: {near_miss(suffix, list(READERS))}"
        )
    if chosen and suffix not in (".jsonl", ".parquet"):
        raise Refused(f"{address} has no columns to choose {column!r} from; give the address alone")
    try:
        path = fetch_file(address)
        found = list(READERS[suffix](path, address, column if chosen else ""))
    except (FileNotFoundError, IsADirectoryError):
        raise Refused(f"{address} does not exist or is no file; give a file of prompts") from None
    for index, prompt in enumerate(found):
        if not isinstance(prompt, str):
            raise Refused(
                f"{address}: prompt {index} is {reprlib.repr(prompt)}, a {type(prompt).__name__}; all must be strings"
            )
    prompts = [prompt for prompt in found if prompt.strip()]
    if not prompts:
        raise Refused(f"{address} holds no prompts; give at least one")
    return prompts


def _lines(path: Path, address: str) -> Iterator[tuple[int, str]]:
    """(line number from 1, line) of a UTF-8 file; a byte order mark is removed."""
    with path.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
            except UnicodeDecodeError:
                raise Refused(f"{address}: line {number} is not UTF-8; save the file as UTF-8") from None


def _text(path: Path, address: str, column: str) -> Iterator[str]:
    return (line for _, line in _lines(path, address))


def _jsonl(path: Path, address: str, column: str) -> Iterator[Any]:
    for number, line in _lines(path, address):
        if not line.strip():
            continue
        where = f"{address}: line {number}"
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise Refused(f"{where} is not JSON ({error}); write one object per line") from None
        if not isinstance(fields, dict):
            raise Refused(f"{where} is a {type(fields).__name__}; write one object per line")
        yield fields[_find_column(list(fields), column, where)]


def _parquet(path: Path, address: str, column: str) -> Iterator[Any]:
    with open_parquet(address) as file:
        name = _find_column(file.schema_arrow.names, column, address)
        for batch in file.iter_batches(columns=[name], use_threads=False):
            yield from batch.column(0).to_pylist()


def _pickle(path: Path, address: str, column: str) -> Sequence[Any]:
    data = path.read_bytes()
    try:
        for instruction, argument, _ in pickletools.genops(data):
            # A memo index far beyond the length of the file only serves to exhaust memory.
            far = "PUT" in instruction.name and isinstance(argument, int) and argument > len(data)
            if instruction.name not in PLAIN_OPCODES or far:
                raise Refused(
                    f"{address} is a pickle that does more than list strings ({instruction.name}), so nothing of it "
                    "was run; save the prompts as a text file"
                )
        found = PlainUnpickler(io.BytesIO(data), encoding="utf-8").load()
    except Refused:
        raise
    except Exception as error:  # both raise anything on a broken file
        raise Refused(f"{address} is no pickle, or not all of it ({brief(error)}); copy it again") from None
    if not isinstance(found, list | tuple):
        raise Refused(f"{address} is a pickled {type(found).__name__}; a list of strings is needed")
    return found


class PlainUnpickler(pickle.Unpickler):
    """An unpickler that refuses every class and function, as a second safeguard after the check of the opcodes."""

    def find_class(self, module: str, name: str) -> NoReturn:
        raise pickle.UnpicklingError(f"it names {module}.{name}"[:100])

    def persistent_load(self, key: object) -> NoReturn:
        raise pickle.UnpicklingError("it refers to something outside")


READERS: dict[str, Callable[[Path, str, str], Iterator[Any] | Sequence[Any]]] = {
    ".txt": _text,
    ".jsonl": _jsonl,
    ".parquet": _parquet,
    ".pkl": _pickle,
    ".pickle": _pickle,
}


def _find_column(there: list[str], column: str, where: str) -> str:
    found = next((name for name in ([column] if column else PROMPT_COLUMNS) if name in there), None)
    if found is None:
        wanted = repr(column) if column else "named " + ", ".join(PROMPT_COLUMNS)
        raise Refused(f"{where} has no field {wanted}: {near_miss(column or PROMPT_COLUMNS[0], there)}")
    return found
