"""`python -m pipelines VERB`: the pipelines as files, as a run on this machine, or as runs of a cluster."""

from __future__ import annotations

import inspect
import json
import logging
import math
import subprocess
import sys
from collections.abc import Callable, Collection
from dataclasses import fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from google.protobuf.json_format import MessageToDict
from kfp.dsl.base_component import BaseComponent
from kfp.pipeline_spec.pipeline_spec_pb2 import ParameterType

from components.prepare_run.cost import ACCELERATOR, gpu_kind, planned_gpu_hours
from components.prepare_run.parameters import RunParameters, check_parameters
from dmd2.errors import Refused, one_sentence
from dmd2.io.local import write_text
from dmd2.overrides import override_flags
from pipelines import cluster, readme
from pipelines.cluster import ClusterFlags, ServerFlags, compile_pipeline
from pipelines.distill import H100, distill
from pipelines.local_run import CLUSTER, run_local
from pipelines.retrain import retrain

logger = logging.getLogger("pipelines")

COMPILED = Path(__file__).parent / "compiled"
PIPELINES: dict[str, BaseComponent] = {"distill": distill, "retrain": retrain}
ANY_TEACHER = "gs://teachers/any"
"""Stands for the teachers that retraining will find, where settings are checked."""
RETRAIN = "dmd2-retrain"
"""Default name of the schedule."""
STRUCT = ParameterType.ParameterTypeEnum.STRUCT
TYPES: dict[str, Any] = {"STRING": str, "NUMBER_INTEGER": int, "NUMBER_DOUBLE": float, "BOOLEAN": bool}


def compile_all() -> None:
    """Compile the pipelines to `pipelines/compiled/*.yaml`, and the components' README, for review and for a cluster."""
    COMPILED.mkdir(exist_ok=True)
    for name, pipeline in PIPELINES.items():
        write_text(COMPILED / f"{name}.yaml", compile_pipeline(pipeline).text)
        print(COMPILED / f"{name}.yaml")
    write_text(readme.PATH, readme.text())
    print(readme.PATH)


def upload(where: ClusterFlags) -> None:
    """Upload the pipelines to the server. A version that is there already is not uploaded again."""
    packages = [compile_pipeline(pipeline) for pipeline in PIPELINES.values()]
    for package in (*packages, cluster.for_retraining(packages[0])):
        cluster.upload(where, package)
        print(f"{package.name}, version {package.version}: uploaded")


def submit(
    where: ClusterFlags,
    parameters: dict[str, Any],
    name: str = "",
    cost_centre: str = "",
    dry_run: bool = False,
    wait: bool = False,
) -> None:
    """Start a distillation on the cluster.

    Args:
        name: Name of the run; empty = recipe and time.
        cost_centre: Team or project that pays: the label `dmd2/cost-centre` of all pods of the run.
        dry_run: Show the run and what it would cost, without a request to a server.
        wait: Wait for the end of the run; the exit status is 0 if it succeeded, 1 if it failed, 130 if it was cancelled.
    """
    package = cluster.for_cost_centre(compile_pipeline(distill), cost_centre)
    name = name or f"{parameters['recipe']}-{datetime.now(UTC):%Y%m%d-%H%M%S}"
    _print_run(package, name, parameters)
    if dry_run:
        _print_refusal(parameters)
        _print_plan(parameters)
        return
    _check_parameters(parameters)
    run_id = cluster.submit(where, package, name, parameters)
    print(f"run {run_id}\n{where.run(run_id)}")
    if wait:
        _wait(where, run_id)


def schedule(
    where: ClusterFlags,
    parameters: dict[str, Any],
    cron: str = "0 0 6 * * 1",
    name: str = RETRAIN,
    dry_run: bool = False,
) -> None:
    """Schedule the retraining pipeline, one run at a time; missed runs are not made up for.

    Args:
        cron: Six fields in UTC: second, minute, hour, day of the month, month, day of the week.
        name: Name of the schedule; a schedule of the same name is replaced.
        dry_run: Show the schedule, without a request to a server.
    """
    if len(cron.split()) != 6:
        raise Refused(
            f"cron is {cron!r}; give six fields, of which the first is the second, as '0 0 6 * * 1'"
        )
    if empty := [parameter for parameter in ("teachers", "ledger", "root") if not parameters[parameter]]:
        raise Refused(f"{empty[0]} is empty; give its address by --{empty[0]}")
    parameters = _with_plan(parameters)
    package, distillation = compile_pipeline(retrain), cluster.for_retraining(compile_pipeline(distill))
    _print_run(package, name, parameters)
    print(f"at {cron} (cron with seconds, UTC)")
    if not dry_run:
        if parameters["pipeline"] == distillation.name:
            cluster.upload(where, distillation)
        print(f"schedule {cluster.schedule(where, package, name, cron, parameters)}")


