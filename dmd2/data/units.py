"""Units of work of sharding: ranges of a listing that is shuffled once with the seed, or whole archives."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from dmd2.config import Config, DataConfig
from dmd2.data.account import Account
from dmd2.data.shard_table import HOLDOUT, TRAIN
from dmd2.data.sources import Source, SourceImage
from dmd2.errors import Refused
from dmd2.io.store import Store


@dataclass(frozen=True)
class Unit:
    """A unit of work: images that one process reads from start to end."""

    number: int
    records: Callable[[Account], Iterator[SourceImage]]
    """Yields the images; what else the unit has is added to the account."""
    split: str | None
    """Split of its images; None for an archive, where `Selection` says which images are held out."""
    size: int | None
    """Number of images, if known."""


@dataclass
class Selection:
    """Images of archives that are chosen before any shard is written, by number of the unit and index in it."""

    held_out: dict[int, set[int]] = field(default_factory=dict)
    copies: dict[int, set[int]] = field(default_factory=dict)
    """Images to leave out, because their files are equal to an earlier one that is kept, or held out."""


@dataclass(frozen=True)
class ShardingJob:
    """Settings that the worker processes share."""

    data: DataConfig
    resolution: int
    channels: int
    folder: Path
    store: Store
    needs_captions: bool
    """Images without a caption are left out."""
    seed: int
    selection: Selection = field(default_factory=Selection)


ReportProgress = Callable[[int, int], None]
"""(images, bytes) that were read since the last call."""
Task = Callable[[Unit, ShardingJob, ReportProgress], str]


def split_into_units(source: Source, config: Config) -> list[Unit]:
    """Divide a source into units of work."""
    data, known = config.data, len(source.classes)
    if known > config.family.classes:
        raise Refused(
            f"the source has {known} classes, the network of recipe {config.recipe!r} knows "
            f"{config.family.classes}; set --family.network.classes {known} or drop classes"
        )
    if source.records:
        if needs_captions(config) and not any(record.text or record.read_text for record in source.records):
            raise Refused(
                f"none of the {len(source.records)} images of the source has a caption, and the network of recipe "
                f"{config.recipe!r} is told by texts; put captions beside the images (name.txt) or into a metadata.jsonl"
            )
        return _shuffled_units(source.records, config)
    if source.count == 0:
        raise Refused("the archives of the source hold no images; give others")
    if source.count is not None and data.holdout >= source.count:
        raise holdout_too_large(data.holdout, source.count)
    return [Unit(n, archive.records, None, None) for n, archive in enumerate(source.archives)]


def _shuffled_units(records: Sequence[SourceImage], config: Config) -> list[Unit]:
    """Units of a listing that is shuffled once, so that every unit is a random sample of the source."""
    data, order = config.data, np.random.default_rng(config.seed).permutation(len(records))
    if data.holdout >= len(records):
        raise holdout_too_large(data.holdout, len(records))
    by_digest = bool(data.drop_duplicates and data.holdout)  # so many different images are held out
    held_out, rest = (order[:0], order) if by_digest else (order[: data.holdout], order[data.holdout :])
    pieces = [
        (part[start : start + data.images_per_shard], split)
        for part, split in ((rest, None if by_digest else TRAIN), (held_out, HOLDOUT))
        for start in range(0, len(part), data.images_per_shard)
    ]

    def open_images(indices: np.ndarray, account: Account) -> Iterator[SourceImage]:
        return (records[i] for i in indices)

    return [
        Unit(n, partial(open_images, piece), split, len(piece)) for n, (piece, split) in enumerate(pieces)
    ]


def needs_captions(config: Config) -> bool:
    """Whether images without a caption are left out."""
    return config.family.prompts == "texts" and not config.data.allow_empty_captions


def holdout_too_large(holdout: int, count: int, which: str = "") -> Refused:
    return Refused(f"data.holdout is {holdout}, the source has only {count} {which}images; hold out fewer")
