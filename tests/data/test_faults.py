"""Sharding and reading while things go wrong: what comes out is what would have come out, or one clear sentence."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from itertools import islice
from multiprocessing.context import ForkProcess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from webdataset import TarWriter

from dmd2.config import LoaderConfig
from dmd2.data import selection
from dmd2.data.loader import DataLoader, RawBatch, Shards, collate
from dmd2.data.shards import UnitResult
from dmd2.data.units import ReportProgress, ShardingJob, Unit
from dmd2.errors import Refused
from dmd2.io.artifact import MANIFEST, Manifest, read_manifest
from dmd2.io.storage import open_store, upload_files
from dmd2.io.store import ObjectInfo
from tests.bucket import (
    DOWNLOAD,
    UPLOAD,
    Fault,
    Proxy,
    kill,
    list_names,
    living_processes,
    names_in_manifest,
    start_command,
    wait_for_success,
    wait_until,
)
from tests.conftest import MICRO, flags

FAULTS: tuple[Fault, ...] = ("503", "drop", "lost", "cut")
SMALL = flags((*MICRO, "data.images_per_shard=4", "data.holdout=6"))


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """42 pictures that take their time to read: twelve units of work."""
    root, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(1)
    for label in "abc":
        (root / label).mkdir()
        for index in range(14):
            pixels = rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).resize((700, 700)).save(root / label / f"{index:02d}.jpg")
    return root


class Work:
    """Sharding by command, in processes that can be killed."""

    def __init__(self, source: Path, out: str, place: Path, *more: str) -> None:
        self.source, self.out, self.place, self.more = source, out, place, more
        self.draft = out if "://" in out else str(Path(out).with_name(f".{Path(out).name}.partial"))
        self.said = place / "said.txt"

    def start(self, *more: str, **environment: str) -> ForkProcess:
        words = "shard", "edm-digits", "--source", str(self.source), "--out", self.out, *SMALL
        return start_command(self.said, *words, "--workers", "2", *self.more, *more, **environment)

    def done(self, *more: str) -> Manifest:
        wait_for_success(self.start(*more), self.said)
        return read_manifest(self.out, "shards")

    def kept(self) -> dict[str, ObjectInfo]:
        """The shards that have a result."""
        store = open_store(self.draft)
        entries = {entry.name: entry for entry in store.list_objects()}
        results = [UnitResult.model_validate_json(store.read(n)) for n in entries if n.startswith(".units/")]
        return {shard.file: entries[shard.file] for result in results for shard in result.shards}

    def forget(self) -> None:
        if "://" in self.out:
            open_store(self.out).delete(list_names(self.out))
        else:
            shutil.rmtree(self.out)


@pytest.fixture(scope="session")
def undisturbed(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, float]:
    """The digest of the shards, and about how many seconds they take."""
    place, start = tmp_path_factory.mktemp("undisturbed"), time.monotonic()
    manifest = Work(photos, str(place / "shards"), place).done()
    assert [shard["images"] for shard in manifest.facts["shards"]] == [*[4] * 10, 2]
    return manifest.digest, time.monotonic() - start


@pytest.fixture(params=["local", "bucket"])
def work(request: pytest.FixtureRequest, photos: Path, tmp_path: Path) -> Work:
    local = request.param == "local"
    root = str(tmp_path) if local else request.getfixturevalue("bucket")
    return Work(photos, f"{root}/shards", tmp_path)


@pytest.mark.parametrize("wanted", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_killed_again_and_again_it_makes_the_same_bytes_and_no_shard_twice(
    work: Work, undisturbed: tuple[str, float], wanted: int
) -> None:
    """SIGKILL at random moments, for all its processes. If it was faster, the next begins anew."""
    digest, seconds = undisturbed
    moments, kills = random.Random(5), 0
    kept: dict[str, ObjectInfo] = {}
    while kills < wanted:
        process = work.start()
        process.join(moments.uniform(0.2, 1.0) * seconds)
        kills += kill(process)
        wait_until(lambda process=process: not living_processes(process))  # type: ignore[misc]
        if MANIFEST in list_names(work.out):
            assert read_manifest(work.out, "shards").digest == digest
            work.forget()
            kept = {}
        else:
            assert kept.items() <= work.kept().items()
            kept = work.kept()
    assert work.done().digest == digest
    assert list_names(work.out) == names_in_manifest(work.out)


def test_killed_alone_a_command_takes_its_workers_with_it(work: Work, undisturbed: tuple[str, float]) -> None:
    process = work.start()
    wait_until(lambda: len(living_processes(process)) > 2 and work.kept())
    os.kill(process.ident or 0, signal.SIGKILL)
    process.join()
    wait_until(lambda: not living_processes(process))
    assert work.done().digest == undisturbed[0]
    assert list_names(work.out) == names_in_manifest(work.out)


def test_a_worker_that_is_killed_ends_the_command_with_one_sentence_and_it_can_go_on(
    work: Work, undisturbed: tuple[str, float]
) -> None:
    """As the kernel does when memory is short."""
    process = work.start()
    wait_until(lambda: len(living_processes(process)) > 2)
    os.kill(max(living_processes(process)), signal.SIGKILL)
    process.join()
    assert process.exitcode == 75, work.said.read_text()
    assert "a worker was killed" in work.said.read_text()
    assert work.said.read_text().count("\n") == 1
    wait_until(lambda: not living_processes(process))
    assert work.done().digest == undisturbed[0]


def test_killed_between_manifest_and_name_it_is_finished_by_the_next_call(
    photos: Path, tmp_path: Path, undisturbed: tuple[str, float]
) -> None:
    work = Work(photos, str(tmp_path / "shards"), tmp_path)
    Path(work.draft).mkdir()
    (Path(work.draft) / MANIFEST).write_text("{}")
    assert work.done().digest == undisturbed[0]


@pytest.mark.parametrize("workers", [1, 3])
def test_any_number_of_workers_makes_the_same_bytes(
    photos: Path, tmp_path: Path, undisturbed: tuple[str, float], workers: int
) -> None:
    work = Work(photos, str(tmp_path / "shards"), tmp_path, "--workers", str(workers))
    assert work.done().digest == undisturbed[0]


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five archives of three pictures."""
    root, rng = tmp_path_factory.mktemp("archives"), np.random.default_rng(2)
    for number in range(5):
        with TarWriter(str(root / f"{number}.tar")) as tar:
            for index in range(3):
                pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
                tar.write({"__key__": f"{number}{index}", "png": Image.fromarray(pixels), "cls": index})
    return root


