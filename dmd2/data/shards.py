"""Writing shards: tar files that WebDataset reads, and the facts about them.

A source is cut into units: pieces of a listing, shuffled once with the seed, or whole archives. A unit becomes one
or more shards of each split, whatever is done with the others: so any number of processes and machines makes the
same bytes, and what was interrupted continues with the units that have no receipt yet. A sample is `<key>.png`,
`<key>.cls` and, if there is a caption, `<key>.txt`; members of a tar carry no time and no owner.
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
from dmd2.data.decode import prepare
from dmd2.data.lmdb_table import Column, Writer
from dmd2.data.loader import Tar, array
from dmd2.data.sources import Record, Source
from dmd2.errors import Interrupted, Refused, brief
from dmd2.io.artifact import MANIFEST, ArtifactFile
from dmd2.io.staging import Draft
from dmd2.io.storage import move_file, open_store
from dmd2.io.store import Store
from dmd2.progress import Progress

SPLITS = TRAIN, HOLDOUT = "train", "holdout"
RECEIPTS, DIGESTS, TARS = ".units", ".digests", ".tars"
COMPRESSION = {"compress_level": 1, "compress_type": zlib.Z_RLE}
"""Of the PNGs: half the time of what is usual, for as many bytes with photographs and a few per cent more with drawings."""


@dataclass(frozen=True)
class Unit:
    """What is read by one process, from start to end."""

    number: int
    records: Callable[[], Iterator[Record]]
    held: int
    """So many of its first images are held out."""
    size: int | None
    """Records, if known."""


class Shard(BaseModel):
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


class Receipt(BaseModel):
    """What became of a unit. It is written once the unit's shards are where they belong."""

    shards: list[Shard] = []
    broken: list[str] = []
    """Unreadable records, with the reason."""
    dropped: dict[str, int] = {}
    """Records left out by a filter, by reason."""


@dataclass(frozen=True)
class Job:
    """All a worker needs to know."""

    data: DataConfig
    resolution: int
    channels: int
    folder: Path
    store: Store
    duplicates: dict[int, AbstractSet[int]] = field(default_factory=dict)
    """By unit, the records to leave out."""


Count = Callable[[int, int], None]
"""Tell that so many images, of so many bytes, were read."""
Task = Callable[[Unit, Job, Count], str]


