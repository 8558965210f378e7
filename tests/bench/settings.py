"""What settings of the training cost in quality: FID and CLIP score of the emoji student over three seeds, `python -m tests.bench.settings`.

Each variant is `sdxl-4step-emoji` with some of its fields replaced and STEPS steps, so that the table compares settings and is
no measure of what the recipe reaches. Needs what `make demo-sdxl` made: its shards, latents and teacher. Prints a table, writes
runs/bench/settings.json. Runs and scores that are already there are not made again.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from subprocess import run as execute

from rich.console import Console
from rich.table import Table

from dmd2.io.artifact import read_manifest
from dmd2.io.local import write_text

DEMO = Path("runs/demo-sdxl")
ROOT = Path("runs/bench/settings")
RECIPE, STEPS = "sdxl-4step-emoji", 300
SEEDS = (0, 1, 2)
FAST = ["distill.continue_rollouts=True", "distill.gan.reuse_denoising_pass=True"]
VARIANTS = {
    "published": [],
    "-fast": FAST,
    "bfloat16": ["distill.dtype=bfloat16"],
    "bfloat16, passes without gradient in float32": ["distill.dtype=bfloat16", "distill.no_grad_dtype=tf32"],
}
METRICS = {"fid": "FID", "clip": "CLIP score"}


def main(names: list[str]) -> None:
    scores = {name: [measure(name, seed) for seed in SEEDS] for name in names or VARIANTS}
    write_text(ROOT.parent / "settings.json", json.dumps(scores, indent=1) + "\n")
    show(scores)


def measure(variant: str, seed: int) -> dict[str, float]:
    """The scores of one run."""
    name = f"{list(VARIANTS).index(variant)}-{seed}"
    run, out = ROOT / f"run-{name}", ROOT / f"evaluation-{name}"
    teacher = ["--teacher", str(DEMO / "teacher")]
    changes = [f"distill.steps={STEPS}", *VARIANTS[variant]]
    _dmd2("distill", changes, *teacher, "--data", DEMO / "latents", "--out", run, "--seed", seed)
    changes += [f"evaluate.metrics={' '.join(METRICS)}", "evaluate.clip=tests/emoji/clip_model"]
    _dmd2(
        "evaluate",
        changes,
        *teacher,
        "--data",
        DEMO / "shards",
        "--run",
        run,
        "--out",
        out,
        "--scores",
        ROOT / "scores",
    )
    facts = read_manifest(out, "evaluation").facts
    found = {metric: float(facts[f"{metric}_student"]) for metric in METRICS}
    print(f"{variant}, seed {seed}: {found}", flush=True)
    return found


def _dmd2(verb: str, changes: list[str], *flags: object) -> None:
    """Run a command in a process of its own."""
    words = [sys.executable, "-m", "dmd2", verb, RECIPE, *map(str, flags)]
    words += [word for change in changes for word in _flag(change)]
    execute(words, check=True)


def _flag(change: str) -> list[str]:
    field, _, value = change.partition("=")
    return [f"--{field.replace('_', '-')}", *value.split()]


def show(scores: dict[str, list[dict[str, float]]]) -> None:
    """Print mean, deviation and all runs of each variant."""
    table = Table(title=f"{RECIPE}, {STEPS} steps, {len(SEEDS)} seeds")
    table.add_column("variant")
    for title in METRICS.values():
        table.add_column(title, justify="right")
        table.add_column("runs", justify="right")
    for name, runs in scores.items():
        row = [name]
        for metric in METRICS:
            values = [run[metric] for run in runs]
            row += [
                f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}",
                ", ".join(f"{v:.3f}" for v in values),
            ]
        table.add_row(*row)
    Console().print(table)


if __name__ == "__main__":
    main(sys.argv[1:])
