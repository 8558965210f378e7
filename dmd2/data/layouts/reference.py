"""The LMDB of images and labels that the DMD2 reference code trains on (ImageNet-64)."""

from __future__ import annotations

import math
import os
from functools import cache, partial
from pathlib import Path

import numpy as np
from PIL import Image

from dmd2.data.decode import MAX_PIXELS, check_pixels
from dmd2.data.listing import Listing, find_one
from dmd2.data.reference_lmdb import ReferenceLmdb
from dmd2.data.sources import Source, SourceImage, class_names, classes_of_labels
from dmd2.errors import Refused
from dmd2.io.storage import fetch_file

PATTERN_LMDB = r"(.*/)?data\.mdb"
LABEL_BYTES = 8


def reference(listing: Listing) -> Source:
    """`images` uint8 (N, C, H, W) and `labels` int64 (N,) in a data.mdb."""
    name = find_one(listing, PATTERN_LMDB, "data.mdb")
    where, path = listing.uri(name), fetch_file(listing.uri(name))
    table = _table(path, os.getpid())
    count, *shape = table.shape("images") or (0,)
    if len(shape) != 3 or shape[0] not in (1, 3):
        raise Refused(
            f"{where} holds no images (N, 1 or 3, H, W); make shards of latents, or pairs, with dmd2 convert"
        )
    labels = [_label(table, row) for row in range(count)] if table.shape("labels") else [0] * count
    classes = classes_of_labels((f"{where}:{row}", label) for row, label in enumerate(labels))
    decode = partial(_image_of_planes, shape=tuple(shape))
    records = [
        SourceImage(f"{where}:{row}", label, partial(_planes, path, row, math.prod(shape)), decode=decode)
        for row, label in enumerate(labels)
    ]
    lock = name.removesuffix("data.mdb") + "lock.mdb"
    account = listing.account({name: "tables of images", lock: "lock files of tables"})
    return Source(class_names(classes), listing.fingerprint, records, account=account)


@cache
def _table(path: Path, process: int) -> ReferenceLmdb:
    return ReferenceLmdb.open(path)


def _label(table: ReferenceLmdb, row: int) -> int:
    return int.from_bytes(table.row("labels", row, LABEL_BYTES), "little", signed=True)


def _planes(path: Path, row: int, size: int) -> bytes:
    return _table(path, os.getpid()).row("images", row, size)


def _image_of_planes(data: bytes, max_pixels: int = MAX_PIXELS, *, shape: tuple[int, ...]) -> Image.Image:
    """An image of its planes, uint8 (C, H, W)."""
    check_pixels((shape[2], shape[1]), max_pixels)
    pixels = np.frombuffer(data, np.uint8).reshape(shape).transpose(1, 2, 0)
    return Image.fromarray(pixels[:, :, 0] if shape[0] == 1 else pixels)
