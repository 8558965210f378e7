"""Shards: tar files of images that WebDataset reads, and the facts about them.

A sample is `<key>.png` and `<key>.cls`. The same source and settings give the same bytes: keys count up, the
members of a tar carry no time and no owner. The held-out images, the real ones of every evaluation, are drawn
at random by the seed and kept in shards of their own.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError
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
    held = _held_out(len(source.records), config.data.holdout, config.seed)
    splits: dict[str, list[Record]] = {TRAIN: [], HOLDOUT: []}
    for index, record in enumerate(source.records):
        splits[HOLDOUT if index in held else TRAIN].append(record)
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
        except (
            UnidentifiedImageError,
            OSError,
            SyntaxError,
            ValueError,
            Image.DecompressionBombError,
        ) as error:
            tally.broken.append(f"{record.name}: {str(error).splitlines()[0]}")
            if len(tally.broken) > config.data.max_broken:
                raise Refused(
                    f"{len(tally.broken)} files are no readable images, more than data.max_broken allows "
                    f"({config.data.max_broken}): {'; '.join(tally.broken[:3])}; remove them or raise --data.max-broken"
                ) from None


def _write_split(
    split: str, images: Iterator[tuple[Image.Image, int]], per_shard: int, folder: Path, tally: Tally
) -> None:
    writer = None
    for index, (image, label) in enumerate(images):
        if index % per_shard == 0:
            if writer:
                writer.close()
            name = f"{split}-{index // per_shard:05d}.tar"
            writer = TarWriter(str(folder / name), user="", group="", mtime=0.0, encoder=False)
            tally.shards.append({"file": name, "split": split, "images": 0})
        assert writer is not None
        writer.write({"__key__": f"{index:09d}", "png": _png(image), "cls": str(label).encode()})
        tally.shards[-1]["images"] += 1
        tally.images[split] += 1
        tally.histogram[label] += 1
    if writer:
        writer.close()


def _held_out(total: int, count: int, seed: int) -> set[int]:
    return set(np.random.default_rng(seed).permutation(total)[:count].tolist())


def _png(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format="PNG")
    return stream.getvalue()
