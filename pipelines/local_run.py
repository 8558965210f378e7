"""The distillation pipeline on this machine, through KFP's local runner: one process per stage, without a cluster."""

from __future__ import annotations

import json
import logging
import re
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from kfp import local
from kfp.components import load_component_from_text
from kfp.dsl.base_component import BaseComponent
from kfp.local import subprocess_task_handler
from rich.console import Console
from rich.table import Table

from dmd2.errors import Refused
from dmd2.io import artifact
from dmd2.io.local import write_text
from pipelines.cluster import compiled
from pipelines.distill import distill

INTERRUPTED = 130
"""Exit status of a stage that was stopped by Ctrl-C."""


class StageFailed(Refused):
    """A stage of a local run failed; the exit status is that of the stage."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(f"{message}; it ended with exit status {status} and says above what was wrong")
        self.status = status


def run_local(
    root: Path = Path("runs/demo"),
    source: str = "digits",
    teacher: str = "",
    recipe: str = "edm-digits",
    overrides: str = "",
    gate: float = 0.0,
    destination: str = "",
    gpus: int = -1,
) -> None:
    """Run the distillation pipeline on this machine, one process per stage, without a cluster.

    Args:
        root: Folder that receives everything the run makes.
        source: `digits`, or the address of images in one of the layouts that `dmd2 shard` knows.
        teacher: Folder of a teacher, a pipeline of diffusers, or a checkpoint; empty to train a small one on the source.
        recipe: Name of a recipe, as `dmd2 --help` lists them.
        overrides: Fields of the recipe to replace, as `field=value`, separated by spaces.
        gate: The student is accepted if its FID is at most this many times the teacher's; 0 for the recipe's factor.
        destination: Folder of models; an accepted one is published there. Empty: it stays in the root.
        gpus: GPUs of the distillation, one process on each; 0 for the CPU, -1 for those of this machine.
    """
    start = time.monotonic()
    root = root.resolve()
    local.init(runner=local.SubprocessRunner(use_venv=False), pipeline_root=str(root / "kfp"))
    logging.getLogger().setLevel(logging.WARNING)
    # The image is for a cluster; here the stages run without it, and without its resources.
    warnings.filterwarnings("ignore", "You may be attem", RuntimeWarning)
    warnings.filterwarnings("ignore", ".*have no effect in the current local runner", UserWarning)
    with stage_status():
        _without_retries(distill)(
            root=str(root), source=source, teacher=teacher, recipe=recipe, overrides=overrides,
            gate=gate, destination=destination, gpus=_gpus() if gpus < 0 else gpus, pool={},
        )  # fmt: skip
    summary = summarize(root, time.monotonic() - start)
    write_text(root / "summary.json", json.dumps(summary, indent=1) + "\n")
    show(summary)


@contextmanager
def stage_status() -> Iterator[None]:
    """Raise StageFailed with the exit status of the stage that failed, or KeyboardInterrupt if it was stopped by Ctrl-C.

    kfp's local runner only distinguishes zero from other exit statuses, so its function that runs a process is wrapped.
    """
    run_process, statuses = subprocess_task_handler.run_local_subprocess, list[int]()

    def run_and_record(*args: Any, **kwargs: Any) -> int:
        statuses.append(run_process(*args, **kwargs))
        return statuses[-1]

    subprocess_task_handler.run_local_subprocess = run_and_record
    try:
        yield
    except RuntimeError as error:
        failed = [status if status > 0 else 128 - status for status in statuses if status]
        if not failed:
            raise
        if failed[0] == INTERRUPTED:
            raise KeyboardInterrupt from None
        raise StageFailed(re.sub(r"\x1b\[\d+m", "", str(error)).rstrip("."), failed[0]) from None
    finally:
        subprocess_task_handler.run_local_subprocess = run_process


def _without_retries(pipeline: BaseComponent) -> BaseComponent:
    """The pipeline without its retries: the user sees a failure at once, and can start the same command again."""
    spec, *settings = yaml.safe_load_all(compiled(pipeline).text)
    for component in (spec["root"], *spec["components"].values()):
        for task in component.get("dag", {}).get("tasks", {}).values():
            task.pop("retryPolicy", None)
    return load_component_from_text(yaml.safe_dump_all([spec, *settings]))


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


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
    manifests = {kind: artifact.read_manifest(root / kind, kind) for kind in kinds if (root / kind).is_dir()}
    scores, gate = manifests["evaluation"].facts, manifests["gate"].facts
    accepted = gate["decision"] == "accepted"
    if accepted:
        manifests["package"] = artifact.read_manifest(root / "package", "package")
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
