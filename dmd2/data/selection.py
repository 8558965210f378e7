"""Images of archives that are chosen before any shard is written: those held out, and copies of others that are left out."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from dmd2.data.account import Account
from dmd2.data.unit_results import list_unit_files, read_unit_files
from dmd2.data.units import ReportProgress, Selection, ShardingJob, Unit, holdout_too_large
from dmd2.data.workers import run_in_processes

DIGESTS = ".digests"
UNREADABLE = 255
"""First byte of the digest of an image that is not held out; that of others is 0."""


def select(units: list[Unit], job: ShardingJob, workers: int, part: tuple[int, int]) -> Selection:
    """Choose the images of archives that are held out, and the copies that are left out, by digests of all images.

    The digests are uniformly distributed, so those with the smallest are a random sample of all archives and classes; equal
    images have the same, so none is in both splits. Parts that run in parallel share the reading.
    """
    for mine in (units[part[0] :: part[1]], units):
        there = list_unit_files(job.store, DIGESTS)
        missing = [unit for unit in mine if unit.number not in there]
        for _ in run_in_processes("read all images once, to choose", hash_unit, missing, job, workers):
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
        raise holdout_too_large(count, len(smallest), "different ")
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
            if is_system_error(error):
                raise
            data, known = b"", False
        unique = unit.number.to_bytes(7, "big") + index.to_bytes(8, "big")
        digests += b"\0" + digest if known else bytes([UNREADABLE]) + unique
        count(1, len(data))
    job.store.write(f"{DIGESTS}/{unit.number:06d}", bytes(digests))
    return ""


def is_system_error(error: Exception) -> bool:
    """Whether an image could not be read because of the disk, the bucket or the memory, and not because of its content."""
    return isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno is not None)
