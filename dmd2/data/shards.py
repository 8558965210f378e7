"""Writing shards: tar files that WebDataset reads.

A source is divided into units of work: ranges of a listing that is shuffled once with the seed, or whole archives. A unit becomes one
or more shards of each split, independently of the others. So any number of processes and machines writes the same bytes, and interrupted
work continues with the units that have no result file yet. A sample is `<key>.png`, `<key>.cls` and, if there is a caption,
`<key>.txt`; members of a tar have no time and no owner.
"""

from __future__ import annotations

import io
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image
from pydantic import BaseModel

from dmd2.config import Config, DataConfig
from dmd2.data.account import Account
from dmd2.data.decode import prepare_image
from dmd2.data.lmdb_table import Column, TableWriter
from dmd2.data.loader import TarShard, decode_array
from dmd2.data.selection import is_system_error, select
from dmd2.data.shard_table import HOLDOUT, SPLITS, TRAIN, ShardInfo, register_shards
from dmd2.data.shard_writer import ShardWriter
from dmd2.data.sources import Source, SourceImage, optional_caption
from dmd2.data.unit_results import RESULTS, UnitResults, read_unit_files
from dmd2.data.units import ReportProgress, ShardingJob, Unit, needs_captions, split_into_units
from dmd2.data.workers import run_in_processes
from dmd2.errors import Refused, brief
from dmd2.io.staging import Draft
from dmd2.io.storage import open_store
from dmd2.io.store import Store
from dmd2.log import printable

CLIP_WORDS = 75
"""Words that fit into the window of a CLIP text encoder, 77 tokens with start and end, if each is one token."""
LONG_CAPTION = f"captions of more than {CLIP_WORDS} words, whose end no CLIP text encoder sees (encode counts all, by the tokenizer)"
TARS = ".tars"
NO_CAPTION = "images without a caption"
COMPRESSION = {"compress_level": 1, "compress_type": zlib.Z_RLE}
"""PNG settings: half the time of Pillow's defaults, for the same size with photographs and a few per cent more with drawings."""


class UnitResult(BaseModel):
    """The result of one unit. It is written after the unit's shards are in their final place."""

    shards: list[ShardInfo] = []
    broken: list[str] = []
    """Names of unreadable images, with the reason."""
    account: Account = Account()
    """What became of each image, and of what else the unit has."""


def write_shards(
    source: Source, config: Config, draft: Draft, workers: int, part: tuple[int, int] = (0, 1)
) -> UnitResults[UnitResult]:
    """Write the shards of every unit of this part that has no result file yet, and return the results of the part."""
    units = split_into_units(source, config)
    channels, resolution, _ = config.family.image
    folder, store = _output_folder_and_store(config.data, draft)
    job = ShardingJob(config.data, resolution, channels, folder, store, needs_captions(config), config.seed)
    choose = config.data.drop_duplicates or (config.data.holdout and source.archives)
    job = replace(job, selection=select(units, job, workers, part)) if choose else job
    mine = units[part[0] :: part[1]]
    numbers = {unit.number for unit in mine}
    results = UnitResults(UnitResult, read_unit_files(job.store, RESULTS, numbers))
    missing = [unit for unit in mine if unit.number not in results]
    label = f"shard, part {part[0]} of {part[1]}" if part[1] > 1 else "shard"
    broken = [name for result in results for name in result.broken]
    _check_broken(broken, config.data.max_broken)
    for unit, text in run_in_processes(label, write_unit, missing, job, workers):
        broken += results.add(unit.number, text).broken
        _check_broken(broken, config.data.max_broken)
    return results


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
        if is_system_error(error):
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
            self.open.close()
            self.open = None

    def discard(self) -> None:
        """Delete the open shard, if there is one."""
        if self.open:
            self.open.discard()
            self.open = None

    def _begin(self) -> ShardWriter:
        name = f"{self.split}-{self.unit:06d}-{len(self.shards):03d}.tar"
        self.shards.append(shard := ShardInfo(file=name, split=self.split))
        return ShardWriter(shard, self.job.folder, self.job.store)


def _encode_png(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format="PNG", **COMPRESSION)
    return stream.getvalue()


def _check_broken(broken: Sequence[str], limit: int) -> None:
    if len(broken) > limit:
        raise Refused(
            f"{len(broken)} files are no readable images, more than data.max_broken allows "
            f"({limit}): {'; '.join(broken[:3])}; remove them or raise --data.max-broken"
        )
