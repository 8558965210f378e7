"""Layouts of image sources: each is a row of `LAYOUTS` and a function in a file of its own, which returns a `Source`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

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

LAYOUTS: dict[str, tuple[str, Callable[[Listing], Source]]] = {
    "edm": (PATTERN_EDM, edm),
    "metadata": (PATTERN_METADATA, metadata),
    "coco": (PATTERN_COCO, coco),
    "imagenet": (r"(.*/)?(n\d{8}|ILSVRC2012_img_train[^/]*)\.tar", imagenet),
    "webdataset": (r".*\.tar", webdataset),
    "parquet": (r".*\.parquet", parquet),
    "lmdb": (PATTERN_LMDB, reference),
    "npz": (r"[^/]*\.npz", npz),
    "idx": (PATTERN_IDX, idx),
    "folder": (r".*", folder),
}
"""Layout -> (regular expression, reader). The first row whose expression matches a file name is the layout of a source."""

WITH_CAPTION_COLUMNS = ("folder", "metadata", "parquet", "webdataset")
WITH_LABEL_COLUMNS = ("metadata", "parquet")


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
        layout = next((row for row, (pattern, _) in LAYOUTS.items() if matching(pattern, names)), "folder")
    _check_columns(layout, wanted)
    return LAYOUTS[layout][1](replace(listing, layout=layout, wanted=wanted))


def _check_columns(layout: str, wanted: Wanted) -> None:
    """Refuse a column that the layout would not read."""
    for setting, column, layouts in (
        ("caption", wanted.caption_column, WITH_CAPTION_COLUMNS),
        ("label", wanted.label_column, WITH_LABEL_COLUMNS),
    ):
        if column and layout not in layouts:
            raise Refused(
                f"data.{setting}_column is {column!r}, and the layout {layout} has no columns of {setting}s; leave it out"
            )
