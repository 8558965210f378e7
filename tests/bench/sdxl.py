"""The text-to-image recipes on the emoji teacher: `make bench-sdxl`, an hour and a half on two cores.

Four steps with and without backward simulation, as a low-rank update, and one step after its regression warm-up: each a
process on one core. Every student, and the teacher at many steps and few, is scored as `evaluate` does it: the same
held-out emoji, captions and noise. Prints a table, writes runs/bench/sdxl.json and a picture. Runs that are there are
not made again.
"""

from __future__ import annotations

import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from subprocess import run as execute
from typing import Any

import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor

from dmd2 import recipes, stages
from dmd2.config import Config
from dmd2.data.loader import Shards
from dmd2.data.shard_table import HOLDOUT
from dmd2.evaluation import metrics
from dmd2.evaluation.evaluator import Evaluator, score_states
from dmd2.evaluation.features import load_extractor
from dmd2.io.local import write_text
from dmd2.model import Model, load_network
from dmd2.stages.pictures import Sampler
from dmd2.stages.prompts import repeat_prompts
from tests.bench.batches import real_batches, sampled_batches
from tests.emoji.source import source

ROOT, EMOJI = Path("runs/bench/sdxl"), Path("runs/emoji/source")
BASE = "sdxl-4step-emoji"
RUNS = {
    BASE: "4 steps, backward simulation",
    "sdxl-1step-emoji": "1 step, after its warm-up",
    "sdxl-4step-lora-emoji": "4 steps, low-rank student",
    "sdxl-4step-noised-real-emoji": "4 steps, noised real inputs",
    "sdxl-4step-lora-noised-real-emoji": "4 steps, low-rank, noised real inputs",
}
SHOWN = 20
"""Emoji in each picture, five in a row."""


def main(teacher: str = "tests/emoji/pipeline", only: tuple[str, ...] = tuple(RUNS)) -> None:
    """Distil and score.

    Args:
        teacher: Pipeline folder of the teacher.
        only: Recipes to run and show.
    """
    base = recipes.get(BASE)
    stages.shard(base, str(source(EMOJI)), str(ROOT / "shards"))
    stages.resolve(base, teacher, str(ROOT / "teacher"))
    stages.encode(base, str(ROOT / "shards"), str(ROOT / "teacher"), str(ROOT / "latents"))
    with ThreadPoolExecutor(max_workers=2) as pool:  # a run a core: better than two cores a run
        seconds = dict(zip(only, pool.map(distill, only), strict=True))
    rows, pictures = score(base, only)
    write_text(ROOT.parent / "sdxl.json", json.dumps({"rows": rows, "seconds": seconds}, indent=1) + "\n")
    draw(pictures, ROOT.parent / "sdxl.png")
    show(rows)


def distill(recipe: str) -> float:
    """Seconds."""
    if recipe == "sdxl-1step-emoji":
        stage("pairs", recipe, "pairs", data="latents")
        stage("distill", "sdxl-1step-warmup-emoji", "sdxl-1step-warmup-emoji", data="pairs")
        return stage("distill", recipe, recipe, data="latents", start="sdxl-1step-warmup-emoji")
    return stage("distill", recipe, recipe, data="latents")


def stage(verb: str, recipe: str, out: str, **folders: str) -> float:
    """In a process of its own, on one thread."""
    flags = [word for name, folder in folders.items() for word in (f"--{name}", str(ROOT / folder))]
    command = [sys.executable, "-m", "dmd2", verb, recipe, *flags, "--teacher", str(ROOT / "teacher")]
    start = time.monotonic()
    with (ROOT / f"{out}.log").open("a") as log:
        execute(
            [*command, "--out", str(ROOT / out)],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stderr=log,
            stdout=log,
            check=True,
        )
    print(f"{verb} {recipe}: {time.monotonic() - start:.0f} s", flush=True)
    return round(time.monotonic() - start, 1)


def score(base: Config, only: tuple[str, ...]) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    settings = base.evaluate
    device, holdout = torch.device("cpu"), Shards(str(ROOT / "shards"), HOLDOUT)
    evaluator = Evaluator.load(
        metrics.select(["fid"]),
        settings,
        lambda: load_extractor(base, str(ROOT / "shards"), device),
        device,
    )
    real = list(real_batches(base.family, holdout, settings.images))
    reference = evaluator.accumulate(real)
    prompts = repeat_prompts([prompt for _, batch in real for prompt in batch], settings.images)
    rows, pictures = [], {}
    for name, recipe, steps, sampler in samplers(base, only):
        batches = list(sampled_batches(name, sampler, prompts, settings))
        scores = score_states(evaluator.accumulate(batches), reference)
        rows.append({"name": name, "recipe": recipe, "steps": steps, "fd": scores["fid"].value})
        pictures[name] = torch.cat([images for images, _ in batches])[:SHOWN]
    return rows, pictures


def samplers(base: Config, only: tuple[str, ...]) -> list[tuple[str, str, int, Sampler]]:
    """(name, recipe, steps, what draws)."""
    guide = load_network(ROOT / "teacher")
    found: list[tuple[str, str, int, Sampler]] = []
    for steps in (base.evaluate.teacher_steps, 4, 1):
        name = f"teacher, {steps} guided step{'s' if steps > 1 else ''}"
        found.append((name, "teacher", steps, guided(guide, steps, base)))
    for recipe in only:
        student = load_network(ROOT / recipe)
        for count in sorted({len(student.timesteps), 1}, reverse=True):
            name = f"{RUNS[recipe]}{', only the first taken' if count < len(student.timesteps) else ''}"
            found.append((name, recipe, count, replace(student, timesteps=student.timesteps[:count]).sample))
    return found


def guided(guide: Model, steps: int, base: Config) -> Sampler:
    return lambda part, seed: guide.sample_teacher(part, seed, steps, base.evaluate.teacher_guidance)


def show(rows: list[dict[str, Any]]) -> None:
    teacher = rows[0]["fd"]
    table = Table(title="Frechet distance to 786 held-out emoji, EfficientNet-Lite0 features")
    for column in ("", "steps", "FD", "/ teacher's"):
        table.add_column(column, justify="right" if column else "left")
    for row in rows:
        table.add_row(row["name"], str(row["steps"]), f"{row['fd']:.1f}", f"{row['fd'] / teacher:.2f}")
    Console().print(table)


def draw(pictures: dict[str, Tensor], path: Path) -> None:
    """The same captions and noise in every panel."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from dmd2.image_grid import image_grid

    figure, axes = plt.subplots(
        2, -(-len(pictures) // 2), figsize=(3.6 * -(-len(pictures) // 2), 6.4), dpi=100
    )
    for axis in axes.flat:
        axis.axis("off")
    for axis, (name, images) in zip(axes.flat, pictures.items(), strict=False):
        axis.imshow(image_grid(images, 5))
        axis.set_title(name, fontsize=9)
    figure.tight_layout()
    figure.savefig(path)


if __name__ == "__main__":
    tyro.cli(main)
