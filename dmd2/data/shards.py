"""Shards: tar files of images that WebDataset reads, and the facts about them.

A sample is `<key>.png` and `<key>.cls`. The same source and settings give the same bytes: keys count up, the
members of a tar carry no time and no owner. The seed shuffles the images once; the first of them, the real ones of
every evaluation, are held out in shards of their own.
"""

from __future__ import annotations

import io
import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from webdataset import TarWriter

from dmd2.config import Config
from dmd2.data.sources import Record, Source, prepare
from dmd2.errors import Refused
from dmd2.progress import Progress

TRAIN, HOLDOUT = "train", "holdout"


@dataclass
class Tally:
    """What became of the records."""

    images: Counter[str] = field(default_factory=Counter)
    """Images by split."""
    histogram: Counter[int] = field(default_factory=Counter)
    """Images by class."""
    broken: list[str] = field(default_factory=list)
    """Unreadable records, with the reason."""
    shards: list[dict[str, Any]] = field(default_factory=list)
    """For each shard its file, split and number of images."""


def write_shards(source: Source, config: Config, folder: Path) -> Tally:
    """Write both splits below `folder`."""
    network = config.family.network
    if len(source.classes) > network.classes:
        raise Refused(
            f"the source has {len(source.classes)} classes, the network of recipe {config.recipe!r} knows "
            f"{network.classes}; set --family.network.classes {len(source.classes)} or drop classes"
        )
    if config.data.holdout >= len(source.records):
        raise Refused(
            f"data.holdout is {config.data.holdout}, the source has only {len(source.records)} images; hold out fewer"
        )
    # Shuffled once here, so that any run of samples is a fair sample of the whole.
    order = np.random.default_rng(config.seed).permutation(len(source.records))
    held, rest = order[: config.data.holdout], order[config.data.holdout :]
    splits = {TRAIN: [source.records[i] for i in rest], HOLDOUT: [source.records[i] for i in held]}
    tally = Tally()
    with Progress("shard", len(source.records), "images") as progress:
        for split, records in splits.items():
            _write_split(
                split,
                _readable(records, config, tally, progress),
                config.data.images_per_shard,
                folder,
                tally,
            )
    if not tally.images[TRAIN]:
        raise Refused("no image of the source could be read; nothing was written")
    return tally


def _readable(
    records: list[Record], config: Config, tally: Tally, progress: Progress
) -> Iterator[tuple[Image.Image, int]]:
    """The images that can be read, prepared; the others are named in the tally, up to the limit."""
    network = config.family.network
    for record in records:
        progress.advance()
        try:
            yield prepare(record.open(), network.resolution, network.image_channels), record.label
        except Exception as error:  # the decoders raise anything on a broken file
            tally.broken.append(f"{record.name}: {' '.join(str(error).split()) or type(error).__name__}")
            if len(tally.broken) > config.data.max_broken:
                raise Refused(
                    f"{len(tally.broken)} files are no readable images, more than data.max_broken allows "
                    f"({config.data.max_broken}): {'; '.join(tally.broken[:3])}; remove them or raise --data.max-broken"
                ) from None


def _write_split(
    split: str, images: Iterator[tuple[Image.Image, int]], per_shard: int, folder: Path, tally: Tally
) -> None:
    for number, first in enumerate(images):  # the inner loop takes the rest of the shard
        name = f"{split}-{number:05d}.tar"
        tally.shards.append({"file": name, "split": split, "images": 0})
        with TarWriter(str(folder / name), user="", group="", mtime=0.0, encoder=False) as writer:
            for image, label in itertools.chain([first], itertools.islice(images, per_shard - 1)):
                key = f"{tally.images[split]:09d}"
                writer.write({"__key__": key, "png": _png(image), "cls": str(label).encode()})
                tally.shards[-1]["images"] += 1
                tally.images[split] += 1
                tally.histogram[label] += 1


def _png(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format="PNG")
    return stream.getvalue()
