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
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from PIL import Image
from pydantic import BaseModel
from webdataset import TarWriter

from dmd2.config import Config, DataConfig
from dmd2.data.account import Account
from dmd2.data.decode import prepare_image
from dmd2.data.lmdb_table import Column, TableWriter
from dmd2.data.loader import TarShard, decode_array
from dmd2.data.shard_table import ShardInfo, register_shards
from dmd2.data.sources import Source, SourceImage, optional_caption
from dmd2.data.unit_results import UnitResults
from dmd2.errors import Interrupted, Refused, brief
from dmd2.io.artifact import MANIFEST
from dmd2.io.staging import Draft
from dmd2.io.storage import move_file, open_store
from dmd2.io.store import CONCURRENT_REQUESTS, Store
from dmd2.log import printable
from dmd2.progress import Progress

CLIP_WORDS = 75
"""Words that fit into the window of a CLIP text encoder, 77 tokens with start and end, if each is one token."""
LONG_CAPTION = f"captions of more than {CLIP_WORDS} words, whose end no CLIP text encoder sees (encode counts all, by the tokenizer)"
SPLITS = TRAIN, HOLDOUT = "train", "holdout"
RESULTS, DIGESTS, TARS = ".units", ".digests", ".tars"
NO_CAPTION = "images without a caption"
UNREADABLE = 255
"""First byte of the digest of an image that is not held out; that of others is 0."""
COMPRESSION = {"compress_level": 1, "compress_type": zlib.Z_RLE}
"""PNG settings: half the time of Pillow's defaults, for the same size with photographs and a few per cent more with drawings."""


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


class UnitResult(BaseModel):
    """The result of one unit. It is written after the unit's shards are in their final place."""

    shards: list[ShardInfo] = []
    broken: list[str] = []
    """Names of unreadable images, with the reason."""
    account: Account = Account()
    """What became of each image, and of what else the unit has."""


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
        raise _holdout_too_large(data.holdout, source.count)
    return [Unit(n, archive.records, None, None) for n, archive in enumerate(source.archives)]


def _shuffled_units(records: Sequence[SourceImage], config: Config) -> list[Unit]:
    """Units of a listing that is shuffled once, so that every unit is a random sample of the source."""
    data, order = config.data, np.random.default_rng(config.seed).permutation(len(records))
    if data.holdout >= len(records):
        raise _holdout_too_large(data.holdout, len(records))
    by_digest = bool(data.drop_duplicates and data.holdout)  # so many different images are held out
    held_out, rest = (order[:0], order) if by_digest else (order[: data.holdout], order[data.holdout :])
    pieces = [
        (part[start : start + data.images_per_shard], split)
        for part, split in ((rest, None if by_digest else TRAIN), (held_out, HOLDOUT))
        for start in range(0, len(part), data.images_per_shard)
    ]

    def opened(indices: np.ndarray, account: Account) -> Iterator[SourceImage]:
        return (records[i] for i in indices)

    return [Unit(n, partial(opened, piece), split, len(piece)) for n, (piece, split) in enumerate(pieces)]


def write_shards(
    source: Source, config: Config, draft: Draft, workers: int, part: tuple[int, int] = (0, 1)
) -> UnitResults[UnitResult]:
    """Write the shards of every unit of this part that has no result file yet, and return the results of the part."""
    units = split_into_units(source, config)
    channels, resolution, _ = config.family.image
    folder, store = _output_folder_and_store(config.data, draft)
    job = ShardingJob(config.data, resolution, channels, folder, store, needs_captions(config), config.seed)
    choose = config.data.drop_duplicates or (config.data.holdout and source.archives)
    job = replace(job, selection=_select(units, job, workers, part)) if choose else job
    mine = units[part[0] :: part[1]]
    numbers = {unit.number for unit in mine}
    results = UnitResults(UnitResult, read_unit_files(job.store, RESULTS, numbers))
    missing = [unit for unit in mine if unit.number not in results]
    label = f"shard, part {part[0]} of {part[1]}" if part[1] > 1 else "shard"
    broken = [name for result in results for name in result.broken]
    _check_broken(broken, config.data.max_broken)
    for unit, text in _run_in_processes(label, write_unit, missing, job, workers):
        broken += results.add(unit.number, text).broken
        _check_broken(broken, config.data.max_broken)
    return results


