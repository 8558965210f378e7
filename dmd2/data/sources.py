"""What a source of images is, and what layouts have in common: images with a name, a class and a caption.

A listing can be read in any order, an archive only from start to end. An image is read when it is needed, in any process, so that
a broken file affects only itself. Nothing is extracted to disk, and nothing that could run code is unpickled.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from dmd2.data.archives import (
    Pixels,
)
from dmd2.data.decode import MAX_PIXELS, Decode, check_pixels, decode_image
from dmd2.data.listing import Listing
from dmd2.errors import Refused
from dmd2.io.storage import join_uri

MAX_CLASSES = 2**16
"""A larger number is not accepted as a class label."""
Label = int | str | None


@dataclass(frozen=True, slots=True)
class SourceImage:
    name: str
    """Address of the image, for messages."""
    label: int
    read: Callable[[], bytes]
    """Returns the encoded file, or raw pixels; exact duplicates have the same bytes."""
    text: str = ""
    """Caption."""
    decode: Decode = decode_image


@dataclass(frozen=True)
class Archive:
    name: str
    records: Callable[[], Iterator[SourceImage]]
    """Opens the archive and yields its images, always in the same order."""


@dataclass(frozen=True)
class Source:
    classes: list[str]
    """Names of the classes; a label is an index into it. A single `""` when there are none."""
    fingerprint: str
    """Changes when the files change; shards are only reused for the same fingerprint."""
    records: Sequence[SourceImage] = ()
    """A listing, whose images can be read in any order."""
    archives: Sequence[Archive] = ()
    """Or archives, each of which is read from start to end."""
    count: int | None = None
    """Number of images in the archives, if it is known without reading them."""


class ListedImage(NamedTuple):
    """Name, label and caption of an image of a listing."""

    name: str
    label: Label
    text: str


def check_caption(text: object, where: str) -> str:
    if not isinstance(text, str):
        raise Refused(f"{where} has {reprlib.repr(text)} for a caption; give a string")
    return text


def source_of_listing(
    listing: Listing, rows: Sequence[ListedImage], read: Callable[[str], bytes], root: str = ""
) -> Source:
    root = root or listing.store.uri
    if not rows:
        raise Refused(f"{root} holds no images; the layout {listing.layout} expects some")
    labels = classes_of_labels((join_uri(root, row.name), row.label) for row in rows)
    records = [
        SourceImage(join_uri(root, n), labels[label], partial(read, n), text) for n, label, text in rows
    ]
    return Source(class_names(labels), listing.fingerprint, records)


def classes_of_labels(found: Iterable[tuple[str, Any]]) -> dict[Label, int]:
    """{label: class}. Numbers are used as classes; names are numbered in alphabetical order.

    Args:
        found: (address, label) of the labels, for error messages.
    """
    first: dict[Label, str] = {}
    for where, label in found:
        if not isinstance(label, Label):
            raise Refused(f"{where} has label {reprlib.repr(label)}; give a number or a name")
        first.setdefault(label, where)
    if first.keys() <= {None}:
        return {None: 0}
    numbers = [label for label in first if isinstance(label, int)]
    names = [label for label in first if isinstance(label, str)]
    if None in first:
        raise Refused(
            f"{first[None]} has no label, though others have ({len(first) - 1} classes); label all images or none"
        )
    if numbers and names:
        raise Refused(
            f"{first[names[0]]} has label {names[0]!r}, others are numbers like {numbers[0]}; use one kind"
        )
    for label in numbers:
        if not 0 <= label < MAX_CLASSES:
            raise Refused(
                f"{first[label]} has label {label}; labels count from 0 to at most {MAX_CLASSES - 1}"
            )
    order: Sequence[Label] = sorted(names) or range(max(numbers) + 1)
    return {label: index for index, label in enumerate(order)}


def class_names(labels: dict[Label, int]) -> list[str]:
    return ["" if label is None else str(label) for label in labels]


def class_of_label(labels: dict[Label, int], label: Label, where: str) -> int:
    """The class of a label; a label that the source did not declare is refused."""
    if isinstance(label, Label) and label in labels:
        return labels[label]
    if label is None:
        raise Refused(
            f"{where} has no label, though there are {len(labels)} classes; label all images or none"
        )
    known = "its source has no labels" if None in labels else f"there are {len(labels)} classes"
    raise Refused(f"{where} has label {reprlib.repr(label)}, but {known}; correct the label")


def source_of_arrays(where: str, images: Pixels, labels: list[int] | None, fingerprint: str) -> Source:
    """A source of pixels in memory, which forked processes share."""
    if (
        images.dtype != np.uint8
        or images.ndim not in (3, 4)
        or (images.ndim == 4 and images.shape[3] not in (1, 3, 4))
    ):
        raise Refused(
            f"{where}: images are {images.dtype} {images.shape}; give uint8 (N, H, W) or (N, H, W, 1, 3 or 4)"
        )
    if labels is not None and len(labels) != len(images):
        raise Refused(f"{where}: {len(images)} images have {len(labels)} labels; give one each")
    if not len(images):
        raise Refused(f"{where} holds no images; give at least one")
    classes = classes_of_labels((f"{where}:{i}", label) for i, label in enumerate(labels or [None]))
    decode = partial(
        _image_of_pixels, shape=images.shape[1:3] if images.shape[3:] == (1,) else images.shape[1:]
    )
    records = [
        SourceImage(
            f"{where}:{i}", labels[i] if labels else 0, partial(_pixel_bytes, images, i), decode=decode
        )
        for i in range(len(images))
    ]
    return Source(class_names(classes), fingerprint, records)


def _pixel_bytes(images: Pixels, index: int) -> bytes:
    return images[index].tobytes()


def _image_of_pixels(data: bytes, max_pixels: int = MAX_PIXELS, *, shape: tuple[int, ...]) -> Image.Image:
    check_pixels((shape[1], shape[0]), max_pixels)
    return Image.fromarray(np.frombuffer(data, np.uint8).reshape(shape))


def loaded_image(name: str, label: int, data: bytes, text: str = "") -> SourceImage:
    return SourceImage(name, label, partial(bytes, data), text)


def broken_image(name: str, why: str) -> SourceImage:
    """An image that is reported as unreadable when it is read."""
    return SourceImage(name, 0, partial(_raise_refused, why))


def _raise_refused(why: str) -> bytes:
    raise Refused(why)
