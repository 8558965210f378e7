"""`python -m pipelines VERB`: the pipelines as files, as a run on this machine, or as runs of a cluster."""

from __future__ import annotations

import inspect
import json
import logging
import re
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
import yaml
from google.protobuf.json_format import MessageToDict
from kfp import local
from kfp.components import load_component_from_text
from kfp.dsl.base_component import BaseComponent
from kfp.pipeline_spec.pipeline_spec_pb2 import ParameterType
from rich.console import Console
from rich.table import Table

from components.begin.check import check
from components.distill.launch import flags
from dmd2.errors import Refused, one_sentence
from dmd2.io import artifact
from dmd2.io.local import write_text
from pipelines import cluster, readme
from pipelines.cluster import Where, compiled
from pipelines.distill import distill
from pipelines.retrain import retrain

COMPILED = Path(__file__).parent / "compiled"
PIPELINES: dict[str, BaseComponent] = {"distill": distill, "retrain": retrain}
ACCELERATOR = "cloud.google.com/gke-accelerator"
RETRAIN = "dmd2-retrain"
"""The name of the schedule, unless another is given."""
STRUCT = ParameterType.ParameterTypeEnum.STRUCT
TYPES: dict[str, Any] = {"STRING": str, "NUMBER_INTEGER": int, "NUMBER_DOUBLE": float, "BOOLEAN": bool}


def compile_all() -> None:
    """Compile the pipelines to `pipelines/compiled/*.yaml`, and the components' README, for review and for a cluster."""
    COMPILED.mkdir(exist_ok=True)
    for name, pipeline in PIPELINES.items():
        write_text(COMPILED / f"{name}.yaml", compiled(pipeline).text)
        print(COMPILED / f"{name}.yaml")
    write_text(readme.PATH, readme.text())
    print(readme.PATH)


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
    try:
        _at_once(distill)(
            root=str(root), source=source, teacher=teacher, recipe=recipe, overrides=overrides,
            gate=gate, destination=destination, gpus=_gpus() if gpus < 0 else gpus, pool={},
        )  # fmt: skip
    except RuntimeError as error:
        told = re.sub(r"\x1b\[\d+m", "", str(error)).rstrip(".")
        raise Refused(f"{told}; the failed stage says above what was wrong") from None
    summary = summarize(root, time.monotonic() - start)
    write_text(root / "summary.json", json.dumps(summary, indent=1) + "\n")
    show(summary)


def _at_once(pipeline: BaseComponent) -> BaseComponent:
    """The pipeline without its retries: here somebody is looking, and a wrong input stays wrong."""
    spec, *settings = yaml.safe_load_all(compiled(pipeline).text)
    for component in (spec["root"], *spec["components"].values()):
        for task in component.get("dag", {}).get("tasks", {}).values():
            task.pop("retryPolicy", None)
    return load_component_from_text(yaml.safe_dump_all([spec, *settings]))


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


def upload(where: Where) -> None:
    """Put the pipelines on the server; a version that is there already is left alone."""
    for pipeline in PIPELINES.values():
        package = compiled(pipeline)
        cluster.upload(where, package)
        print(f"{package.name}, version {package.version}: there")


def submit(
    where: Where,
    parameters: dict[str, Any],
    name: str = "",
    dry_run: bool = False,
    price: float = 0.0,
    wait: bool = False,
) -> None:
    """Start a distillation on the cluster.

    Args:
        name: Name of the run; empty for the recipe and the time.
        dry_run: Say what would be started, and what it would cost; talk to no server.
        price: Of a GPU for an hour, in any currency, for what it would cost.
        wait: Until it has ended; the exit status is the run's: 0 succeeded, 1 failed, 130 cancelled.
    """
    package = compiled(distill)
    name = name or f"{parameters['recipe']}-{datetime.now(UTC):%Y%m%d-%H%M%S}"
    _told(package, name, parameters)
    if dry_run:
        _missing(parameters)
        _plan(parameters, price)
        return
    _check(parameters)
    run_id = cluster.submit(where, package, name, parameters)
    print(f"run {run_id}\n{where.run(run_id)}")
    if wait:
        _wait(where, run_id)


def schedule(
    where: Where,
    parameters: dict[str, Any],
    cron: str = "0 0 6 * * 1",
    name: str = RETRAIN,
    dry_run: bool = False,
) -> None:
    """Have the pipeline that looks for new teachers run again and again, one run at a time; what is missed is not made up for.

    Args:
        cron: When: second, minute, hour, day of the month, month, day of the week; in UTC.
        name: Name of the schedule; there is never more than one of a name.
        dry_run: Say what would be scheduled; talk to no server.
    """
    if len(cron.split()) != 6:
        raise Refused(f"cron is {cron!r}; it has six fields, the first of them the second, as '0 0 6 * * 1'")
    if empty := [parameter for parameter in ("teachers", "ledger", "root") if not parameters[parameter]]:
        raise Refused(f"{empty[0]} is empty; give its address by --{empty[0]}")
    package = compiled(retrain)
    _told(package, name, parameters)
    print(f"at {cron}")
    if not dry_run:
        print(f"schedule {cluster.schedule(where, package, name, cron, parameters)}")


def unschedule(where: Where, name: str = RETRAIN) -> None:
    """Have it run no more.

    Args:
        name: Name of the schedule.
    """
    print(f"{cluster.unschedule(where, name)} removed")