def needs_captions(config: Config) -> bool:
    """Whether images without a caption are left out."""
    return config.family.prompts == "texts" and not config.data.allow_empty_captions


def summarize(source: Source, results: Iterable[UnitResult], config: Config) -> dict[str, Any]:
    """Facts for the manifest: images by split and class, unreadable ones, and the account of the source."""
    images: Counter[str] = Counter()
    histogram: Counter[int] = Counter()
    account, broken = source.account.model_copy(deep=True), list[str]()
    for result in results:
        account.add(result.account)
        broken += result.broken
        for shard in result.shards:
            images[shard.split] += shard.images
            histogram.update(shard.histogram)
    _remark_on_classes(account, source.classes, histogram, config)
    if images[HOLDOUT] < config.data.holdout:
        wanted = config.data.holdout
        account.remark(f"fewer held-out images than the {wanted} wanted", count=wanted - images[HOLDOUT])
    return {
        "classes": source.classes,
        "train": images[TRAIN],
        "holdout": images[HOLDOUT],
        "unreadable": len(broken),
        "left_out": account.num_left_out - len(broken),
        **({"without_caption": _count_without_caption(account)} if needs_captions(config) else {}),
        "histogram": [histogram[label] for label in range(len(source.classes))],
        "broken": broken,
        "account": account.model_dump(),
    }


def _count_without_caption(account: Account) -> int:
    return account.left_out[NO_CAPTION].count if NO_CAPTION in account.left_out else 0


def _remark_on_classes(account: Account, classes: list[str], histogram: Counter[int], config: Config) -> None:
    empty = [name for label, name in enumerate(classes) if not histogram[label]]
    account.remark("classes without an image", ", ".join(empty[:5]), len(empty))
    if config.family.prompts == "classes" and len(classes) < config.family.classes:
        unused = config.family.classes - len(classes)
        account.remark(
            f"classes of the network ({config.family.classes}) that the source lacks", count=unused
        )


def list_shards(results: Iterable[UnitResult], config: Config, draft: Draft) -> dict[str, Any]:
    """Add the shards, or the tables that are made of them, to the draft's files; return the facts of the manifest that list them."""
    if not any(shard.split == TRAIN for result in results for shard in result.shards):
        account = Account()
        for result in results:
            account.add(result.account)
        reasons = "; ".join(account.lines()[2:5]) or "it has none"
        raise Refused(f"no image of the source could be used for training ({reasons}); nothing was written")
    shards = (shard for result in results for shard in result.shards)
    if config.data.format == "tar":
        return register_shards(shards, draft)
    by_split: dict[str, list[ShardInfo]] = {split: [] for split in SPLITS}
    for shard in shards:
        by_split[shard.split].append(shard)
    return {"shards": [_write_table(split, some, config, draft) for split, some in by_split.items()]}


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
    result = UnitResult()
    writers = {split: SplitWriter(split, unit.number, job) for split in SPLITS}
    held_out = job.selection.held_out.get(unit.number, set())
    try:
        for index, record in enumerate(unit.records(result.account)):
            sample = _prepare(unit.number, index, record, job, result, count)
            if sample is None:
                continue
            split = unit.split or (HOLDOUT if index in held_out else TRAIN)
            result.account.use("images")
            writers[split].add(f"{unit.number:06d}-{index:07d}", record.label, sample)
        for writer in writers.values():
            writer.finish()
    finally:
        for writer in writers.values():
            writer.discard()
    result.shards += [shard for writer in writers.values() for shard in writer.shards]
    text = result.model_dump_json()
    job.store.write(f"{RESULTS}/{unit.number:06d}.json", text.encode())
    return text


