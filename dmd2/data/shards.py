"""Writing shards: tar files that WebDataset reads.

A source is divided into units of work: ranges of a listing that is shuffled once with the seed, or whole archives. A unit becomes one
or more shards of each split, independently of the others. So any number of processes and machines writes the same bytes, and interrupted
work continues with the units that have no result file yet. A sample is `<key>.png`, `<key>.cls` and, if there is a caption,
`<key>.txt`; members of a tar have no time and no owner.
"""

from __future__ import annotations

import hashlib
import io
import multiprocessing
import os
import signal
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from PIL import Image
from pydantic import BaseModel
from webdataset import TarWriter

from dmd2.config import Config, DataConfig
from dmd2.data.decode import prepare_image
from dmd2.data.lmdb_table import Column, TableWriter
from dmd2.data.loader import TarShard, decode_array
from dmd2.data.sources import Source, SourceImage
from dmd2.errors import Interrupted, Refused, brief
from dmd2.io.artifact import MANIFEST, ArtifactFile
from dmd2.io.staging import Draft
from dmd2.io.storage import move_file, open_store
from dmd2.io.store import Store
from dmd2.progress import Progress

SPLITS = TRAIN, HOLDOUT = "train", "holdout"
RESULTS, DIGESTS, TARS = ".units", ".digests", ".tars"
COMPRESSION = {"compress_level": 1, "compress_type": zlib.Z_RLE}
"""PNG settings: half the time of Pillow's defaults, for the same size with photographs and a few per cent more with drawings."""


@dataclass(frozen=True)
class Unit:
    """A unit of work: images that one process reads from start to end."""

    number: int
    records: Callable[[], Iterator[SourceImage]]
    holdout: int
    """Number of its first images that are held out."""
    size: int | None
    """Number of images, if known."""


class ShardInfo(BaseModel):
    """One tar file."""

    file: str
    split: str
    images: int = 0
    size: int = 0
    """Bytes."""
    sha256: str = ""
    crc32c: str = ""
    """Hexadecimal."""
    histogram: dict[int, int] = {}
    """Images by class."""


class UnitResult(BaseModel):
    """The result of one unit. It is written after the unit's shards are in their final place."""

    shards: list[ShardInfo] = []
    broken: list[str] = []
    """Names of unreadable images, with the reason."""
    dropped: dict[str, int] = {}
    """Number of images left out by a filter, by reason."""
    profiles: dict[str, int] = {}
    """Number of images with a colour profile, by what was done with it."""