def status(where: Where, run: str = "") -> None:
    """How a run is, step by step; or, without one, the last ten.

    Args:
        run: Its id.
    """
    if not run:
        for one in cluster.recent(where):
            print(
                f"{one.run_id}  {(one.state or 'PENDING').lower():<10} {one.created_at:%Y-%m-%d %H:%M} {one.display_name}"
            )
        return
    found = cluster.run(where, run)
    print(f"{found.display_name}: {(found.state or 'PENDING').lower()}\n{where.run(run)}")
    for task in cluster.tasks(found):
        said = f"  {task.error.message}" if task.error and task.error.message else ""
        print(f"  {task.display_name:<18} {task.state.lower()}{said}")
    if found.error and found.error.message:
        print(found.error.message)


def logs(where: Where, run: str, task: str = "", lines: int = 200) -> None:
    """What the steps of a run say, as far as their pods are there.

    Args:
        run: Its id.
        task: Only of steps with this in their name.
        lines: The last so many of each.
    """
    for step, text in cluster.logs(where, run, task, lines):
        print(f"== {step}\n{text}")


def cancel(where: Where, run: str, wait: bool = False) -> None:
    """Stop a run. What its stages have saved is continued by a run with the same root.

    Args:
        run: Its id.
        wait: Until it has ended.
    """
    cluster.cancel(where, run)
    print(f"told to stop\n{where.run(run)}")
    if wait:
        print(cluster.wait(where, run, print).lower())


def _wait(where: cluster.Cluster, run: str) -> None:
    state = cluster.wait(where, run, lambda line: print(line, flush=True))
    if code := cluster.STATUS[state]:
        print(
            f"run {run} ended {state.lower()}; python -m pipelines logs --run {run} says why", file=sys.stderr
        )
        raise SystemExit(code)


def _told(package: cluster.Package, name: str, parameters: dict[str, Any]) -> None:
    print(f"{package.name}, version {package.version}: {name}")
    for parameter, value in parameters.items():
        print(f"  {parameter:<14} {json.dumps(value) if isinstance(value, dict) else value}")


def _check(parameters: dict[str, Any]) -> None:
    """What the first step of the run would refuse is refused here."""
    check(**{name: parameters[name] for name in inspect.signature(check).parameters})


def _missing(parameters: dict[str, Any]) -> None:
    try:
        _check(parameters)
    except Refused as error:
        print(f"not yet ready to be submitted: {error}")


def _plan(parameters: dict[str, Any], price: float) -> None:
    """What it would cost, as the library reckons."""
    sys.stdout.flush()
    kind = parameters["pool"].get(ACCELERATOR, "").removeprefix("nvidia-")
    if not kind or not parameters["gpus"]:
        print(f"no plan without GPUs, or without {ACCELERATOR} in the pool")
    else:
        size = {
            "--gpu": kind,
            "--gpus-per-node": parameters["gpus"],
            "--nodes": parameters["nodes"],
            "--price": price,
        }
        words = [*(str(word) for pair in size.items() for word in pair), *flags(parameters["overrides"])]
        planned = subprocess.run([sys.executable, "-m", "dmd2", "plan", parameters["recipe"], *words])
        if planned.returncode:
            raise SystemExit(planned.returncode)


def with_parameters(action: Callable[..., None], pipeline: BaseComponent) -> Callable[..., None]:
    """The action with a flag for each parameter of the pipeline, as the pipeline describes it."""
    described = pipeline.pipeline_spec.root.input_definitions.parameters
    own = [p for p in inspect.signature(action, eval_str=True).parameters.values() if p.name != "parameters"]
    flagged = [_flag(name, MessageToDict(spec)) for name, spec in sorted(described.items())]

    def call(**given: Any) -> None:
        parameters = {name: given.pop(name) for name in sorted(described)}
        objects = {n: json.loads(v) for n, v in parameters.items() if described[n].parameter_type == STRUCT}
        action(**given, parameters=parameters | objects)

    ordered = [p.replace(kind=p.KEYWORD_ONLY) for p in [*own, *flagged]]
    call.__signature__ = inspect.Signature(ordered)  # type: ignore[attr-defined]
    call.__annotations__ = {p.name: p.annotation for p in ordered}
    call.__doc__ = action.__doc__
    return call


def _flag(name: str, spec: dict[str, Any]) -> inspect.Parameter:
    kind, default = TYPES.get(spec["parameterType"], str), spec.get("defaultValue", inspect.Parameter.empty)
    if kind is str and not isinstance(default, str) and default is not inspect.Parameter.empty:
        default = json.dumps(default)
    if kind is int and default is not inspect.Parameter.empty:
        default = int(default)
    if literals := spec.get("literals"):
        kind = Literal[tuple(literals)]
    annotation = Annotated[kind, tyro.conf.arg(help=spec.get("description", ""))]  # type: ignore[valid-type]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=default)


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


VERBS: dict[str, Callable[..., None]] = {
    "compile": compile_all,
    "run-local": run_local,
    "upload": upload,
    "submit": with_parameters(submit, distill),
    "schedule": with_parameters(schedule, retrain),
    "unschedule": unschedule,
    "status": status,
    "logs": logs,
    "cancel": cancel,
}


def main(words: list[str] | None = None) -> None:
    tyro.extras.subcommand_cli_from_dict(VERBS, prog="python -m pipelines", args=words)


if __name__ == "__main__":
    with one_sentence():
        main()
