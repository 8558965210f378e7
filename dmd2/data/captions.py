"""Captions and prompts: the names under which they are found, and their text without a byte order mark and foreign line ends.

The same rule holds for sources of images and for lists of prompts.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
import reprlib
from collections.abc import Iterator, Sequence
from typing import Any

from dmd2.data.account import Account
from dmd2.errors import Refused, near_miss

COLUMNS = ("text", "caption", "captions", "prompt", "prompts", "description")
"""Names of columns and fields with captions, in capitals or not. The first one present is used, unless another is chosen."""
SUFFIXES = (".txt", ".caption")
"""Of files beside an image of the same name; the first one present is used."""
FURTHER = "further captions of an image, of which the first is used"
LONE_SURROGATES = re.compile("[\\ud800-\\udfff]")


def find_column(there: Sequence[str], chosen: str = "") -> str | None:
    """The column or field of the captions: the chosen one, or the first with a known name; None if there is none."""
    if chosen:
        return chosen if chosen in there else None
    by_name = {name.lower(): name for name in reversed(there) if isinstance(name, str)}
    return next((by_name[name] for name in COLUMNS if name in by_name), None)


def require_column(there: Sequence[str], chosen: str, where: str, advice: str) -> str:
    """Like `find_column`; none is refused with the names that there are."""
    if (found := find_column(there, chosen)) is None:
        wanted = repr(chosen) if chosen else "of captions, named " + ", ".join(COLUMNS)
        raise Refused(
            f"{where} has no column or field {wanted}: {near_miss(chosen or COLUMNS[0], map(str, there))}; {advice}"
        )
    return found


def clean(text: str) -> str:
    """Without a byte order mark, with plain line ends, and without white space around it. Halves of characters that JSON can hold
    and UTF-8 cannot are replaced by U+FFFD."""
    text = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n").strip()
    return LONE_SURROGATES.sub("\ufffd", text)


def caption_of(value: object, where: str, account: Account) -> str:
    """The caption that a field holds: a text, nothing, or a list of which the first is used."""
    if isinstance(value, list | tuple) and all(isinstance(each, str) for each in value):
        account.remark(FURTHER, where, max(0, len(value) - 1))
        value = value[0] if value else ""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise Refused(f"{where} has {reprlib.repr(value)} for a caption; give a string")
    return clean(value)


def caption_in_json(text: str, chosen: str, where: str, account: Account) -> str:
    """The caption in a JSON object; empty if it has no field of captions."""
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError):
        fields = None
    if not isinstance(fields, dict):
        raise Refused(f"{where} is no JSON object with a caption; correct it")
    column = find_column(list(fields), chosen)
    return caption_of(fields[column], where, account) if column else ""


def decode_text(data: bytes, where: str) -> str:
    """The text of a file in UTF-8, or in UTF-16 with a byte order mark."""
    wide = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = data.decode("utf-16" if wide else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise Refused(f"{where}: line {line} is not UTF-8; save it as UTF-8") from None
    if "\0" in text:
        raise Refused(f"{where} holds NUL characters, as UTF-16 without its mark does; save it as UTF-8")
    return text


def lines_of(data: bytes, where: str) -> list[str]:
    """The lines of a file, whose ends are those of Linux, Windows or old Macs."""
    return re.split(r"\r\n|\r|\n", decode_text(data, where))


def read_jsonl(data: bytes, where: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number from 1, object) of a file in JSON Lines."""
    for number, line in enumerate(lines_of(data, where), 1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise Refused(
                f"{where}: line {number} is not JSON ({error}); write one object per line"
            ) from None
        if not isinstance(fields, dict):
            raise Refused(f"{where}: line {number} is a {type(fields).__name__}; write one object per line")
        yield number, fields


def check_different(columns: Sequence[str], where: str) -> None:
    """Refuse two columns of one name, of which only one would be read."""
    if twice := [name for name in columns if columns.count(name) > 1]:
        raise Refused(f"{where} has the column {twice[0]!r} twice; rename one of them")


def read_csv(data: bytes, where: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number from 1, fields) of a file of comma-separated values, whose first line names the columns."""
    rows = csv.DictReader(io.StringIO(decode_text(data, where), newline=""), strict=True)
    try:
        check_different(list(rows.fieldnames or ()), where)
        if len(rows.fieldnames or ()) == 1 and (found := re.search(r"[;\t]", str(rows.fieldnames))):
            raise Refused(f"{where} separates its values by {found[0]!r}; save it with commas")
        for row in rows:
            if None in row or None in row.values():
                raise Refused(
                    f"{where}: line {rows.line_num} has another number of values than the first line has names; "
                    "write texts with commas in quotation marks"
                )
            yield rows.line_num, row
    except csv.Error as error:
        raise Refused(
            f"{where}: line {rows.line_num} is no line of comma-separated values ({error})"
        ) from None