@dataclass(frozen=True)
class ShardingJob:
    """Settings that the worker processes share."""

    data: DataConfig
    resolution: int
    channels: int
    folder: Path
    store: Store
    duplicates: dict[int, AbstractSet[int]] = field(default_factory=dict)
    """By number of the unit: indices of the images to leave out."""


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
        return _shuffled_units(source.records, config)
    if source.count is not None and data.holdout >= source.count:
        raise _holdout_too_large(data.holdout, source.count)
    count = len(source.archives)
    shares = [data.holdout * (n + 1) // count - data.holdout * n // count for n in range(count)]
    return [Unit(n, archive.records, shares[n], None) for n, archive in enumerate(source.archives)]


def _shuffled_units(records: Sequence[SourceImage], config: Config) -> list[Unit]:
    """Units of a listing that is shuffled once, so that every unit is a random sample of the source."""
    data, order = config.data, np.random.default_rng(config.seed).permutation(len(records))
    if data.holdout >= len(records):
        raise _holdout_too_large(data.holdout, len(records))
    held_out, rest = order[: data.holdout], order[data.holdout :]
    pieces = [
        (part[start : start + data.images_per_shard], keep)
        for part, keep in ((rest, 0), (held_out, data.images_per_shard))
        for start in range(0, len(part), data.images_per_shard)
    ]

    def opened(indices: np.ndarray) -> Iterator[SourceImage]:
        return (records[i] for i in indices)

    return [Unit(n, partial(opened, piece), keep, len(piece)) for n, (piece, keep) in enumerate(pieces)]


def write_shards(
    source: Source, config: Config, draft: Draft, workers: int, part: tuple[int, int] = (0, 1)
) -> list[UnitResult]:
    """Write the shards of every unit of this part that has no result file yet, and return the results of the part."""
    units = split_into_units(source, config)
    channels, resolution, _ = config.family.image
    job = ShardingJob(config.data, resolution, channels, *_output_folder_and_store(config.data, draft))
    job.duplicates.update(_find_duplicates(units, job, workers, part) if config.data.drop_duplicates else {})
    mine = units[part[0] :: part[1]]
    results = {
        n: UnitResult.model_validate_json(text) for n, text in read_unit_files(job.store, RESULTS).items()
    }
    missing = [unit for unit in mine if unit.number not in results]
    label = f"shard, part {part[0]} of {part[1]}" if part[1] > 1 else "shard"
    _check_broken(list(results.values()), config.data.max_broken)
    for unit, text in _run_in_processes(label, write_unit, missing, job, workers):
        results[unit.number] = UnitResult.model_validate_json(text)
        _check_broken(list(results.values()), config.data.max_broken)
    return [results[unit.number] for unit in mine]


def summarize(results: list[UnitResult], classes: int) -> dict[str, Any]:
    """Counts for the manifest: images by split and class, unreadable and filtered ones."""
    images: Counter[str] = Counter()
    histogram: Counter[int] = Counter()
    dropped: Counter[str] = Counter()
    profiles: Counter[str] = Counter()
    for result in results:
        dropped.update(result.dropped)
        profiles.update(result.profiles)
        for shard in result.shards:
            images[shard.split] += shard.images
            histogram.update(shard.histogram)
    return {
        "train": images[TRAIN],
        "holdout": images[HOLDOUT],
        "histogram": [histogram[label] for label in range(classes)],
        "broken": [name for result in results for name in result.broken],
        "dropped": dict(sorted(dropped.items())),
        "colour_profiles": dict(sorted(profiles.items())),
    }


def register_shards(results: list[UnitResult], config: Config, draft: Draft) -> list[dict[str, Any]]:
    """Add the shards, which are already in their final place, to the draft's files; return their entries for the manifest."""
    shards = [shard for result in results for shard in result.shards]
    if not any(shard.split == TRAIN for shard in shards):
        raise Refused("no image of the source could be used for training; nothing was written")
    if config.data.format == "lmdb":
        return [
            _write_table(split, [s for s in shards if s.split == split], config, draft) for split in SPLITS
        ]
    files = [ArtifactFile(path=shard.file, size=shard.size, sha256=shard.sha256) for shard in shards]
    draft.stored_files += files
    return [shard.model_dump(exclude={"size", "sha256"}) for shard in shards]


def _output_folder_and_store(data: DataConfig, draft: Draft) -> tuple[Path, Store]:
    """The folder in which shards are written and the store in which they end up; for LMDB tables, a hidden folder."""
    if data.format == "tar":
        return draft.path, draft.store
    hidden = draft.path / TARS
    hidden.mkdir(exist_ok=True)
    return hidden, open_store(hidden)


def _write_table(split: str, shards: list[ShardInfo], config: Config, draft: Draft) -> dict[str, Any]:
    """The samples of a split in one LMDB table."""
    name = f"{split}.lmdb"
    columns = {
        "image": Column("uint8", config.family.image),
        "label": Column("int64"),
        "text": Column("text"),
    }
    (draft.path / name).unlink(missing_ok=True)
    with TableWriter(draft.path / name, columns) as table:
        for shard in shards:
            tar = TarShard(draft.path / TARS / shard.file)
            for index in range(len(tar)):
                sample = tar.sample(index)
                table.append({"image": decode_array(sample.data), "label": sample.label, "text": sample.text})
    return {"file": name, "split": split, "images": sum(shard.images for shard in shards)}


def write_unit(unit: Unit, job: ShardingJob, count: ReportProgress) -> str:
    """Write the shards of a unit, then its result file."""
    result, held_out, profiles = UnitResult(), 0, Counter[str]()
    data, max_pixels = job.data, int(job.data.max_megapixels * 1e6)
    writers = {split: SplitWriter(split, unit.number, job) for split in (TRAIN, HOLDOUT)}
    duplicates = job.duplicates.get(unit.number, frozenset())
    try:
        for index, record in enumerate(unit.records()):
            try:
                file = record.read()
                count(1, len(file))
                image = record.decode(file, max_pixels)
                if reason := "duplicate" if index in duplicates else _rejection_reason(image, data):
                    result.dropped[reason] = result.dropped.get(reason, 0) + 1
                    continue
                png = _encode_png(
                    prepare_image(image, job.resolution, job.channels, data.filter, data.background, profiles)
                )
            except Exception as error:  # the decoders raise anything on a broken file
                if _is_system_error(error):
                    raise
                result.broken.append(f"{record.name}: {brief(error)}")
                continue
            writer = writers[HOLDOUT if held_out < unit.holdout else TRAIN]
            held_out += 1
            writer.add(f"{unit.number:06d}-{index:07d}", png, record)
        for writer in writers.values():
            writer.finish()
    finally:
        for writer in writers.values():
            writer.discard()
    result.shards += [shard for writer in writers.values() for shard in writer.shards]
    result.profiles = dict(profiles)
    text = result.model_dump_json()
    job.store.write(f"{RESULTS}/{unit.number:06d}.json", text.encode())
    return text


class SplitWriter:
    """Writes the shards of one split of a unit, one at a time."""

    def __init__(self, split: str, unit: int, job: ShardingJob) -> None:
        self.split, self.unit, self.job = split, unit, job
        self.shards: list[ShardInfo] = []
        self.open: ShardWriter | None = None

    def add(self, key: str, png: bytes, record: SourceImage) -> None:
        self.open = self.open or self._begin()
        sample = {"png": png, "cls": str(record.label).encode()}
        self.open.add(key, sample | ({"txt": record.text.encode()} if record.text else {}))
        shard, data = self.shards[-1], self.job.data
        shard.images += 1
        shard.histogram[record.label] = shard.histogram.get(record.label, 0) + 1
        if shard.images >= data.images_per_shard or self.open.file.size >= data.shard_mb * 1e6:
            self.finish()

    def finish(self) -> None:
        """Close the open shard, if there is one, and move it to its final place."""
        if self.open:
            self.shards[-1] = self.shards[-1].model_copy(update=self.open.close())
            self.open = None

    def discard(self) -> None:
        """Delete the open shard, if there is one."""
        if self.open:
            self.open.discard()
            self.open = None

    def _begin(self) -> ShardWriter:
        name = f"{self.split}-{self.unit:06d}-{len(self.shards):03d}.tar"
        self.shards.append(ShardInfo(file=name, split=self.split))
        return ShardWriter(name, self.job.folder, self.job.store)


class ShardWriter:
    """Writes one tar file in a local folder and computes its size and checksums; then it is closed or discarded."""

    def __init__(self, name: str, folder: Path, store: Store) -> None:
        self.name, self.store = name, store
        self.file = HashingFile(folder / f".{name}.{os.getpid()}.partial")
        self.writer = TarWriter(self.file, user="", group="", mtime=0, encoder=False)

    def add(self, key: str, sample: dict[str, bytes]) -> None:
        """Write the members of a sample, `<key>.<suffix>`, sorted by suffix."""
        self.writer.write({"__key__": key} | sample)

    def close(self) -> dict[str, Any]:
        """Move the file to its final place, and return its size and checksums."""
        self.writer.close()
        self.file.close()
        if not self.store.local_folder and self.store.version(MANIFEST):
            raise Refused(f"{self.store.uri} was finished by others meanwhile; there is nothing left to do")
        move_file(self.file.path, self.name, self.store)
        return self.file.facts()

    def discard(self) -> None:
        with suppress(ValueError, OSError):  # already closed, or no room for the end of it
            self.writer.close()
        self.file.close()
        self.file.path.unlink(missing_ok=True)


class HashingFile:
    """A file whose size, SHA-256 and crc32c are computed while it is written."""

    def __init__(self, path: Path) -> None:
        self.path, self.size = path, 0
        self.file = path.open("wb")
        self.sha256, self.crc32c = hashlib.sha256(), google_crc32c.Checksum()

    def write(self, data: bytes) -> int:
        self.size += len(data)
        self.sha256.update(data)
        self.crc32c.update(bytes(data))
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()

    def close(self) -> None:
        self.file.close()

    def facts(self) -> dict[str, Any]:
        return {
            "size": self.size,
            "sha256": self.sha256.hexdigest(),
            "crc32c": self.crc32c.hexdigest().decode(),
        }


def _rejection_reason(image: Image.Image, data: DataConfig) -> str:
    """The reason why a filter leaves the image out; empty if none does."""
    short, long = min(image.size), max(image.size)
    if short < data.min_side:
        return f"shorter side below {data.min_side} pixels"
    if data.max_aspect and long > data.max_aspect * short:
        return f"sides beyond {data.max_aspect:g} to 1"
    return ""


def _encode_png(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format="PNG", **COMPRESSION)
    return stream.getvalue()


def _find_duplicates(
    units: list[Unit], job: ShardingJob, workers: int, part: tuple[int, int]
) -> dict[int, set[int]]:
    """By number of the unit: indices of images whose bytes equal those of an earlier one. Parts that run in parallel share the reading."""
    for mine in (units[part[0] :: part[1]], units):
        there = read_unit_files(job.store, DIGESTS)
        missing = [unit for unit in mine if unit.number not in there]
        for _ in _run_in_processes("look for duplicates", hash_unit, missing, job, workers):
            pass
    digests = [there for _, there in sorted(read_unit_files(job.store, DIGESTS).items())]
    table = np.frombuffer(b"".join(digests), dtype="V16")
    repeated = np.ones(len(table), dtype=bool)
    repeated[np.unique(table, return_index=True)[1]] = False  # the first of each
    starts = np.cumsum([0, *(len(text) // 16 for text in digests)])
    return {
        unit.number: set(np.flatnonzero(repeated[starts[n] : starts[n + 1]]).tolist())
        for n, unit in enumerate(units)
    }


def hash_unit(unit: Unit, job: ShardingJob, count: ReportProgress) -> str:
    """Write the first 16 bytes of each image's SHA-256; an unreadable image gets a unique value."""
    digests = bytearray()
    for record in unit.records():
        try:
            data = record.read()
        except Exception as error:  # it is reported when the shard is written
            if _is_system_error(error):
                raise
            data = f"unreadable {unit.number} {len(digests)}".encode()
        digests += hashlib.sha256(data).digest()[:16]
        count(1, len(data))
    job.store.write(f"{DIGESTS}/{unit.number:06d}", bytes(digests))
    return ""


def _is_system_error(error: Exception) -> bool:
    """Whether an image could not be read because of the disk, the bucket or the memory, and not because of its content."""
    return isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno is not None)


def read_unit_files(store: Store, folder: str) -> dict[int, bytes]:
    """{number of the unit: content} of the files that were written for units in this folder."""
    names = [
        entry.name
        for entry in store.list_objects(f"{folder}/")
        if not entry.name.split("/")[-1].startswith(".")
    ]
    with ThreadPoolExecutor(max_workers=16) as pool:
        return {
            int(Path(name).stem): text for name, text in zip(names, pool.map(store.read, names), strict=True)
        }


def _check_broken(results: Sequence[UnitResult], limit: int) -> None:
    broken = [name for result in results for name in result.broken]
    if len(broken) > limit:
        raise Refused(
            f"{len(broken)} files are no readable images, more than data.max_broken allows "
            f"({limit}): {'; '.join(broken[:3])}; remove them or raise --data.max-broken"
        )


def _holdout_too_large(holdout: int, count: int) -> Refused:
    return Refused(f"data.holdout is {holdout}, the source has only {count} images; hold out fewer")


# The workers are forked, so that the source does not have to be pickled.

_forked: tuple[Task, list[Unit], ShardingJob, Any] | None = None


def _run_in_processes(
    label: str, task: Task, units: list[Unit], job: ShardingJob, workers: int
) -> Iterator[tuple[Unit, str]]:
    """Run the task for each unit in several processes; yield (unit, result) as they complete."""
    global _forked
    if not units:
        return
    sizes = [unit.size for unit in units]
    known = all(size is not None for size in sizes)
    total, word = (sum(size or 0 for size in sizes), "images") if known else (len(units), "archives")
    context = multiprocessing.get_context("fork")
    counts = context.Array("q", 2)
    _forked = task, units, job, counts
    with (
        Progress(label, total, word) as progress,
        ProcessPoolExecutor(
            min(workers, len(units)), context, initializer=_end_with_parent, initargs=(os.getpid(),)
        ) as pool,
    ):
        start, reported, finished = time.monotonic(), 0, 0
        waiting = {pool.submit(_run_unit, n): unit for n, unit in enumerate(units)}
        try:
            while waiting:
                done, _ = wait(waiting, timeout=0.5, return_when=FIRST_COMPLETED)
                finished += len(done)
                images, size = counts[:]
                speed = size / 1e6 / max(1e-9, time.monotonic() - start)
                reached = images if known else finished
                progress.advance(reached - reported, f"{images} images, {speed:.1f} MB/s")
                reported = reached
                for future in done:
                    yield waiting.pop(future), future.result()
        except BrokenProcessPool:
            raise Interrupted(
                "a worker was killed, perhaps because memory ran out; the same command goes on, and with fewer "
                "--workers it needs less",
                75,
            ) from None
        except BaseException:
            for process in list((pool._processes or {}).values()):
                process.terminate()
            raise


def _run_unit(number: int) -> str:
    assert _forked is not None
    task, units, job, counts = _forked

    def count(images: int, size: int) -> None:
        with counts.get_lock():
            counts[0] += images
            counts[1] += size

    return task(units[number], job, count)


def _end_with_parent(parent: int) -> None:
    """In a worker: ignore Ctrl-C, which the parent handles, and exit when the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
