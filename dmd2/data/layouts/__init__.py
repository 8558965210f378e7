"""Layouts of image sources: each is a row of `LAYOUTS` and a function in a file of its own, which returns a `Source`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

from dmd2.data.decode import IMAGE_SUFFIXES
from dmd2.data.layouts.arrays import PATTERN_IDX, digits, idx, npz
from dmd2.data.layouts.coco import PATTERN_COCO, coco
from dmd2.data.layouts.edm import PATTERN_EDM, edm
from dmd2.data.layouts.folder import folder
from dmd2.data.layouts.imagenet import imagenet
from dmd2.data.layouts.metadata import PATTERN_METADATA, metadata
from dmd2.data.layouts.parquet import parquet
from dmd2.data.layouts.reference import PATTERN_LMDB, reference
from dmd2.data.layouts.webdataset import webdataset
from dmd2.data.listing import Listing, Wanted, list_files, matching
from dmd2.data.sources import Source
from dmd2.errors import Refused


class Layout(NamedTuple):
    pattern: str
    """Regular expression for the names of its files."""
    read: Callable[[Listing], Source]
    columns: tuple[str, ...] = ()
    """Which of `caption` and `label` the user may choose a column or field for."""


BOTH = ("caption", "label")
LAYOUTS: dict[str, Layout] = {
    "edm": Layout(PATTERN_EDM, edm),
    "metadata": Layout(PATTERN_METADATA, metadata, BOTH),
    "coco": Layout(PATTERN_COCO, coco),
    "imagenet": Layout(r"(.*/)?(n\d{8}|ILSVRC2012_img_train[^/]*)\.tar", imagenet),
    "webdataset": Layout(r".*\.tar", webdataset, ("caption",)),
    "parquet": Layout(r".*\.parquet", parquet, BOTH),
    "lmdb": Layout(PATTERN_LMDB, reference),
    "npz": Layout(r"[^/]*\.npz", npz),
    "idx": Layout(PATTERN_IDX, idx),
    "folder": Layout(r".*", folder, ("caption",)),
}
"""The first row whose expression matches a file name is the layout of a source."""


def open_source(address: str, wanted: Wanted = Wanted()) -> Source:  # noqa: B008 - it is frozen
    """Open `digits`, or a folder, file or pattern (`train-*.parquet`), local or remote; `layout:address` names the layout.

    Args:
        wanted: What the network is told of each image.
    """
    if address == "digits":
        return digits()
    known = ["digits", *LAYOUTS]
    layout, colon, rest = address.partition(":")
    if colon and layout in LAYOUTS:
        listing = list_files(rest, known)
    else:
        listing = list_files(address, known)
        names = [entry.name for entry in listing.entries if not entry.name.lower().endswith(IMAGE_SUFFIXES)]
        layout = next(
            name for name, row in LAYOUTS.items() if name == "folder" or matching(row.pattern, names)
        )
    _check_columns(layout, wanted)
    return LAYOUTS[layout].read(replace(listing, layout=layout, wanted=wanted))


def _check_columns(layout: str, wanted: Wanted) -> None:
    """Refuse a column that the layout would not read."""
    for what, column in (("caption", wanted.caption_column), ("label", wanted.label_column)):
        if column and what not in LAYOUTS[layout].columns:
            raise Refused(
                f"data.{what}_column is {column!r}, and the layout {layout} has no columns of {what}s; leave it out"
            )
