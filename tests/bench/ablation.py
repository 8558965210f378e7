"""The ablation of the DMD2 paper (its table 3) on handwritten digits: `make bench-ablation`.

One teacher; three variants of the recipe, three seeds each: DMD without the two time-scale rule, with it, with it
and the GAN. Every run has the same number of steps and batch, those of the demo; the teacher has had less training
than the demo's. Prints a table, writes runs/bench/ablation.json. Runs that are already there are not made again.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from subprocess import run as execute
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from dmd2 import recipes, stages
from dmd2.config import Config
from dmd2.data.loader import Shards
from dmd2.data.shard_table import HOLDOUT
from dmd2.evaluation import metrics
from dmd2.evaluation.evaluator import Evaluator, score_states
from dmd2.evaluation.features import load_extractor
from dmd2.io.local import write_text
from dmd2.model import load_network
from dmd2.stages.prompts import repeat_prompts
from tests.bench.batches import real_batches, sampled_batches

ROOT = Path("runs/bench/ablation")
VARIANTS = {
    "edm-digits-no-ttur": "DMD, no TTUR (critic x1)",
    "edm-digits-no-gan": "DMD + TTUR (critic x5)",
    "edm-digits": "DMD + TTUR + GAN",
}
SEEDS = (0, 1, 2)
TEACHER_STEPS = 700
"""Not half of the demo's: a teacher that has faults the GAN can mend, as the paper's have."""


def main() -> None:
    base = recipes.resolve("edm-digits", [f"teach.steps={TEACHER_STEPS}"])
    shards, teacher = str(ROOT / "shards"), str(ROOT / "teacher")
    stages.shard(base, "digits", shards)
    stages.teach(base, shards, teacher)
    jobs = [(variant, seed) for variant in reversed(VARIANTS) for seed in SEEDS]
    with ThreadPoolExecutor(max_workers=2) as pool:  # a run a core: better than two cores a run
        list(pool.map(lambda job: distill(*job), jobs))
    first = stages.evaluate(base, shards, teacher, str(_run(*jobs[0])), str(ROOT / "evaluation"))
    rows = score(base, shards, jobs)
    write_text(ROOT.parent / "ablation.json", json.dumps(rows, indent=1) + "\n")
    show(rows, first.facts)


def distill(variant: str, seed: int) -> None:
    """One run, in a process of its own, on one thread."""
    folders = {"data": ROOT / "shards", "teacher": ROOT / "teacher", "out": _run(variant, seed)}
    flags = [word for name, folder in folders.items() for word in (f"--{name}", str(folder))]
    command = [sys.executable, "-m", "dmd2", "distill", variant, *flags, "--seed", str(seed)]
    start = time.monotonic()
    with (ROOT / f"{variant}-{seed}.log").open("a") as log:
        execute(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=log, stdout=log, check=True)
    print(f"{variant}, seed {seed}: {time.monotonic() - start:.0f} s", flush=True)


def score(base: Config, shards: str, jobs: list[tuple[str, int]]) -> list[dict[str, Any]]:
    """FID of every student as `evaluate` takes it: the same features, classes, noise and held-out images."""
    device, settings = torch.device("cpu"), base.evaluate
    holdout = Shards(shards, HOLDOUT)
    evaluator = Evaluator.load(
        metrics.select(["fid"]), settings, lambda: load_extractor(base, shards, device), device
    )
    real = list(real_batches(base.family, holdout, settings.images))
    reference = evaluator.accumulate(real)
    classes = repeat_prompts([prompt for _, prompts in real for prompt in prompts], settings.images)
    rows = []
    for variant, seed in jobs:
        batches = sampled_batches(variant, load_network(_run(variant, seed)).sample, classes, settings)
        scores = score_states(evaluator.accumulate(batches), reference)
        rows.append({"variant": variant, "seed": seed, "fid": scores["fid"].value})
    return rows


def _run(variant: str, seed: int) -> Path:
    return ROOT / f"{variant}-{seed}"


def show(rows: list[dict[str, Any]], facts: dict[str, Any]) -> None:
    scores: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        scores[row["variant"]].append(row["fid"])
    teacher = facts["fid_teacher"]
    table = Table(
        title=f"FID of the one-step student, {len(SEEDS)} seeds; teacher at {facts['nfe_teacher']} calls: {teacher:.2f}"
    )
    for column in ("variant", "mean", "deviation", "runs", "/ teacher's"):
        table.add_column(column, justify="left" if column == "variant" else "right")
    for variant, name in VARIANTS.items():
        fids = scores[variant]
        mean = statistics.mean(fids)
        runs = ", ".join(f"{fid:.2f}" for fid in fids)
        table.add_row(name, f"{mean:.2f}", f"{statistics.stdev(fids):.2f}", runs, f"{mean / teacher:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
