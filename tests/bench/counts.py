"""Counts of a mean step for one image, without a GPU: `python -m tests.bench.counts sdxl-4step`.

The passes of the trainer run on tensors without data, at the real shapes, as the plan runs them. Counted are the operators
that allocate an output, which are kernels on a GPU in eager mode, the bytes that casts read and write, and FLOPs. All are
exact on any machine. Norms under autocast are counted as CUDA computes them. Prints a table and adds to runs/bench/counts.json.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Table
from tyro.conf import Positional

from dmd2 import recipes
from dmd2.config import Config
from dmd2.io.local import write_text
from dmd2.models.family import make_family
from dmd2.plan.hardware import GB, TERA
from dmd2.plan.passes import (
    MERGING,
    STUDENT,
    PassCosts,
    activation_checkpointing,
    fake_trainer,
    mean_calls,
    measure_passes,
)

OUT = Path("runs/bench/counts.json")


@dataclass(frozen=True)
class Counts:
    """Of a mean step with one image."""

    kernels: float
    cast_gb: float
    """1e9 bytes that casts read and write."""
    tflop: float
    graph_gb: float
    """1e9 bytes of activations that the student's graph keeps for its backward pass."""


def counted(config: Config) -> tuple[PassCosts, dict[str, float]]:
    """The cost of every pass with one image, and how often a mean step makes it."""
    fake = fake_trainer(config, make_family(config.family))
    with activation_checkpointing(fake, config.engine.activation_checkpointing):
        costs, calls = measure_passes(fake, rows=1), mean_calls(fake)
    if fake.merging:
        costs, calls = (
            costs | {MERGING: fake.merging},
            calls | {MERGING: 1 / config.distill.critic_updates},
        )
    return costs, calls


def mean_step(costs: PassCosts, calls: dict[str, float]) -> Counts:
    def total(name: str) -> float:
        return sum(often * getattr(costs[one], name) for one, often in calls.items())

    return Counts(total("kernels"), total("cast_bytes") / GB, total("flops") / TERA, costs[STUDENT].kept / GB)


def main(recipe: Positional[str], overrides: Positional[tuple[str, ...]] = ()) -> None:
    """Count.

    Args:
        recipe: Name of a recipe.
        overrides: Fields of its Config, such as engine.activation_checkpointing=full.
    """
    costs, calls = counted(recipes.resolve(recipe, overrides))
    found, name = mean_step(costs, calls), " ".join([recipe, *overrides])
    show(name, costs, calls, found)
    before = json.loads(OUT.read_text()) if OUT.is_file() else {}
    figures = {key: round(value, 2) for key, value in vars(found).items()}
    write_text(OUT, json.dumps(before | {name: figures}, indent=1) + "\n")


def show(name: str, costs: PassCosts, calls: dict[str, float], total: Counts) -> None:
    table = Table(title=f"{name}: counts per image and mean step")
    for column in ("pass", "times", "kernels", "GB of casts", "TFLOP", "GB of graph"):
        table.add_column(column, justify="left" if column == "pass" else "right")
    for one, often in calls.items():
        cost = costs[one]
        sizes = (cost.cast_bytes / GB, cost.flops / TERA, cost.kept / GB)
        table.add_row(one, f"{often:.2f}", f"{cost.kernels:,}", *(f"{size:.2f}" for size in sizes))
    table.add_section()
    table.add_row(
        "mean step", "", f"{total.kernels:,.0f}", f"{total.cast_gb:.2f}", f"{total.tflop:.2f}", f"{total.graph_gb:.2f}"
    )  # fmt: skip
    Console(width=110).print(table)


if __name__ == "__main__":
    tyro.cli(main)
