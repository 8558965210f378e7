"""The data plane against plain webdataset: `make bench-data`.

Interleaved in one run, each measurement in a process of its own, as ratios: above 1, ours is faster. Sharding reads
the emoji of `tests.emoji.source` (3,786 captioned PNGs of 64 px with transparency, fetched with npm) and 20,000 synthetic
JPEGs; the baseline is a plain loop over `webdataset.ShardWriter` with the same images, prepared in the same way. Reading
compares an epoch of decoded batches from the same shards, with a shuffle buffer as long as our block. The order is
started on a made-up manifest of 10^9 images in 4,000 shards. Prints a table, writes runs/bench/data.json.
"""

from __future__ import annotations

import io
import itertools
import json
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table

from dmd2 import recipes, stages
from dmd2.config import Config, LoaderConfig
from dmd2.data.decode import prepare_image
from dmd2.data.layouts import open_source
from dmd2.data.loader import DataLoader, Shards
from dmd2.io import artifact, staging
from dmd2.io.local import write_text
from tests.emoji import source as emoji

ROOT = Path("runs/bench/data")
ROUNDS = 3
PER_SHARD = 500
BATCH = 64
SYNTHETIC = 20_000
BILLION, BILLIONS_SHARDS = 10**9, 4000


def settings() -> Config:
    """64 px in colour, as the emoji have."""
    return recipes.resolve(
        "edm-imagenet64", [f"data.images_per_shard={PER_SHARD}", "data.holdout=0", "data.max_broken=0"]
    )


# What is measured, each in a process of its own. Returns seconds of wall clock and of all its processors.


def shard_ours(source: str, out: str, workers: str) -> dict[str, float]:
    return measured(lambda: stages.shard(settings(), source, out, workers=int(workers)))


def shard_plain(source: str, out: str) -> dict[str, float]:
    from webdataset import ShardWriter

    config = settings()
    channels, size, _ = config.family.image

    def loop() -> None:
        Path(out).mkdir(parents=True)
        records = open_source(source).records
        order = np.random.default_rng(config.seed).permutation(len(records))
        with ShardWriter(f"{out}/train-%06d.tar", maxcount=PER_SHARD, verbose=0) as sink:
            for index in order:
                record = records[index]
                with Image.open(io.BytesIO(record.read())) as image:
                    sink.write(
                        {
                            "__key__": f"{index:09d}",
                            "png": prepare_image(image, size, channels),
                            "cls": str(record.label).encode(),
                        }
                        | ({"txt": record.text} if record.text else {})
                    )

    return measured(loop)


