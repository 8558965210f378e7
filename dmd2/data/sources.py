"""What a source of images is, and what layouts have in common: images with a name, a class and a caption.

A listing can be read in any order, an archive only from start to end. An image is read when it is needed, in any process, so that
a broken file affects only itself. Nothing is extracted to disk, and nothing that could run code is unpickled.
"""

from __future__ import annotations

import re
import reprlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, overload
from unicodedata import normalize

import numpy as np
from PIL import Image

from dmd2.data.account import Account
from dmd2.data.archives import Pixels
from dmd2.data.captions import LONE_SURROGATES
from dmd2.data.decode import MAX_PIXELS, Decode, check_pixels, decode_image
from dmd2.data.listing import Listing, read_file
from dmd2.errors import Refused
from dmd2.io.storage import join_uri

NUMBER = re.compile(r"-?[0-9]{1,9}(\.0+)?")
"""A name of a class that is a number."""
NOT_CLASSES = "images in folders that are not used as classes"
UNUSED_CAPTION = "captions that cannot be read and are not needed"
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
    read_text: Callable[[Account], str] | None = None
    """Reads the caption from a file of its own; what is not used of it is added to the account."""
    decode: Decode = decode_image

    def caption(self, account: Account) -> str:
        return self.read_text(account) if self.read_text else self.text


@dataclass(frozen=True)
class Archive:
    name: str
    records: Callable[[Account], Iterator[SourceImage]]
    """Opens the archive and yields its images, always in the same order. What is no image is added to the account."""


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
    account: Account = field(default_factory=Account)
    """The files of the source that are no images of a listing, and what is not used."""


class ListedImage(NamedTuple):
    """Name, label and caption of an image of a listing."""

    name: str
    label: Label = None
    text: str = ""
    read_text: Callable[[Account], str] | None = None


class ListedImages(Sequence[SourceImage]):
    """The images of a listing, in about 60 bytes each: a `SourceImage` is made when it is asked for."""

    def __init__(
        self,
        root: str,
        rows: Sequence[ListedImage],
        labels: Mapping[Label, int],
        read: Callable[[str], bytes],
    ) -> None:
        self.root, self.read = root, read
        self.labels = array("i", (labels[normal_label(row.label)] for row in rows))
        self.texts = {index: row.text for index, row in enumerate(rows) if row.text}
        self.captions = {index: row.read_text for index, row in enumerate(rows) if row.read_text}
        self._names, self._ends = bytearray(), array("q")
        for row in rows:
            self._names += row.name.encode("utf-8", "surrogatepass")
            self._ends.append(len(self._names))

    def __len__(self) -> int:
        return len(self.labels)

    @overload
    def __getitem__(self, index: int) -> SourceImage: ...

    @overload
    def __getitem__(self, index: slice) -> list[SourceImage]: ...

    def __getitem__(self, index: int | slice) -> SourceImage | list[SourceImage]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        stored = self._names[self._ends[index - 1] if index else 0 : self._ends[index]]
        name = stored.decode("utf-8", "surrogatepass")
        read, text = partial(self.read, name), self.texts.get(index, "")
        return SourceImage(
            join_uri(self.root, name), self.labels[index], read, text, self.captions.get(index)
        )


def source_of_listing(
    listing: Listing,
    rows: Sequence[ListedImage],
    account: Account,
    read: Callable[[str], bytes] | None = None,
    root: str = "",
) -> Source:
    root, read = root or listing.store.uri, read or partial(read_file, listing.store, listing.dangling)
    if not rows:
        raise Refused(
            f"{root} holds no images; the layout {listing.layout} expects some ({'; '.join(account.lines()[2:5]) or 'it is empty'})"
        )
    if listing.wanted.labels:
        labels = classes_of_labels((join_uri(root, row.name), row.label) for row in rows)
    else:
        if count := sum(row.label is not None for row in rows):
            account.remark("labels that are not used, because the network is told by texts", count=count)
        labels, rows = {None: 0}, [row._replace(label=None) for row in rows]
    return Source(
        class_names(labels), listing.fingerprint, ListedImages(root, rows, labels, read), account=account
    )