def _prepare(
    unit: int, index: int, record: SourceImage, job: ShardingJob, result: UnitResult, count: ReportProgress
) -> dict[str, bytes] | None:
    """The files of a sample; None, and a line in the account, if the image is left out or unreadable."""
    data, account = job.data, result.account
    try:
        file = record.read()
        count(1, len(file))
        image = record.decode(file, int(data.max_megapixels * 1e6))
        text = optional_caption(partial(record.caption, account), job.needs_captions, record.name, account)
        if reason := _reason_to_leave_out(unit, index, image, text, job):
            account.leave_out(reason, record.name)
            return None
        profiles: Counter[str] = Counter()
        png = _encode_png(
            prepare_image(image, job.resolution, job.channels, data.filter, data.background, profiles)
        )
    except Exception as error:  # the decoders raise anything on a broken file
        if _is_system_error(error):
            raise
        result.broken.append(printable(f"{record.name}: {brief(error)}"))
        account.leave_out("unreadable images", f"{record.name}: {brief(error)}")
        return None
    for profile, number in profiles.items():
        account.remark(f"images whose colour profile {profile}", record.name, number)
    told_by_texts = job.needs_captions or data.allow_empty_captions
    if told_by_texts and len(text.split()) > CLIP_WORDS:
        account.remark(LONG_CAPTION, record.name)
    return {"png": png} | ({"txt": text.encode()} if text else {})


def _reason_to_leave_out(unit: int, index: int, image: Image.Image, text: str, job: ShardingJob) -> str:
    """Empty if the image is used."""
    data, (short, long) = job.data, sorted(image.size)
    if index in job.selection.copies.get(unit, set()):
        return "duplicates" if data.drop_duplicates else "copies of a held-out image"
    if not text and job.needs_captions:
        return NO_CAPTION
    if short < data.min_side:
        return f"images whose shorter side is below {data.min_side} pixels"
    if data.max_aspect and long > data.max_aspect * short:
        return f"images with sides beyond {data.max_aspect:g} to 1"
    return ""


class SplitWriter:
    """Writes the shards of one split of a unit, one at a time."""

    def __init__(self, split: str, unit: int, job: ShardingJob) -> None:
        self.split, self.unit, self.job = split, unit, job
        self.shards: list[ShardInfo] = []
        self.open: ShardWriter | None = None

    def add(self, key: str, label: int, sample: dict[str, bytes]) -> None:
        self.open = self.open or self._begin()
        self.open.add(key, sample | {"cls": str(label).encode()})
        shard, data = self.shards[-1], self.job.data
        shard.images += 1
        shard.histogram[label] = shard.histogram.get(label, 0) + 1
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


def _encode_png(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format="PNG", **COMPRESSION)
    return stream.getvalue()


def _select(units: list[Unit], job: ShardingJob, workers: int, part: tuple[int, int]) -> Selection:
    """Choose the images of archives that are held out, and the copies that are left out, by digests of all images.

    The digests are uniformly distributed, so those with the smallest are a random sample of all archives and classes; equal
    images have the same, so none is in both splits. Parts that run in parallel share the reading.
    """
    for mine in (units[part[0] :: part[1]], units):
        there = _list_unit_files(job.store, DIGESTS)
        missing = [unit for unit in mine if unit.number not in there]
        for _ in _run_in_processes("read all images once, to choose", hash_unit, missing, job, workers):
            pass
    digests = read_unit_files(job.store, DIGESTS)
    tables = [np.frombuffer(digests[unit.number], "V16") for unit in units]
    archives = [table for unit, table in zip(units, tables, strict=True) if unit.split is None]
    smallest = _smallest_digests(archives, job.data.holdout)
    watched = [
        np.arange(len(table)) if job.data.drop_duplicates else np.flatnonzero(np.isin(table, smallest))
        for table in tables
    ]
    found = np.concatenate([table[indices] for table, indices in zip(tables, watched, strict=True)])
    unit, index = np.repeat(np.arange(len(tables)), [len(each) for each in watched]), np.concatenate(watched)
    first = np.zeros(len(found), bool)
    first[np.unique(found, return_index=True)[1]] = True
    held_out, selection = first & np.isin(found, smallest), Selection()
    for chosen, sets in ((held_out, selection.held_out), (~first, selection.copies)):
        for number, place in zip(unit[chosen].tolist(), index[chosen].tolist(), strict=True):
            sets.setdefault(units[number].number, set()).add(place)
    return selection


