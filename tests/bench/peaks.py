"""Predicted peak memory of a GPU for SDXL by mode, from the real shapes (`dmd2 plan`): `python -m tests.bench.peaks`.

Eight GPUs of 80 GB with micro-batches of two and of eight, and the LoRA recipe with a shared base on 24 GB. Prints a table and
adds to runs/bench/engine.json. Nothing is measured on a GPU.
"""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console
from rich.table import Table

from dmd2 import recipes
from dmd2.io.local import write_text
from dmd2.models.family import make_family
from dmd2.models.stable import published_pipeline
from dmd2.plan.prediction import make_plan
from dmd2.plan.traffic import mesh_shape

OUT = Path("runs/bench/engine.json")
CASES = (
    ("sdxl-4step", "h100-80gb", 2),
    ("sdxl-4step", "h100-80gb", 8),
    ("sdxl-4step-shared", "l4-24gb", 1),
)


def main() -> None:
    table = Table(title="Predicted peak memory of one of eight GPUs, GB")
    for column in ("recipe", "GPU", "micro-batch", "mesh", "weights", "checkpointing", "GB", "fits"):
        table.add_column(column)
    figures: dict[str, float] = {}
    for recipe, gpu, rows in CASES:
        config = recipes.resolve(recipe, [f"engine.micro_batch={rows}"])
        family = make_family(config.family, published_pipeline("sdxl"))
        made = make_plan(config, family, gpu, mesh_shape(config, 1, 8))
        for alternative in made.alternatives:
            if alternative.mesh.shards == 8:
                weights = "resident" if alternative.resident else "sharded"
                figures[f"{recipe}, micro-batch {rows}, {weights}, {alternative.checkpointing}"] = round(
                    alternative.gb, 1
                )
                row = (recipe, gpu, str(rows), str(alternative.mesh), weights, alternative.checkpointing)
                table.add_row(*row, f"{alternative.gb:.1f}", "yes" if alternative.fits else "no")
    Console(width=130).print(table)
    before = json.loads(OUT.read_text()) if OUT.is_file() else {}
    write_text(OUT, json.dumps(before | {"peak_memory_gb": figures}, indent=1) + "\n")


if __name__ == "__main__":
    main()