def _with_plan(parameters: dict[str, Any]) -> dict[str, Any]:
    """The parameters of retraining, with the GPU-hours of the plan if none are given. Settings that every run would refuse
    are refused."""
    settings = {"pool": H100, "teacher": ANY_TEACHER} | parameters["settings"]
    known = {field.name for field in fields(RunParameters)}
    given = RunParameters(**{name: value for name, value in settings.items() if name in known})
    check_parameters(given, on_cluster=True)
    if parameters["gpu_hours"]:
        return parameters
    return parameters | {"gpu_hours": math.ceil(10 * planned_gpu_hours(given)) / 10}


def unschedule(where: ServerFlags, name: str = RETRAIN) -> None:
    """Remove the schedule of the retraining pipeline.

    Args:
        name: Name of the schedule.
    """
    print(f"{cluster.unschedule(where, name)} removed")


def status(where: ServerFlags, run: str = "") -> None:
    """Show the state of a run and its steps or, without a run, the last ten runs.

    Args:
        run: Id of the run.
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
        message = f"  {task.error.message}" if task.error and task.error.message else ""
        print(f"  {task.display_name:<18} {task.state.lower()}{message}")
    if found.error and found.error.message:
        print(found.error.message)


def logs(where: ServerFlags, run: str, task: str = "", lines: int = 200) -> None:
    """Show the logs of the steps of a run whose pods still exist.

    Args:
        run: Id of the run.
        task: Only steps with this text in their name.
        lines: Number of last lines of each log.
    """
    for step, text in cluster.logs(where, run, task, lines):
        print(f"== {step}\n{text}")


def cancel(where: ServerFlags, run: str, wait: bool = False) -> None:
    """Stop a run. A run with the same root continues from what its stages have saved.

    Args:
        run: Id of the run.
        wait: Wait for the end of the run.
    """
    cluster.cancel(where, run)
    print(f"termination requested\n{where.run(run)}")
    if wait:
        print(cluster.wait(where, run, print).lower())


def _wait(where: cluster.KfpServer, run: str) -> None:
    state = cluster.wait(where, run, lambda line: print(line, flush=True))
    if code := cluster.STATUS[state]:
        logger.error("run %s ended %s; python -m pipelines logs --run %s says why", run, state.lower(), run)
        raise SystemExit(code)


def _print_run(package: cluster.CompiledPipeline, name: str, parameters: dict[str, Any]) -> None:
    print(f"{package.name}, version {package.version}: {name}")
    for parameter, value in parameters.items():
        if value != "":
            print(f"  {parameter:<15} {json.dumps(value) if isinstance(value, dict) else value}")


def _check_parameters(parameters: dict[str, Any]) -> None:
    """Refuse parameters that the first step of the run would refuse."""
    check_parameters(_run_parameters(parameters), on_cluster=True)


def _run_parameters(parameters: dict[str, Any]) -> RunParameters:
    return RunParameters(**{field.name: parameters[field.name] for field in fields(RunParameters)})


def _print_refusal(parameters: dict[str, Any]) -> None:
    try:
        _check_parameters(parameters)
    except Refused as error:
        print(f"not yet ready to be submitted: {error}")


def _print_plan(parameters: dict[str, Any]) -> None:
    """Print the plan of the library for each training: memory, time and cost."""
    sys.stdout.flush()
    given = _run_parameters(parameters)
    kind = gpu_kind(given)
    if not kind or not given.chosen_gpus:
        print(f"no plan without GPUs, or without {ACCELERATOR} in the pool")
        return
    size = {"gpu": kind, "gpus-per-node": given.chosen_gpus, "nodes": given.nodes, "price": given.price}
    flags = [f"--{name}={value}" for name, value in size.items()]
    for training in given.trainings:
        words = [training.recipe, *flags, *override_flags(training.overrides.split())]
        planned = subprocess.run([sys.executable, "-m", "dmd2", "plan", *words])
        if planned.returncode:
            raise SystemExit(planned.returncode)


def with_parameters(
    action: Callable[..., None], pipeline: BaseComponent, without: Collection[str] = ()
) -> Callable[..., None]:
    """The action with a flag for each parameter of the pipeline but some, with the pipeline's descriptions and defaults."""
    parameters = pipeline.pipeline_spec.root.input_definitions.parameters
    described = {name: spec for name, spec in parameters.items() if name not in without}
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


VERBS: dict[str, Callable[..., None]] = {
    "compile": compile_all,
    "run-local": with_parameters(run_local, distill, without=CLUSTER),
    "upload": upload,
    "submit": with_parameters(submit, distill),
    "schedule": with_parameters(schedule, retrain),
    "unschedule": unschedule,
    "status": status,
    "logs": logs,
    "cancel": cancel,
}


def main(arguments: list[str] | None = None) -> None:
    tyro.extras.subcommand_cli_from_dict(VERBS, prog="python -m pipelines", args=arguments)


if __name__ == "__main__":
    with one_sentence():
        main()