@pytest.mark.parametrize("place", ["local", "bucket"])
def test_killed_while_it_chooses_what_to_hold_out_it_reads_only_the_other_archives_again(
    archives: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    place: str,
) -> None:
    """SIGKILL for the command and its worker, after the first of the images of the fourth archive."""
    whole = Work(archives, str(tmp_path / "whole"), tmp_path, "--workers", "1").done().digest
    original, read = selection.hash_unit, tmp_path / "read.txt"

    def dying(unit: Unit, job: ShardingJob, count: ReportProgress) -> str:
        with read.open("a") as stream:
            stream.write(f"{unit.number} ")

        def one(images: int, size: int) -> None:
            if unit.number == 3 and not (tmp_path / "killed").exists():
                (tmp_path / "killed").touch()
                os.killpg(0, signal.SIGKILL)
            count(images, size)

        return original(unit, job, one)

    monkeypatch.setattr(selection, "hash_unit", dying)
    root = request.getfixturevalue("bucket") if place == "bucket" else str(tmp_path)
    work = Work(archives, f"{root}/shards", tmp_path, "--workers", "1")
    process = work.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert [name for name in list_names(work.draft) if "digests" in name] == [
        f".digests/{n:06d}" for n in range(3)
    ]
    assert work.done().digest == whole
    assert read.read_text().split() == ["0", "1", "2", "3", "3", "4"]
    assert list_names(work.out) == names_in_manifest(work.out)


def parts(work: Work, nodes: bool) -> list[ForkProcess]:
    """Three parts at the same time, on one machine or on three."""
    caches = [{"DMD2_CACHE": str(work.place / f"node{n}")} if nodes else {} for n in range(3)]
    return [work.start("--part", f"{n}/3", **cache) for n, cache in enumerate(caches)]


def test_parts_that_run_together_make_the_same_bytes(work: Work, undisturbed: tuple[str, float]) -> None:
    for process in parts(work, nodes=False):
        wait_for_success(process, work.said)
    assert len(work.kept()) == 11
    assert MANIFEST not in list_names(work.draft)
    assert work.done().digest == undisturbed[0]
    assert list_names(work.out) == names_in_manifest(work.out)


