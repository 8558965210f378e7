"""`python -m pipelines compile | run-local`: the pipelines as files for a cluster, or as a run on this machine."""

from __future__ import annotations

import json
import logging
import re
import time
import warnings
from pathlib import Path
from typing import Any

import tyro
from kfp import compiler, local
from rich.console import Console
from rich.table import Table

from dmd2 import folders, storage
from dmd2.errors import Refused, one_sentence
from pipelines.distill import distill

COMPILED = Path(__file__).parent / "compiled"


def compile_all() -> None:
    """Compile the pipelines to `pipelines/compiled/*.yaml`, for review and for a cluster."""
    COMPILED.mkdir(exist_ok=True)
    compiler.Compiler().compile(distill, str(COMPILED / "distill.yaml"))
    print(COMPILED / "distill.yaml")


def run_local(
    root: Path = Path("runs/demo"),
    source: str = "digits",
    teacher: str = "",
    recipe: str = "edm-digits",
    overrides: str = "",
) -> None:
    """Run the distillation pipeline on this machine, one process per stage, without a cluster.

    Args:
        root: Folder that receives everything the run makes.
        source: `digits`, or the address of images in one of the layouts that `dmd2 shard` knows.
        teacher: Folder of a teacher, a pipeline of diffusers, or a checkpoint; empty to train a small one on the source.
        recipe: Name of a recipe, as `dmd2 --help` lists them.
        overrides: Fields of the recipe to replace, as `field=value`, separated by spaces.
    """
    start = time.monotonic()
    root = root.resolve()
    local.init(runner=local.SubprocessRunner(use_venv=False), pipeline_root=str(root / "kfp"))
    logging.getLogger().setLevel(logging.WARNING)
    # The image is for a cluster; here the stages run without it.
    warnings.filterwarnings("ignore", "You may be attem", RuntimeWarning)
    try:
        distill(root=str(root), source=source, teacher=teacher, recipe=recipe, overrides=overrides)
    except RuntimeError as error:
        told = re.sub(r"\x1b\[\d+m", "", str(error)).rstrip(".")
        raise Refused(f"{told}; the failed stage says above what was wrong") from None
    summary = summarize(root, time.monotonic() - start)
    storage.write(root / "summary.json", json.dumps(summary, indent=1) + "\n")
    show(summary)


def summarize(root: Path, wall_s: float) -> dict[str, Any]:
    """The run in one object, from the manifests of its folders."""
    kinds = {
        "shards": "shard",
        "teacher": "teach",
        "latents": "encode",
        "run": "distill",
        "evaluation": "evaluate",
        "gate": "gate",
    }
    manifests = {kind: folders.read(root / kind, kind) for kind in kinds if (root / kind).is_dir()}
    scores, gate = manifests["evaluation"].facts, manifests["gate"].facts
    accepted = gate["decision"] == "accepted"
    if accepted:
        manifests["package"] = folders.read(root / "package", "package")
    seconds = {kinds.get(kind, kind): manifest.seconds for kind, manifest in manifests.items()}
    names = (
        "fid_student",
        "fid_teacher",
        "fid_teacher_1step",
        "fid_real",
        "nfe_student",
        "nfe_teacher",
        "images",
    )
    return {name: scores[name] for name in names} | {
        "features": scores["features"],
        "variants": [{name: v[name] for name in ("recipe", "steps", "fd")} for v in scores["variants"]],
        "seconds": seconds | {"total": round(sum(seconds.values()), 1), "wall": round(wall_s, 1)},
        "gate": gate["decision"],
        "reason": gate["reason"],
        "package": str(root / "package") if accepted else None,
        "report": str(root / "report.html"),
    }


def show(summary: dict[str, Any]) -> None:
    console = Console()
    table = Table(title=f"{summary['images']} images each, FID on: {summary['features']}")
    for column in ("", "steps", "FID", "/ teacher's"):
        table.add_column(column, justify="right" if column else "left")
    rows = [(v["recipe"], str(v["steps"]), v["fd"]) for v in summary["variants"]]
    for name, steps, fid in [*rows, ("real training images", "-", summary["fid_real"])]:
        table.add_row(name, steps, f"{fid:.2f}", f"{fid / summary['fid_teacher']:.2f}")
    console.print(table)
    console.print(
        f"network calls per image: student {summary['nfe_student']}, teacher {summary['nfe_teacher']}"
    )
    spent = ", ".join(f"{stage} {seconds:.0f} s" for stage, seconds in summary["seconds"].items())
    console.print(f"{summary['gate']}: {summary['reason']}\ntime: {spent}", highlight=False)
    for what in ("report", "package"):
        if summary[what]:
            print(f"{what}: {summary[what]}")


if __name__ == "__main__":
    with one_sentence():
        tyro.extras.subcommand_cli_from_dict(
            {"compile": compile_all, "run-local": run_local}, prog="python -m pipelines"
        )