def read_ours(data: str, count: str) -> dict[str, float]:
    def epoch() -> None:
        stream = DataLoader(Shards(data, "train"), BATCH, 0, LoaderConfig(shuffle_block=4))
        for batch in itertools.islice(stream.batches(0), int(count) // BATCH):
            assert batch.image.shape == (BATCH, 3, 64, 64)

    return measured(epoch)


def read_plain(data: str, count: str) -> dict[str, float]:
    import webdataset

    def to_array(image: Any) -> np.ndarray:
        return image.transpose(2, 0, 1)

    def epoch() -> None:
        urls = sorted(str(path) for path in Path(data).glob("train-*.tar"))
        pipeline = (
            webdataset.WebDataset(urls, shardshuffle=len(urls), seed=0, empty_check=False)
            .shuffle(4 * PER_SHARD)
            .decode("rgb8")
            .to_tuple("png", "cls")
            .map_tuple(to_array, int)
            .batched(BATCH, partial=False)
        )
        for images, _ in itertools.islice(pipeline, int(count) // BATCH):
            assert np.asarray(images).shape == (BATCH, 3, 64, 64)

    return measured(epoch)


def hold(data: str) -> dict[str, float]:
    """Memory of a worker that holds the whole set, encoded."""
    held: list[bytes] = []

    def load() -> None:
        held.extend(path.read_bytes() for path in sorted(Path(data).glob("train-*.tar")))

    return measured(load)


def order(folder: str) -> dict[str, float]:
    """Start on a billion images: read the manifest, and find the first batch of 2,048 in 64 lanes, of 64 ranks."""

    def start() -> None:
        shards = Shards(folder, "train")
        stream = DataLoader(shards, 2048, 0, LoaderConfig(lanes=64), rank=0, world=64)
        assert len(shards) == BILLION
        assert len({stream.order.sample(position) for position in range(0, 2048, 64)}) == 32

    return measured(start)


def measured(work: Callable[[], object]) -> dict[str, float]:
    private, resident, wall, cpu = _mb("RssAnon"), _mb("VmRSS"), time.monotonic(), _cpu()
    work()
    return {
        "wall": time.monotonic() - wall,
        "cpu": _cpu() - cpu,
        "mb": _mb("RssAnon") - private,
        "peak_mb": _mb("VmHWM") - resident,
    }


def _cpu() -> float:
    return sum(
        usage.ru_utime + usage.ru_stime
        for usage in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )


def _mb(what: str) -> float:
    """RssAnon: memory of this process that is no file's; VmRSS: all that is resident; VmHWM: the most there was."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what)) / 1024


# The run.


def main() -> None:
    sets = {"emoji": emoji.source(ROOT / "emoji"), "synthetic": synthetic()}
    sharding = {name: compare_sharding(str(source)) for name, source in sets.items()}
    data = str(ROOT / "set")
    manifest = stages.shard(settings(), str(sets["synthetic"]), data)
    count = manifest.facts["train"]
    readers = [("read_ours", data, str(count)), ("read_plain", data, str(count))]
    ours, plain = zip(*([alone(*reader) for reader in readers] for _ in range(ROUNDS)), strict=True)
    held = alone("hold", data)
    start = alone("order", str(billion()))
    figures = {
        "shard_ratio_wall": min(s["wall"] for s in sharding.values()),
        "shard_ratio_cpu": min(s["cpu"] for s in sharding.values()),
        "loader_ratio": median_ratio(plain, ours, "cpu"),
        "loader_memory_ratio": held["mb"] / statistics.median(one["mb"] for one in ours),
        "order_start_seconds_1e9": start["wall"],
        "order_start_mb_1e9": start["peak_mb"],
        "sharding": sharding,
    }
    write_text(ROOT.parent / "data.json", json.dumps(figures, indent=1) + "\n")
    show(figures)


def compare_sharding(source: str) -> dict[str, float]:
    """Plain loop / ours: wall clock with two processes, processor time with one."""
    rounds: dict[str, list[dict[str, float]]] = {"plain": [], "one": [], "two": []}
    for _ in range(ROUNDS):
        for name, command in (
            ("plain", ("shard_plain",)), ("two", ("shard_ours", "2")), ("one", ("shard_ours", "1"))
        ):  # fmt: skip
            out = ROOT / "out"
            shutil.rmtree(out, ignore_errors=True)
            rounds[name].append(alone(command[0], source, str(out), *command[1:]))
    shutil.rmtree(out)
    return {
        "wall": median_ratio(rounds["plain"], rounds["two"], "wall"),
        "cpu": median_ratio(rounds["plain"], rounds["one"], "cpu"),
    }


def median_ratio(theirs: Any, ours: Any, what: str) -> float:
    return statistics.median(a[what] / b[what] for a, b in zip(theirs, ours, strict=True))


def alone(name: str, *arguments: str) -> dict[str, float]:
    command = [sys.executable, "-m", "tests.bench.data", name, *arguments]
    answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    result: dict[str, float] = json.loads(answer.splitlines()[-1])
    print(
        f"{name} {' '.join(arguments)}: " + ", ".join(f"{k} {v:.2f}" for k, v in result.items()), flush=True
    )
    return result


def synthetic() -> Path:
    """20,000 JPEGs of 160x120 pixels: smooth colours with some grain, in ten classes."""
    target = ROOT / "synthetic"
    if not target.is_dir():
        rng, draft = np.random.default_rng(0), ROOT / ".synthetic"
        for label in range(10):
            (draft / str(label)).mkdir(parents=True, exist_ok=True)
        for index in range(SYNTHETIC):
            coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
            smooth = np.asarray(coarse.resize((160, 120), Image.Resampling.BICUBIC), dtype=np.int16)
            grain = rng.integers(-12, 13, smooth.shape, dtype=np.int16)
            image = Image.fromarray((smooth + grain).clip(0, 255).astype(np.uint8))
            image.save(draft / str(index % 10) / f"{index:06d}.jpg", quality=90)
        draft.replace(target)
    return target


def billion() -> Path:
    """A manifest that lists a billion images; the shards themselves are not there."""
    target = ROOT / "billion"
    target.mkdir(parents=True, exist_ok=True)
    names = [f"train-{n:06d}-000.tar" for n in range(BILLIONS_SHARDS)]
    images = BILLION // BILLIONS_SHARDS
    manifest = artifact.Manifest(
        kind="shards",
        config=settings(),
        inputs={},
        files=[artifact.ArtifactFile(path=name, size=1, sha256="0" * 64) for name in names],
        facts={"shards": [{"file": name, "split": "train", "images": images} for name in names]},
        versions=staging.package_versions(),
        seconds=0,
    )
    write_text(target / artifact.MANIFEST, manifest.model_dump_json())
    return target


def show(figures: dict[str, Any]) -> None:
    table = Table(title="The data plane")
    table.add_column("measure")
    table.add_column("figure", justify="right")
    table.add_column("asked", justify="right")
    for name, ratios in figures["sharding"].items():
        table.add_row(
            f"sharding {name}: wall, two processes, over a plain loop", f"{ratios['wall']:.2f}x", ">= 1.8x"
        )
        table.add_row(f"sharding {name}: processor time, one process", f"{ratios['cpu']:.2f}x", ">= 1.0x")
    table.add_row(
        "reading: processor time, over plain webdataset", f"{figures['loader_ratio']:.2f}x", ">= 1.0x"
    )
    table.add_row(
        "reading: memory, over holding the set", f"1/{figures['loader_memory_ratio']:.0f}", "<= 1/5"
    )
    table.add_row("start on 10^9 images", f"{figures['order_start_seconds_1e9']:.2f} s", "< 10 s")
    table.add_row("memory of that", f"{figures['order_start_mb_1e9']:.0f} MB", "< 500 MB")
    Console().print(table)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(globals()[sys.argv[1]](*sys.argv[2:])))
    else:
        main()