@pytest.mark.parametrize("lost", range(3))
def test_a_part_that_was_killed_is_repeated(
    photos: Path, tmp_path: Path, bucket: str, undisturbed: tuple[str, float], lost: int
) -> None:
    """On a machine of its own, with everything that was on it lost."""
    work = Work(photos, f"{bucket}/shards", tmp_path)
    running = parts(work, nodes=True)
    wait_until(work.kept)
    kill(running.pop(lost))
    shutil.rmtree(tmp_path / f"node{lost}", ignore_errors=True)
    for process in running:
        wait_for_success(process, work.said)
    wait_for_success(work.start("--part", f"{lost}/3"), work.said)
    assert len(work.kept()) == 11
    assert work.done().digest == undisturbed[0]
    assert list_names(work.out) == names_in_manifest(work.out)


def test_a_part_that_is_missing_is_made_by_the_last_call(work: Work, undisturbed: tuple[str, float]) -> None:
    wait_for_success(work.start("--part", "1/3"), work.said)
    assert 0 < len(work.kept()) < 11
    assert work.done().digest == undisturbed[0]


def test_a_part_of_another_configuration_is_refused(work: Work) -> None:
    wait_for_success(work.start("--part", "1/3"), work.said)
    process = work.start("--part", "0/3", "--data.images_per_shard", "5")
    process.join()
    assert process.exitcode == 64
    assert "begun with another configuration (data.images_per_shard: 4 -> 5)" in work.said.read_text()


def test_a_bucket_that_often_fails_gets_the_same_bytes(
    photos: Path, tmp_path: Path, bucket: str, proxy: Proxy, undisturbed: tuple[str, float]
) -> None:
    for fault in FAULTS:
        proxy.fail(".*", fault, share=0.06)
    work = Work(photos, f"{bucket}/shards", tmp_path)
    assert work.done().digest == undisturbed[0]
    assert list_names(work.out) == names_in_manifest(work.out)
    assert proxy.injected.keys() == set(FAULTS)


def test_a_bucket_that_goes_away_ends_it_with_one_sentence_and_it_can_go_on(
    photos: Path, tmp_path: Path, bucket: str, proxy: Proxy, undisturbed: tuple[str, float]
) -> None:
    work = Work(photos, f"{bucket}/shards", tmp_path)
    process = work.start(DMD2_RETRY_S="0.5")
    wait_until(lambda: proxy.count(UPLOAD) > 6)
    proxy.fail(".*", "503")
    process.join()
    assert process.exitcode == 74, work.said.read_text()
    assert f" at {work.out}/" in work.said.read_text()
    assert work.said.read_text().count("\n") == 1
    proxy.rules.clear()
    assert work.kept()
    assert work.done().digest == undisturbed[0]


@pytest.fixture
def source(pictures: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pictures, tmp_path / "source"))


def pixels(files: list[Path]) -> Counter[bytes]:
    return Counter(np.asarray(Image.open(file)).tobytes() for file in files)


def sharded(out: str) -> Counter[bytes]:
    """The images of both splits."""
    return Counter(
        key for split in ("train", "holdout") for key in keys(Shards(out, split).evenly_spaced(1000))
    )


def keys(batch: RawBatch) -> list[bytes]:
    return [image.numpy().tobytes() for image in batch.image]


