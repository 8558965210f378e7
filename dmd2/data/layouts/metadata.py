"""A folder of images with a metadata.jsonl or metadata.csv, as Hugging Face's imagefolder has it."""

from __future__ import annotations

import posixpath
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from dmd2.data.account import Account
from dmd2.data.captions import caption_of, find_column, read_csv, read_jsonl, require_column
from dmd2.data.decode import IMAGE_SUFFIXES
from dmd2.data.listing import Listing, check_folder_splits, find_named, find_one, with_siblings
from dmd2.data.sources import NOT_CLASSES, ListedImage, Source, optional_caption, source_of_listing
from dmd2.errors import Refused, near_miss

PATTERN_METADATA = r"(.*/)?metadata\.(jsonl|csv)"
FILE, LABEL = "file_name", "label"


def metadata(listing: Listing) -> Source:
    """Images and a list of them beside them: file_name, a caption, label. Of several lines about an image the first is used."""
    listing, name = with_siblings(
        listing, find_one(listing, PATTERN_METADATA, "metadata.jsonl or metadata.csv")
    )
    uri = listing.uri(name)
    read = read_csv if name.endswith(".csv") else read_jsonl
    lines = list(read(listing.read(name), uri))
    check_folder_splits([str(fields.get(FILE)) for _, fields in lines], uri)
    there = list(dict.fromkeys(field for _, fields in lines for field in fields))
    text, label = _find_columns(there, listing, uri)
    find, rows, further = find_named(listing, posixpath.dirname(name)), {}, Account()
    for number, fields in lines:
        where = f"{uri}: line {number}"
        file = _find_file(fields, find, where)
        if file in rows:
            further.leave_out("further lines about an image, of which the first is used", where)
            continue
        further.use("lines about images")
        read_caption = partial(caption_of, fields.get(text), f"{where}, {file}", further)
        caption = optional_caption(read_caption, listing.wanted.captions, where, further)
        rows[file] = ListedImage(file, fields.get(label), caption)
    extra = {e.name for e in listing.entries if e.name.lower().endswith(IMAGE_SUFFIXES)} - rows.keys()
    if extra:
        raise Refused(f"{uri} has no line for {min(extra)}; add one or remove the image")
    account = listing.account({name: "lists of images"}, rows)
    account.add(further)
    if listing.wanted.labels and label not in there and (deep := [file for file in rows if "/" in file]):
        account.remark(NOT_CLASSES, deep[0], len(deep))
    if unused := [field for field in there if field not in (FILE, text, label)]:
        account.remark("fields that are not used", ", ".join(unused), len(unused))
    return source_of_listing(listing, list(rows.values()), account)


def _find_columns(there: Sequence[str], listing: Listing, where: str) -> tuple[str, str]:
    """The fields of caption and label."""
    wanted = listing.wanted
    if wanted.captions or wanted.caption_column:
        text = require_column(there, wanted.caption_column, where, "choose one by --data.caption-column")
    else:
        text = find_column(there) or ""
    label = wanted.label_column or LABEL
    if wanted.label_column and label not in there:
        raise Refused(f"{where} has no field {label!r} of labels: {near_miss(label, there)}")
    return text, label


def _find_file(fields: dict[str, Any], find: Callable[[str], str | None], where: str) -> str:
    named = fields.get(FILE)
    if not isinstance(named, str):
        raise Refused(f"{where} has no {FILE}, but {', '.join(map(str, fields))}; give the name of the image")
    if (file := find(named)) is None:
        raise Refused(f"{where} names {named}, which is not there; add the image or drop its line")
    return file