def classes_of_labels(found: Iterable[tuple[str, Any]]) -> dict[Label, int]:
    """{label: class}. Numbers are used as classes; names are numbered in alphabetical order. Names that are all decimal are numbers.

    Args:
        found: (address, label) of the labels, for error messages.
    """
    first: dict[Label, str] = {}
    for where, label in ((where, normal_label(label)) for where, label in found):
        if not isinstance(label, Label):
            raise Refused(f"{where} has label {reprlib.repr(label)}; give a number or a name")
        first.setdefault(label, where)
    if first.keys() <= {None}:
        return {None: 0}
    names = [label for label in first if isinstance(label, str)]
    if None in first:
        raise Refused(
            f"{first[None]} has no label, though others have ({len(first) - 1} classes); label all images or none"
        )
    if names and len(names) < len(first):
        number = next(label for label in first if not isinstance(label, str))
        raise Refused(
            f"{first[names[0]]} has label {names[0]!r}, others are numbers like {number}; use one kind"
        )
    for name in names:
        if LONE_SURROGATES.search(name):
            raise Refused(f"{first[name]}: the name of its class is not in UTF-8; rename it")
    if names and not all(map(NUMBER.fullmatch, names)):
        return {label: index for index, label in enumerate(sorted(names))}
    numbers: dict[Label, int] = {label: int(str(label).split(".")[0]) for label in first if label is not None}
    _check_numbers(numbers, first)
    return numbers


def normal_label(label: Any) -> Any:
    """A name in one form of Unicode and without white space around it; a whole number instead of a float or a truth value; no label instead of an
    empty name."""
    if isinstance(label, str):
        return normalize("NFC", label.strip()) or None
    if isinstance(label, bool | float) and float(label).is_integer():
        return int(label)
    return label


def _check_numbers(numbers: dict[Label, int], first: dict[Label, str]) -> None:
    taken: dict[int, Label] = {}
    for label, number in numbers.items():
        if not 0 <= number < MAX_CLASSES:
            raise Refused(
                f"{first[label]} has label {label}; labels count from 0 to at most {MAX_CLASSES - 1}"
            )
        if taken.setdefault(number, label) != label:
            raise Refused(
                f"{first[label]} has label {label!r}, another {taken[number]!r}, which is the same number; write one of them"
            )


def class_names(labels: dict[Label, int]) -> list[str]:
    """The names of the classes. A class that no label has is called by its number."""
    names = [str(index) for index in range(max(labels.values()) + 1)]
    for label, index in labels.items():
        names[index] = "" if label is None else str(label)
    return names


def class_of_label(labels: dict[Label, int], label: Label, where: str) -> int:
    """The class of a label; a label that the source did not declare is refused."""
    label = normal_label(label)
    if isinstance(label, Label) and label in labels:
        return labels[label]
    if label is None:
        raise Refused(
            f"{where} has no label, though there are {len(labels)} classes; label all images or none"
        )
    known = "its source has no labels" if None in labels else f"there are {len(labels)} classes"
    raise Refused(f"{where} has label {reprlib.repr(label)}, but {known}; correct the label")


def source_of_arrays(
    where: str,
    images: Pixels,
    labels: list[int] | None,
    fingerprint: str,
    account: Account | None = None,
) -> Source:
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
    return Source(class_names(classes), fingerprint, records, account=account or Account())


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


def optional_caption(read: Callable[[], str], needed: bool, where: str, account: Account) -> str:
    """The caption; one that cannot be read is refused only if it is needed, and else counted."""
    try:
        return read()
    except Refused:
        if needed:
            raise
        account.remark(UNUSED_CAPTION, where)
        return ""


def _raise_refused(why: str) -> bytes:
    raise Refused(why)