def test_of_a_source_with_broken_images_the_rest_is_there_once_and_the_broken_are_named(
    source: Path, tmp_path: Path
) -> None:
    files = sorted(source.rglob("*.png"))
    broken = random.Random(0).sample(files, 6)
    for number, file in enumerate(broken):
        data = file.read_bytes()
        file.write_bytes((b"", b"no image", data[:-30], data[: len(data) // 2], data[8:], b"\0" * 99)[number])
    work = Work(source, str(tmp_path / "shards"), tmp_path, "--data.max-broken", "6")
    manifest = work.done()
    assert sorted(line.split(": ")[0] for line in manifest.facts["broken"]) == sorted(map(str, broken))
    assert sharded(work.out) == pixels([file for file in files if file not in broken])
    assert set(sharded(work.out).values()) == {1}


def test_broken_images_are_counted_over_all_parts(source: Path, tmp_path: Path) -> None:
    for file in random.Random(0).sample(sorted(source.rglob("*.png")), 6):
        file.write_bytes(b"no image")
    work = Work(source, str(tmp_path / "shards"), tmp_path, "--data.max-broken", "5")
    for process in parts(work, nodes=False):
        process.join()
    for _ in range(2):
        process = work.start()
        process.join()
        assert process.exitcode == 64
        assert "6 files are no readable images" in work.said.read_text()
    assert not Path(work.out).exists()


def test_duplicates_are_left_out_and_counted_whoever_does_the_work(source: Path, tmp_path: Path) -> None:
    files = sorted(source.rglob("*.png"))
    for number, file in enumerate(random.Random(0).sample(files, 5)):
        for copy in range(1 + number % 2):
            shutil.copy(file, file.parent.parent / "blob" / f"copy{number}{copy}.png")
    alone, together = (
        Work(source, str(tmp_path / name), tmp_path, "--data.drop-duplicates", "True")
        for name in ("alone", "together")
    )
    facts = alone.done().facts
    assert facts["account"]["left_out"]["duplicates"]["count"] == 7
    assert sharded(alone.out) == pixels(files)
    for process in parts(together, nodes=False):
        wait_for_success(process, together.said)
    assert together.done().digest == read_manifest(alone.out, "shards").digest
    assert read_manifest(together.out, "shards").facts["account"] == facts["account"]


@pytest.fixture(params=["local", "bucket"])
def shards(request: pytest.FixtureRequest, made: Path, tmp_path: Path) -> str:
    """A copy of a finished folder."""
    root = str(tmp_path) if request.param == "local" else request.getfixturevalue("bucket")
    upload_files(made / "shards", list_names(str(made / "shards")), open_store(f"{root}/shards"))
    return f"{root}/shards"


BAD, OTHER = "train-000001-000.tar", "train-000002-000.tar"


def overwritten(folder: str, data: bytes) -> None:
    open_store(folder).write(BAD, data)


def flipped(folder: str) -> None:
    data = open_store(folder).read(BAD)
    overwritten(folder, data[:700] + bytes([data[700] ^ 1]) + data[701:])


@pytest.mark.parametrize("ahead", [0, 2])
@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (flipped, "was changed after its manifest was written"),
        (
            lambda folder: overwritten(folder, open_store(folder).read(OTHER)),
            "was changed|truncated or replaced",
        ),
        (lambda folder: overwritten(folder, open_store(folder).read(BAD)[:-512]), "truncated or replaced"),
        (lambda folder: open_store(folder).delete([BAD]), "is missing, though the manifest lists it"),
    ],
    ids=["flipped", "replaced", "truncated", "deleted"],
)
def test_of_a_damaged_shard_no_image_is_used_and_it_is_named(
    made: Path, shards: str, damage: Callable[[str], None], words: str, ahead: int
) -> None:
    good = Shards(made / "shards", "train")
    bad = set(keys(collate([good.sample(1, index) for index in range(good.counts[1])])))
    damage(shards)
    stream, seen = (
        DataLoader(Shards(shards, "train"), 4, 0, LoaderConfig(shuffle_block=1, prefetch=ahead)),
        set(),
    )
    with pytest.raises(Refused, match=rf"{shards}/{BAD} .*({words})"):  # noqa: PT012 - what came before counts
        for batch in stream.batches(0):
            seen |= set(keys(batch))
    assert seen
    assert not seen & bad


def test_a_bucket_that_often_fails_is_read_like_a_folder_even_through_a_tiny_cache(
    made: Path, bucket: str, proxy: Proxy
) -> None:
    """Two epochs; each shard puts out the one before, so that it is brought again."""
    upload_files(made / "shards", list_names(str(made / "shards")), open_store(f"{bucket}/shards"))
    for fault in FAULTS:
        proxy.fail(DOWNLOAD, fault, times=1, share=0.5)
    settings = LoaderConfig(shuffle_block=1, threads=2)
    streams = [
        DataLoader(Shards(folder, "train", cache_gb=1e-9), 6, 0, settings)
        for folder in (made / "shards", f"{bucket}/shards")
    ]
    for stream in streams:
        stream.shards.max_open = 1
    local, remote = ([keys(batch) for batch in islice(stream.batches(3), 16)] for stream in streams)
    assert local == remote
    assert proxy.injected.keys() == set(FAULTS)
    assert proxy.count(f"{DOWNLOAD}.*train") > 3
