"""Parquet files with a column of images, as on the Hugging Face Hub."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

from dmd2.data.account import Account
from dmd2.data.archives import open_parquet
from dmd2.data.captions import caption_of, check_different, find_column, require_column
from dmd2.data.listing import Listing, Wanted, archives_ending
from dmd2.data.sources import (
    Archive,
    Label,
    Source,
    SourceImage,
    broken_image,
    class_names,
    class_of_label,
    classes_of_labels,
    loaded_image,
    optional_caption,
)
from dmd2.errors import Refused, near_miss

BATCH = 32
"""Rows of a Parquet file in memory at a time."""
IMAGE, LABEL = ("image", "img", "jpg", "png", "webp"), ("label",)
"""Names of columns; the first one present is used."""


class ParquetColumns(NamedTuple):
    image: str
    label: str | None
    text: str | None

    def present(self) -> list[str]:
        return [name for name in self if name]


def parquet(listing: Listing) -> Source:
    """Parquet files with a column of images (bytes, or a struct with bytes), and captions and labels if any."""
    found = archives_ending(listing, ".parquet")
    account, files = listing.account(dict.fromkeys(found, "archives")), [listing.uri(name) for name in found]
    with open_parquet(files[0]) as first:
        columns, names = _read_schema(first.schema_arrow, files[0], listing.wanted)
        if unused := [name for name in first.schema_arrow.names if name not in columns]:
            account.remark("columns that are not used", ", ".join(unused), len(unused))
    expected = columns, names
    if listing.store.local_folder:  # others are compared when they are read
        for uri in files[1:]:
            with open_parquet(uri) as file:
                _check_schema(file.schema_arrow, uri, listing.wanted, expected)
    labels: dict[Label, int] = {None: 0}
    if names:
        labels = {index: index for index in range(len(names))}
    elif columns.label:
        labels = classes_of_labels(pair for uri in files for pair in _distinct_labels(uri, columns.label))
    count = sum(map(_row_count, files)) if listing.store.local_folder else None
    archives = [Archive(uri, partial(_records, uri, listing.wanted, expected, labels)) for uri in files]
    return Source(
        names or class_names(labels), listing.fingerprint, archives=archives, count=count, account=account
    )


def _read_schema(schema: Any, where: str, wanted: Wanted) -> tuple[ParquetColumns, list[str] | None]:
    """The columns, and the names of the classes if the file has them."""
    check_different(schema.names, where)
    columns = _find_columns(schema, where, wanted)
    if columns.label and hasattr(kind := schema.field(columns.label).type, "num_fields") and kind.num_fields:
        raise Refused(f"{where} has {kind} in the column {columns.label!r}; labels are numbers or names")
    names = _huggingface_features(schema).get(columns.label or "", {}).get("names")
    if names and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise ValueError(f"its names of classes are {reprlib.repr(names)}")
    return columns, names


def _check_schema(
    schema: Any, where: str, wanted: Wanted, expected: tuple[ParquetColumns, list[str] | None]
) -> None:
    found = _read_schema(schema, where, wanted)
    for kind, mine, others in zip(("columns", "names of classes"), found, expected, strict=True):
        if mine != others:
            shown = [", ".join(filter(None, each or ())) or "none" for each in (mine, others)]
            raise Refused(
                f"{where} has other {kind} than the first file ({shown[0]:.200} instead of {shown[1]:.200}); make them alike"
            )


def _huggingface_features(schema: Any) -> dict[str, Any]:
    """The features that the `datasets` library stores in the schema's metadata."""
    note = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    return {name: f for name, f in note.get("info", {}).get("features", {}).items() if isinstance(f, dict)}


def _find_columns(schema: Any, where: str, wanted: Wanted) -> ParquetColumns:
    there = schema.names
    image = next((name for name in IMAGE if name in there), None)
    if image is None:
        raise Refused(f"{where} has columns {', '.join(there)}; name that of the images {' or '.join(IMAGE)}")
    if wanted.captions or wanted.caption_column:
        text: str | None = require_column(
            there, wanted.caption_column, where, "choose one by --data.caption-column"
        )
    else:
        text = find_column(there)
    return ParquetColumns(image, _find_label(schema, where, wanted) if wanted.labels else None, text)


def _find_label(schema: Any, where: str, wanted: Wanted) -> str | None:
    there = schema.names
    label = wanted.label_column or next((name for name in LABEL if name in there), None)
    if label and label not in there:
        raise Refused(f"{where} has no column {label!r} of labels: {near_miss(label, there)}")
    classes = [
        name
        for name, feature in _huggingface_features(schema).items()
        if feature.get("_type") == "ClassLabel"
    ]
    if classes and label is None:
        raise Refused(
            f"{where} has classes ({', '.join(classes)}), but no column label; choose one by --data.label-column"
        )
    return label


def _distinct_labels(uri: str, column: str) -> Iterator[tuple[str, Any]]:
    with open_parquet(uri) as file:
        if column not in file.schema_arrow.names:
            raise Refused(
                f"{uri} has no column {column}, though other files have; add it, or remove it everywhere"
            )
        for batch in file.iter_batches(2**16, columns=[column], use_threads=False):
            yield from ((uri, label) for label in batch.column(0).unique().to_pylist())


def _row_count(uri: str) -> int:
    with open_parquet(uri) as file:
        return file.metadata.num_rows


def _records(
    uri: str,
    wanted: Wanted,
    expected: tuple[ParquetColumns, list[str] | None],
    labels: dict[Label, int],
    account: Account,
) -> Iterator[SourceImage]:
    columns = expected[0]
    with open_parquet(uri) as file:
        _check_schema(file.schema_arrow, uri, wanted, expected)
        batches = file.iter_batches(BATCH, columns=columns.present(), use_threads=False)
        rows = (row for batch in batches for row in batch.to_pylist())
        for number, row in enumerate(rows):
            name = f"{uri}:{number}"
            label = class_of_label(labels, row[columns.label] if columns.label else None, name)
            image, text = row[columns.image], row[columns.text] if columns.text else None
            data = image.get("bytes") if isinstance(image, dict) else image
            if not isinstance(data, bytes):
                yield broken_image(name, "it has no bytes of an image")
                continue
            try:
                read = partial(caption_of, text, name, account)
                caption = optional_caption(read, wanted.captions, name, account)
            except Refused as error:
                yield broken_image(name, str(error))
                continue
            yield loaded_image(name, label, data, caption)
