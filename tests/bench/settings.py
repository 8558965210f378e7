"""What settings of the training cost in quality: scores of small students over three seeds, `python -m tests.bench.settings RECIPE [VARIANT ...]`.

Each variant is the recipe with some of its fields replaced. The emoji have 300 of their 800 steps, so their table compares settings
and is no measure of what the recipe reaches. Needs what `make demo` (digits) or `make demo-sdxl` (emoji) made: images and teacher.
Prints a table, writes runs/bench/settings/RECIPE.json. Runs and scores that are already there are not made again.
"""

from __future__ import annotations

import json
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from subprocess import run as execute

from rich.console import Console
from rich.table import Table

from dmd2.io.artifact import read_manifest
from dmd2.io.local import write_text

ROOT = Path("runs/bench/settings")
SEEDS = (0, 1, 2)
REUSE = ["distill.gan.reuse_denoising_pass=True"]
MOMENTS = ["distill.student.moments=8bit", "distill.critic.moments=8bit"]


@dataclass(frozen=True)
class Comparison:
    """Variants of one recipe."""

    steps: int
    demo: Path
    """What the demo made: teacher, shards and, of the emoji, latents."""
    data: str
    """The folder in it that the training reads."""
    metrics: dict[str, str]
    """With their titles in the table."""
    variants: dict[str, list[str]]
    """The fields that each replaces."""
    evaluation: tuple[str, ...] = ()
    """Fields of the evaluation."""


COMPARISONS = {
    "edm-digits": Comparison(
        1600,
        Path("runs/demo"),
        "shards",
        {"fid": "FID", "recall": "recall"},
        {"published": [], "reuse_denoising_pass": REUSE, "8-bit moments": MOMENTS},
        ("evaluate.metrics=fid precision recall",),
    ),
    "sdxl-4step-emoji": Comparison(
        300,
        Path("runs/demo-sdxl"),
        "latents",
        {"fid": "FID", "clip": "CLIP score"},
        {
            "published": [],
            "-fast": ["distill.continue_rollouts=True", *REUSE],
            "bfloat16": ["distill.dtype=bfloat16"],
            "bfloat16, passes without gradient in float32": [
                "distill.dtype=bfloat16",
                "distill.no_grad_dtype=tf32",
            ],
            "8-bit moments": MOMENTS,
        },
        ("evaluate.metrics=fid clip", "evaluate.clip=tests/emoji/clip_model"),
    ),
}


def main(recipe: str, *names: str) -> None:
    compared = COMPARISONS[recipe]
    scores = {name: [measure(recipe, name, seed) for seed in SEEDS] for name in names or compared.variants}
    write_text(ROOT / f"{recipe}.json", json.dumps(scores, indent=1) + "\n")
    show(recipe, scores)


def measure(recipe: str, variant: str, seed: int) -> dict[str, float]:
    """The scores of one run."""
    compared = COMPARISONS[recipe]
    place = ROOT / recipe / f"{list(compared.variants).index(variant)}-{seed}"
    run, out = place / "run", place / "evaluation"
    changes = [f"distill.steps={compared.steps}", *compared.variants[variant]]
    teacher = ["--teacher", compared.demo / "teacher"]
    trained = ["--data", compared.demo / compared.data, "--out", run, "--seed", seed]
    _dmd2("distill", recipe, changes, *teacher, *trained)
    changes += compared.evaluation
    scored = [
        "--data",
        compared.demo / "shards",
        "--run",
        run,
        "--out",
        out,
        "--scores",
        ROOT / recipe / "scores",
    ]
    _dmd2("evaluate", recipe, changes, *teacher, *scored)
    facts = read_manifest(out, "evaluation").facts
    found = {metric: float(facts[f"{metric}_student"]) for metric in compared.metrics}
    print(f"{variant}, seed {seed}: {found}", flush=True)
    return found


def _dmd2(verb: str, recipe: str, changes: list[str], *flags: object) -> None:
    """Run a command in a process of its own."""
    words = [sys.executable, "-m", "dmd2", verb, recipe, *map(str, flags)]
    words += [word for change in changes for word in _flag(change)]
    execute(words, check=True)


def _flag(change: str) -> list[str]:
    field, _, value = change.partition("=")
    return [f"--{field.replace('_', '-')}", *value.split()]


def show(recipe: str, scores: dict[str, list[dict[str, float]]]) -> None:
    """Print mean, deviation and all runs of each variant."""
    compared = COMPARISONS[recipe]
    table = Table(title=f"{recipe}, {compared.steps} steps, {len(SEEDS)} seeds")
    table.add_column("variant")
    for title in compared.metrics.values():
        table.add_column(title, justify="right")
        table.add_column("runs", justify="right")
    for name, runs in scores.items():
        row = [name]
        for metric in compared.metrics:
            values = [run[metric] for run in runs]
            row += [
                f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}",
                ", ".join(f"{v:.3f}" for v in values),
            ]
        table.add_row(*row)
    Console().print(table)


if __name__ == "__main__":
    main(*sys.argv[1:])