def plan(source: Source, config: Config) -> list[Unit]:
    """Cut a source into units."""
    data, known = config.data, len(source.classes)
    if known > config.family.classes:
        raise Refused(
            f"the source has {known} classes, the network of recipe {config.recipe!r} knows "
            f"{config.family.classes}; set --family.network.classes {known} or drop classes"
        )
    if source.records:
        return _pieces(source.records, config)
    if source.count is not None and data.holdout >= source.count:
        raise _too_many_held(data.holdout, source.count)
    count = len(source.archives)
    shares = [data.holdout * (n + 1) // count - data.holdout * n // count for n in range(count)]
    return [Unit(n, archive.records, shares[n], None) for n, archive in enumerate(source.archives)]


def _pieces(records: Sequence[Record], config: Config) -> list[Unit]:
    """A listing, shuffled once so that any run of samples is a fair sample of the whole."""
    data, order = config.data, np.random.default_rng(config.seed).permutation(len(records))
    if data.holdout >= len(records):
        raise _too_many_held(data.holdout, len(records))
    held, rest = order[: data.holdout], order[data.holdout :]
    pieces = [
        (part[start : start + data.images_per_shard], keep)
        for part, keep in ((rest, 0), (held, data.images_per_shard))
        for start in range(0, len(part), data.images_per_shard)
    ]

    def opened(indices: np.ndarray) -> Iterator[Record]:
        return (records[i] for i in indices)

    return [Unit(n, partial(opened, piece), keep, len(piece)) for n, (piece, keep) in enumerate(pieces)]


def write_shards(
    source: Source, config: Config, draft: Draft, workers: int, part: tuple[int, int] = (0, 1)
) -> list[Receipt]:
    """Make the shards of every unit of this part that has no receipt yet; the receipts of the part."""
    units = plan(source, config)
    channels, resolution, _ = config.family.image
    job = Job(config.data, resolution, channels, *_place(config.data, draft))
    job.duplicates.update(_duplicates(units, job, workers, part) if config.data.drop_duplicates else {})
    mine = units[part[0] :: part[1]]
    receipts = {n: Receipt.model_validate_json(text) for n, text in notes(job.store, RECEIPTS).items()}
    missing = [unit for unit in mine if unit.number not in receipts]
    label = f"shard, part {part[0]} of {part[1]}" if part[1] > 1 else "shard"
    _check_broken(list(receipts.values()), config.data.max_broken)
    for unit, text in _work(label, make_unit, missing, job, workers):
        receipts[unit.number] = Receipt.model_validate_json(text)
        _check_broken(list(receipts.values()), config.data.max_broken)
    return [receipts[unit.number] for unit in mine]


def told(receipts: list[Receipt], classes: int) -> dict[str, Any]:
    """What became of the records, for the manifest."""
    images: Counter[str] = Counter()
    histogram: Counter[int] = Counter()
    dropped: Counter[str] = Counter()
    for receipt in receipts:
        dropped.update(receipt.dropped)
        for shard in receipt.shards:
            images[shard.split] += shard.images
            histogram.update(shard.histogram)
    return {
        "train": images[TRAIN],
        "holdout": images[HOLDOUT],
        "histogram": [histogram[label] for label in range(classes)],
        "broken": [name for receipt in receipts for name in receipt.broken],
        "dropped": dict(sorted(dropped.items())),
    }


def deliver(receipts: list[Receipt], config: Config, draft: Draft) -> list[dict[str, Any]]:
    """Let the draft know the shards, which are already where they belong; what the manifest says of each."""
    shards = [shard for receipt in receipts for shard in receipt.shards]
    if not any(shard.split == TRAIN for shard in shards):
        raise Refused("no image of the source could be used for training; nothing was written")
    if config.data.format == "lmdb":
        return [_table(split, [s for s in shards if s.split == split], config, draft) for split in SPLITS]
    files = [ArtifactFile(path=shard.file, size=shard.size, sha256=shard.sha256) for shard in shards]
    draft.delivered += files
    return [shard.model_dump(exclude={"size", "sha256"}) for shard in shards]


def _place(data: DataConfig, draft: Draft) -> tuple[Path, Store]:
    """Where shards are written, and where they end up; those that become tables end up in a hidden folder."""
    if data.format == "tar":
        return draft.path, draft.store
    hidden = draft.path / TARS
    hidden.mkdir(exist_ok=True)
    return hidden, open_store(hidden)


def _table(split: str, shards: list[Shard], config: Config, draft: Draft) -> dict[str, Any]:
    """The samples of a split in one LMDB table."""
    name = f"{split}.lmdb"
    columns = {
        "image": Column("uint8", config.family.image),
        "label": Column("int64"),
        "text": Column("text"),
    }
    (draft.path / name).unlink(missing_ok=True)
    with Writer(draft.path / name, columns) as table:
        for shard in shards:
            tar = Tar(draft.path / TARS / shard.file)
            for index in range(len(tar)):
                sample = tar.sample(index)
                table.append({"image": array(sample.data), "label": sample.label, "text": sample.text})
    return {"file": name, "split": split, "images": sum(shard.images for shard in shards)}


def make_unit(unit: Unit, job: Job, count: Count) -> str:
    """Write the shards of a unit, then its receipt."""
    receipt, held = Receipt(), 0
    shelves = {split: Shelf(split, unit.number, job) for split in (TRAIN, HOLDOUT)}
    duplicates = job.duplicates.get(unit.number, frozenset())
    try:
        for index, record in enumerate(unit.records()):
            try:
                data = record.read()
                count(1, len(data))
                image = record.decode(data)
                if reason := "duplicate" if index in duplicates else _unfit(image, job.data):
                    receipt.dropped[reason] = receipt.dropped.get(reason, 0) + 1
                    continue
                png = _png(prepare(image, job.resolution, job.channels, job.data.filter, job.data.background))
            except Exception as error:  # the decoders raise anything on a broken file
                if _not_its_fault(error):
                    raise
                receipt.broken.append(f"{record.name}: {brief(error)}")
                continue
            shelf = shelves[HOLDOUT if held < unit.held else TRAIN]
            held += 1
            shelf.add(f"{unit.number:06d}-{index:07d}", png, record)
        for shelf in shelves.values():
            shelf.finish()
    finally:
        for shelf in shelves.values():
            shelf.drop()
    receipt.shards += [shard for shelf in shelves.values() for shard in shelf.shards]
    text = receipt.model_dump_json()
    job.store.write(f"{RECEIPTS}/{unit.number:06d}.json", text.encode())
    return text


class Shelf:
    """The shards of one split of a unit, one open at a time."""

    def __init__(self, split: str, unit: int, job: Job) -> None:
        self.split, self.unit, self.job = split, unit, job
        self.shards: list[Shard] = []
        self.open: OpenShard | None = None

    def add(self, key: str, png: bytes, record: Record) -> None:
        self.open = self.open or self._begin()
        sample = {"png": png, "cls": str(record.label).encode()}
        self.open.add(key, sample | ({"txt": record.text.encode()} if record.text else {}))
        shard, data = self.shards[-1], self.job.data
        shard.images += 1
        shard.histogram[record.label] = shard.histogram.get(record.label, 0) + 1
        if shard.images >= data.images_per_shard or self.open.measured.size >= data.shard_mb * 1e6:
            self.finish()

    def finish(self) -> None:
        """Close the open shard, if there is one, and bring it to its place."""
        if self.open:
            self.shards[-1] = self.shards[-1].model_copy(update=self.open.finish())
            self.open = None

    def drop(self) -> None:
        """Forget the open shard, if there is one."""
        if self.open:
            self.open.drop()
            self.open = None

    def _begin(self) -> OpenShard:
        name = f"{self.split}-{self.unit:06d}-{len(self.shards):03d}.tar"
        self.shards.append(Shard(file=name, split=self.split))
        return OpenShard(name, self.job.folder, self.job.store)


class OpenShard:
    """A tar file while it is written, in a folder of this machine; it is measured, and finished or dropped."""

    def __init__(self, name: str, folder: Path, store: Store) -> None:
        self.name, self.store = name, store
        self.measured = Measured(folder / f".{name}.{os.getpid()}.partial")
        self.writer = TarWriter(self.measured, user="", group="", mtime=0, encoder=False)

    def add(self, key: str, sample: dict[str, bytes]) -> None:
        """Write the members of a sample, `<key>.<suffix>`, sorted by suffix."""
        self.writer.write({"__key__": key} | sample)

    def finish(self) -> dict[str, Any]:
        """Bring it to its place; its size and checksums."""
        self.writer.close()
        self.measured.close()
        if not self.store.local_folder and self.store.version(MANIFEST):
            raise Refused(f"{self.store.uri} was finished by others meanwhile; there is nothing left to do")
        move_file(self.measured.path, self.name, self.store)
        return self.measured.facts()

    def drop(self) -> None:
        with suppress(ValueError, OSError):  # already closed, or no room for the end of it
            self.writer.close()
        self.measured.close()
        self.measured.path.unlink(missing_ok=True)


class Measured:
    """A file that is measured while it is written."""

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


def _unfit(image: Image.Image, data: DataConfig) -> str:
    """Why the image is left out, if it is."""
    short, long = min(image.size), max(image.size)
    if short < data.min_side:
        return f"shorter side below {data.min_side} pixels"
    if data.max_aspect and long > data.max_aspect * short:
        return f"sides beyond {data.max_aspect:g} to 1"
    return ""


def _png(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format="PNG", **COMPRESSION)
    return stream.getvalue()


def _duplicates(units: list[Unit], job: Job, workers: int, part: tuple[int, int]) -> dict[int, set[int]]:
    """By unit, the records whose bytes equal those of an earlier one. Parts that run side by side share the reading."""
    for mine in (units[part[0] :: part[1]], units):
        there = notes(job.store, DIGESTS)
        missing = [unit for unit in mine if unit.number not in there]
        for _ in _work("look for duplicates", digest_unit, missing, job, workers):
            pass
    digests = [there for _, there in sorted(notes(job.store, DIGESTS).items())]
    table = np.frombuffer(b"".join(digests), dtype="V16")
    repeated = np.ones(len(table), dtype=bool)
    repeated[np.unique(table, return_index=True)[1]] = False  # the first of each
    starts = np.cumsum([0, *(len(text) // 16 for text in digests)])
    return {
        unit.number: set(np.flatnonzero(repeated[starts[n] : starts[n + 1]]).tolist())
        for n, unit in enumerate(units)
    }


def digest_unit(unit: Unit, job: Job, count: Count) -> str:
    """Note 16 bytes for the content of each record; for one that cannot be read, 16 of its own."""
    digests = bytearray()
    for record in unit.records():
        try:
            data = record.read()
        except Exception as error:  # it will be named when it is to be written
            if _not_its_fault(error):
                raise
            data = f"unreadable {unit.number} {len(digests)}".encode()
        digests += hashlib.sha256(data).digest()[:16]
        count(1, len(data))
    job.store.write(f"{DIGESTS}/{unit.number:06d}", bytes(digests))
    return ""


def _not_its_fault(error: Exception) -> bool:
    """Whether an image could not be read because of the disk, the bucket or the memory, rather than of its content."""
    return isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno is not None)


def notes(store: Store, folder: str) -> dict[int, bytes]:
    """By unit, what was written about it."""
    names = [
        entry.name
        for entry in store.list_objects(f"{folder}/")
        if not entry.name.split("/")[-1].startswith(".")
    ]
    with ThreadPoolExecutor(max_workers=16) as pool:
        return {
            int(Path(name).stem): text for name, text in zip(names, pool.map(store.read, names), strict=True)
        }


def _check_broken(receipts: Sequence[Receipt], limit: int) -> None:
    broken = [name for receipt in receipts for name in receipt.broken]
    if len(broken) > limit:
        raise Refused(
            f"{len(broken)} files are no readable images, more than data.max_broken allows "
            f"({limit}): {'; '.join(broken[:3])}; remove them or raise --data.max-broken"
        )


def _too_many_held(holdout: int, count: int) -> Refused:
    return Refused(f"data.holdout is {holdout}, the source has only {count} images; hold out fewer")


# The workers: forked, so that a source need not be sent to them.

_forked: tuple[Task, list[Unit], Job, Any] | None = None


def _work(label: str, task: Task, units: list[Unit], job: Job, workers: int) -> Iterator[tuple[Unit, str]]:
    """(unit, what the task returns), as they are done, by several processes."""
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
            min(workers, len(units)), context, initializer=_stay_with, initargs=(os.getpid(),)
        ) as pool,
    ):
        start, told, finished = time.monotonic(), 0, 0
        waiting = {pool.submit(_one, n): unit for n, unit in enumerate(units)}
        try:
            while waiting:
                done, _ = wait(waiting, timeout=0.5, return_when=FIRST_COMPLETED)
                finished += len(done)
                images, size = counts[:]
                speed = size / 1e6 / max(1e-9, time.monotonic() - start)
                reached = images if known else finished
                progress.advance(reached - told, f"{images} images, {speed:.1f} MB/s")
                told = reached
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


def _one(number: int) -> str:
    assert _forked is not None
    task, units, job, counts = _forked

    def count(images: int, size: int) -> None:
        with counts.get_lock():
            counts[0] += images
            counts[1] += size

    return task(units[number], job, count)


def _stay_with(parent: int) -> None:
    """In a worker: leave Ctrl-C to the parent, and do not outlive it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
