"""The distillation pipeline on this machine, through KFP's local runner: one process per stage, without a cluster."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import yaml
from kfp import local
from kfp.components import load_component_from_text
from kfp.dsl.base_component import BaseComponent
from kfp.local import logging_utils, subprocess_task_handler
from rich.console import Console
from rich.table import Table

from components.finish_run.outcome import FOLDERS
from components.prepare_run.cost import ACCELERATOR
from dmd2.errors import Refused
from dmd2.evaluation.scores import read_scores, sampled_image_sets, score_facts, score_table
from dmd2.io import artifact
from dmd2.io.local import write_text
from dmd2.plan.hardware import BY_DEVICE_NAME
from pipelines.cluster import compile_pipeline
from pipelines.distill import distill
from pipelines.pods import METRICS

INTERRUPTED = 130
"""Exit status of a stage that was stopped by Ctrl-C."""


class StageFailed(Refused):
    """A stage of a local run failed; the exit status is that of the stage."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(f"{message}; it ended with exit status {status} and says above what was wrong")
        self.status = status


CLUSTER = ("root", "nodes", "pool", "queue", "claim")
"""Parameters of the pipeline that mean a cluster, or are chosen here."""


def run_local(parameters: Mapping[str, Any], root: Path = Path("runs/demo")) -> None:
    """Run the distillation pipeline on this machine, one process per stage, without a cluster.

    Args:
        parameters: Those of the pipeline, without `CLUSTER`. Without `gpus`, all GPUs of this machine.
        root: Folder of everything the run makes; the same root continues a run.
    """
    began = time.monotonic()
    root = root.resolve()
    local.init(runner=local.SubprocessRunner(use_venv=False), pipeline_root=str(root / "kfp"))
    logging.getLogger().setLevel(logging.WARNING)
    # Stages run in this environment, without the container image and the resources of a cluster.
    warnings.filterwarnings("ignore", "You may be attem", RuntimeWarning)
    warnings.filterwarnings("ignore", ".*have no effect in the current local runner", UserWarning)
    with stage_status():
        gpus = parameters.get("gpus", -1)
        machine = {"gpus": _gpus() if gpus < 0 else gpus, "pool": _pool() if gpus else {}}
        _without_retries(distill)(**{**parameters, **machine, "root": str(root)})
    summary = summarize(root, time.monotonic() - began)
    write_text(root / "summary.json", json.dumps(summary, indent=1) + "\n")
    show(summary)


@contextmanager
def stage_status() -> Iterator[None]:
    """Raise StageFailed with the exit status of the stage that failed, or KeyboardInterrupt if it was stopped by Ctrl-C.

    kfp's local runner only distinguishes zero from other exit statuses, so its function that runs a process is replaced.
    It also replaces `print` and the root logger's handlers while a task runs, and tasks of a loop run in threads: what
    one of them restores is the other's replacement, so that every later line of this process would be indented.
    """
    statuses = list[int]()

    def run_and_record(full_command: list[str], env_vars: dict[str, str] | None = None) -> int:
        given = {name: value for name, value in (env_vars or {}).items() if name != METRICS}
        statuses.append(_run_stage(full_command, os.environ | given))
        return statuses[-1]

    logger = logging.getLogger()
    handlers, level = list(logger.handlers), logger.level
    kfp_functions = subprocess_task_handler.run_local_subprocess, logging_utils.indented_print
    subprocess_task_handler.run_local_subprocess, logging_utils.indented_print = run_and_record, nullcontext
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
        subprocess_task_handler.run_local_subprocess, logging_utils.indented_print = kfp_functions
        logger.handlers[:] = handlers
        logger.setLevel(level)


def _run_stage(command: list[str], environment: dict[str, str]) -> int:
    """Run a process, print its lines as they come, indented, and return its exit status."""
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, bufsize=1, env=environment
    ) as process:
        assert process.stdout is not None
        for line in _without_executor(process.stdout):
            print(f"    {line}", end="", flush=True)
        return process.wait()


def _without_executor(lines: Iterable[str]) -> Iterator[str]:
    """The lines without those of kfp's executor, among them the whole input of a task as JSON."""
    in_json = False
    for line in lines:
        if line.startswith("[KFP Executor"):
            in_json = line.rstrip().endswith("Got executor_input:")
        elif not in_json:
            yield line
        elif line.startswith("}"):
            in_json = False


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


def _pool() -> dict[str, str]:
    """The label by which nodes with this machine's GPU would be known, for the plan; empty without a GPU that it knows."""
    import torch

    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return {ACCELERATOR: f"nvidia-{BY_DEVICE_NAME[name]}"} if name in BY_DEVICE_NAME else {}


STAGES = {
    "shards": "shard", "teacher": "teach", "latents": "encode", "pairs": "pairs", "first": "first stage", "run": "distill",
    "evaluation": "evaluate", "gate": "gate", "package": "package",
}  # fmt: skip
"""{folder of a run: the stage that makes it}."""


def summarize(root: Path, wall_s: float) -> dict[str, Any]:
    """The run as one JSON object, from the manifests of its artifacts: scores, decision, times in seconds."""
    manifests = {
        name: artifact.read_manifest(root / name, FOLDERS[name]) for name in STAGES if (root / name).is_dir()
    }
    facts, gate = manifests["evaluation"].facts, manifests["gate"].facts
    seconds = {STAGES[name]: manifest.seconds for name, manifest in manifests.items()}
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
    """Print a summary: a column for each set of images and a row for each score, which fits 80 characters with many metrics."""
    console = Console()
    table = Table("", title=f"{summary['images']} images each; features: {summary['features']}")
    head, rows = score_table(summary)
    for title in (row[0] for row in rows):
        table.add_column(title, justify="right")
    for name, *values in list(zip(head, *rows, strict=True))[1:]:
        table.add_row(name, *(value.replace(" (", "\n(") for value in values))
    console.print(table)
    spent = ", ".join(f"{stage} {seconds:.0f} s" for stage, seconds in summary["seconds"].items())
    console.print(f"{summary['gate']}: {summary['reason']}\ntime: {spent}", highlight=False)
    for what in ("report", "package"):
        if summary[what]:
            print(f"{what}: {summary[what]}")