def _smallest_digests(tables: Sequence[np.ndarray], count: int) -> np.ndarray:
    """The `count` smallest different digests of readable images, which must not be all of them."""
    if not (count and tables):
        return np.empty(0, "V16")
    smallest = np.empty(0, "V16")
    for table in tables:
        readable = table[np.frombuffer(table.tobytes(), np.uint8).reshape(-1, 16)[:, 0] != UNREADABLE]
        smallest = np.unique(np.concatenate([smallest, readable]))[: count + 1]
    if len(smallest) <= count:
        raise _holdout_too_large(count, len(smallest), "different ")
    return smallest[:count]


def hash_unit(unit: Unit, job: ShardingJob, count: ReportProgress) -> str:
    """Write a digest of 16 bytes for each image. It depends on the seed, and is the same for equal files. An image that is unreadable
    or has no caption where one is needed gets a unique value with a first byte of `UNREADABLE`."""
    digests, seed = bytearray(), job.seed.to_bytes(8, "big", signed=True)
    for index, record in enumerate(unit.records(Account())):
        try:
            data = record.read()
            digest = hashlib.sha256(seed + data).digest()[:15]
            known = not job.needs_captions or bool(record.caption(Account()))
        except Exception as error:  # it is reported when the shard is written
            if _is_system_error(error):
                raise
            data, known = b"", False
        unique = unit.number.to_bytes(7, "big") + index.to_bytes(8, "big")
        digests += b"\0" + digest if known else bytes([UNREADABLE]) + unique
        count(1, len(data))
    job.store.write(f"{DIGESTS}/{unit.number:06d}", bytes(digests))
    return ""


def _is_system_error(error: Exception) -> bool:
    """Whether an image could not be read because of the disk, the bucket or the memory, and not because of its content."""
    return isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno is not None)


def read_unit_files(store: Store, folder: str, units: Container[int] | None = None) -> dict[int, bytes]:
    """{number of the unit: content} of the files that were written for units, or for these units, in this folder."""
    found = _list_unit_files(store, folder)
    names = {number: name for number, name in found.items() if units is None or number in units}
    with ThreadPoolExecutor(CONCURRENT_REQUESTS) as pool:
        return dict(zip(names, pool.map(store.read, names.values()), strict=True))


def _list_unit_files(store: Store, folder: str) -> dict[int, str]:
    """{number of the unit: name} of the files in this folder."""
    listed = (name for name, _, _ in store.list_objects(f"{folder}/"))
    return {int(Path(name).stem): name for name in listed if not name.split("/")[-1].startswith(".")}


def _check_broken(broken: Sequence[str], limit: int) -> None:
    if len(broken) > limit:
        raise Refused(
            f"{len(broken)} files are no readable images, more than data.max_broken allows "
            f"({limit}): {'; '.join(broken[:3])}; remove them or raise --data.max-broken"
        )


def _holdout_too_large(holdout: int, count: int, which: str = "") -> Refused:
    return Refused(f"data.holdout is {holdout}, the source has only {count} {which}images; hold out fewer")


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
        start, reported, finished, begun = time.monotonic(), 0, 0, 0
        waiting: dict[Future[str], Unit] = {}
        try:
            while waiting or begun < len(units):
                while (
                    begun < len(units) and len(waiting) < 2 * workers
                ):  # more would be looked at in every turn
                    waiting[pool.submit(_run_unit, begun)] = units[begun]
                    begun += 1
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
