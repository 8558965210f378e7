"""What grows with the number of images, units and shards: seconds and memory at 1,000,000 of each: the second half of `make bench-data`.

Each measurement is made in a process of its own, on made-up names: no image is decoded. Prints a table, writes
runs/bench/scale.json.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from dmd2.config import LoaderConfig
from dmd2.data import shards
from dmd2.data.layouts import open_source
from dmd2.data.loader import DataLoader, Shards
from dmd2.data.shard_table import ShardInfo, register_shards
from dmd2.data.unit_results import UnitResults
from dmd2.data.units import ReportProgress, ShardingJob, Unit, split_into_units
from dmd2.data.workers import run_in_processes
from dmd2.io import storage
from dmd2.io.local import LocalStore
from dmd2.io.staging import draft_artifact
from dmd2.io.store import ObjectInfo
from tests.bench.data import ROOT, measured, settings

MILLION = 1_000_000
CLASSES = 1000


class MadeUpStore(LocalStore):
    """A bucket that lists `made://<count>` images in folders of classes; there is nothing in them."""

    def __init__(self, uri: str | Path) -> None:
        super().__init__(ROOT / "nothing")
        self.uri, self.count = str(uri), int(str(uri).removeprefix("made://"))
        self.local_folder: Path | None = None  # type: ignore[assignment]

    def list_objects(self, prefix: str = "") -> list[ObjectInfo]:
        names = (f"n{n % CLASSES:08d}/n{n % CLASSES:08d}_{n}.JPEG" for n in range(self.count))
        return sorted(ObjectInfo(name, 110_000, "1700000000000000 AAAAAA==") for name in names)


storage.SCHEMES["made"] = MadeUpStore


def listing(count: str) -> dict[str, float]:
    """List images on a bucket and divide them into units of work."""

    def work() -> None:
        source = open_source(f"made://{count}")
        units = split_into_units(source, settings())
        assert sum(unit.size or 0 for unit in units) == len(source.records) == int(count)

    return measured(work)


def units(count: str) -> dict[str, float]:
    """Give out units to two processes, take their results, and sum them up."""
    config = settings()
    made = [Unit(n, lambda account: iter(()), "train", 1) for n in range(int(count))]
    job = ShardingJob(config.data, 64, 3, ROOT, LocalStore(ROOT), False, 0)

    def work() -> None:
        results, broken = UnitResults(shards.UnitResult, {}), list[str]()
        for unit, text in run_in_processes("units", _empty_unit, made, job, 2):
            broken += results.add(unit.number, text).broken
            shards._check_broken(broken, config.data.max_broken)
        assert len(results) == len(made)

    return measured(work)


def _empty_unit(unit: Unit, job: ShardingJob, count: ReportProgress) -> str:
    shard = ShardInfo(file=f"train-{unit.number:06d}-000.tar", split="train", images=1, histogram={0: 1})
    return shards.UnitResult(shards=[shard]).model_dump_json()


def write_list(count: str, out: str) -> dict[str, float]:
    """Publish an artifact that lists shards."""

    def work() -> None:
        with draft_artifact(out, "shards", settings(), {}) as draft:
            draft.facts |= register_shards(_shards(int(count)), draft)

    return measured(work)


def _shards(count: int) -> Iterable[ShardInfo]:
    for n in range(count):
        yield ShardInfo(
            file=f"train-{n:06d}-000.tar", split="train", images=1000, size=10**8, sha256=f"{n:064x}", crc32c="00000000",
            histogram={0: 1000},
        )  # fmt: skip


def read_list(count: str, out: str) -> dict[str, float]:
    """Start a training on it: read the list, and find the first batch of 2,048 in 64 lanes, of 64 ranks."""

    def work() -> None:
        found = Shards(out, "train")
        stream = DataLoader(found, 2048, 0, LoaderConfig(lanes=64), rank=0, world=64)
        assert len(found) == 1000 * int(count)
        assert len({stream.order.sample(position) for position in range(0, 2048, 64)}) == 32

    return measured(work)


def main(counts: Iterable[int] = (MILLION // 10, MILLION)) -> None:
    figures: dict[str, Any] = {}
    out = str(ROOT / "listed")
    for count in counts:
        shutil.rmtree(out, ignore_errors=True)
        for name, more in (("listing", ()), ("units", ()), ("write_list", (out,)), ("read_list", (out,))):
            figures[f"{name} {count}"] = alone(name, str(count), *more)
    shutil.rmtree(out)
    (ROOT.parent / "scale.json").write_text(json.dumps(figures, indent=1) + "\n")
    show(figures)


def alone(name: str, *arguments: str) -> dict[str, float]:
    command = [sys.executable, "-m", "tests.bench.scale", name, *arguments]
    answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    result: dict[str, float] = json.loads(answer.splitlines()[-1])
    return result


def show(figures: dict[str, Any]) -> None:
    table = Table(title="Scale")
    for column in ("measure", "seconds", "of processors", "MB"):
        table.add_column(column, justify="left" if column == "measure" else "right")
    for name, figure in figures.items():
        seconds = (f"{figure[what]:.1f}" for what in ("wall", "cpu"))
        table.add_row(name, *seconds, f"{figure['peak_mb']:.0f}")
    Console().print(table)


if __name__ == "__main__":
    ROOT.mkdir(parents=True, exist_ok=True)
    if len(sys.argv) > 1:
        print(json.dumps(globals()[sys.argv[1]](*sys.argv[2:])))
    else:
        main()
