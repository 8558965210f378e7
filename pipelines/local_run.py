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
from dmd2.evaluation.scores import read_scores, sampled_image_sets, score_facts, score_table
from dmd2.io import artifact
from dmd2.io.local import write_text
from pipelines.cluster import compile_pipeline
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
        root: Folder of everything the run makes; the same root continues a run.
        source: `digits`, or the address of images in a layout that `dmd2 shard` reads.
        teacher: Folder of a teacher, a pipeline of diffusers, or a checkpoint; empty to train a small one on the source.
        recipe: Name of a recipe, as `dmd2 --help` lists them.
        overrides: Fields of the recipe to replace, as `field=value`, separated by spaces.
        gate: Largest accepted score of the student as a multiple of the teacher's; 0 for the recipe's `gate.factor`.
        destination: Folder of models; an accepted package is published there as `<recipe>/<digest>`. Empty: it is not published.
        gpus: Number of GPUs of the distillation, one process on each; 0 = one process on the CPU, -1 = all GPUs of this machine.
    """
    start = time.monotonic()
    root = root.resolve()
    local.init(runner=local.SubprocessRunner(use_venv=False), pipeline_root=str(root / "kfp"))
    logging.getLogger().setLevel(logging.WARNING)
    # Stages run in this environment, without the container image and the resources of a cluster.
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
    spec, *settings = yaml.safe_load_all(compile_pipeline(pipeline).text)
    for component in (spec["root"], *spec["components"].values()):
        for task in component.get("dag", {}).get("tasks", {}).values():
            task.pop("retryPolicy", None)
    return load_component_from_text(yaml.safe_dump_all([spec, *settings]))


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


STAGES = {
    "shards": "shard", "teacher": "teach", "latents": "encode", "run": "distill", "evaluation": "evaluate", "gate": "gate",
    "package": "package",
}  # fmt: skip
"""{kind of an artifact: the stage that makes it}."""


def summarize(root: Path, wall_s: float) -> dict[str, Any]:
    """The run as one JSON object, from the manifests of its artifacts: scores, decision, times in seconds."""
    manifests = {kind: artifact.read_manifest(root / kind, kind) for kind in STAGES if (root / kind).is_dir()}
    facts, gate = manifests["evaluation"].facts, manifests["gate"].facts
    seconds = {STAGES[kind]: manifest.seconds for kind, manifest in manifests.items()}
    return score_facts(read_scores(facts), sampled_image_sets(facts)) | {
        "nfe_student": facts["nfe_student"],
        "nfe_teacher": facts["nfe_teacher"],
        "images": facts["images"],
        "features": facts["features"],
        "seconds": seconds | {"total": round(sum(seconds.values()), 1), "wall": round(wall_s, 1)},
        "gate": gate["decision"],
        "reason": gate["reason"],
        "package": str(root / "package") if gate["decision"] == "accepted" else None,
        "report": str(root / "report.html"),
    }


def show(summary: dict[str, Any]) -> None:
    """Print a summary."""
    console = Console()
    table = Table(title=f"{summary['images']} images each; features: {summary['features']}")
    head, rows = score_table(summary)
    for index, column in enumerate(head):
        table.add_column(column, justify="right" if index else "left")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    spent = ", ".join(f"{stage} {seconds:.0f} s" for stage, seconds in summary["seconds"].items())
    console.print(f"{summary['gate']}: {summary['reason']}\ntime: {spent}", highlight=False)
    for what in ("report", "package"):
        if summary[what]:
            print(f"{what}: {summary[what]}")
