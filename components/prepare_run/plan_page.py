"""What the trainings of a run take, before they are paid for: the plan of the library, as a page of the UI, against GPU, disk and budget."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from components.prepare_run.cost import ACCELERATOR, gpu_kind
from components.prepare_run.disk import TRAINING_DISK_GB
from components.prepare_run.parameters import RunParameters, Training, summary
from components.run_folder import browser_link, progress_page
from dmd2.config import Config
from dmd2.errors import Refused
from dmd2.evaluation.scores import markdown_table
from dmd2.plan.hardware import GB, GPUS, USABLE

if TYPE_CHECKING:
    from dmd2.plan.prediction import Plan

logger = logging.getLogger(__name__)

WEIGHT_BYTES = 4
"""Bytes of a weight in a teacher or student folder."""


def plan_page(given: RunParameters, root: str) -> str:
    """The page, as Markdown; raises Refused if a training does not fit or all together exceed the budget.

    It takes about twelve seconds of a processor for SDXL, so a run is refused as soon as enough of it is counted.

    Args:
        root: Folder of the run, where the pages about its trainings will be.
    """
    steps = [f"{number}. {step}" for number, step in enumerate(summary(given), 1)]
    names = ("first", "run") if len(given.trainings) > 1 else ("run",)
    links = [f"- While it trains: {browser_link(progress_page(root, name))}" for name in names]
    head = [f"# {given.recipe}", "", *steps, "", *links, ""]
    if missing := _why_no_plan(given):
        if given.budget:
            raise Refused(f"budget is {given.budget:g} GPU-hours, and {missing}; leave the budget out")
        return "\n".join([*head, f"There is no plan: {missing}."])
    plans: list[Plan] = []
    for training in given.trainings:
        try:
            plans.append(_plan(given, training, lambda plan: check_plans(given, [*plans, plan])))
        except DoesNotFit as error:
            name = "first_overrides" if training == given.first else "overrides"
            raise Refused(f"{error}; {_what_fits(given, training, name)}") from None
    return "\n".join([*head, _table(plans), "", *_notes(given, plans)])


class DoesNotFit(Refused):
    """A training takes more memory than a GPU has."""


def check_plans(given: RunParameters, plans: list[Plan]) -> None:
    """Raise DoesNotFit if the last training does not fit, and Refused if all together exceed the budget."""
    _check_fits(plans[-1])
    if given.budget and (total := sum(made.gpu_hours for made in plans)) > given.budget:
        raise Refused(
            f"the trainings take at least {total:.1f} GPU-hours by their plan, more than the budget of {given.budget:g}; raise it, or override "
            "the steps of the trainings"
        )


def _why_no_plan(given: RunParameters) -> str:
    if not given.chosen_gpus:
        return "the run uses no GPU"
    if not (kind := gpu_kind(given)):
        return f"the pool has no label {ACCELERATOR}, which names the kind of GPU"
    return "" if kind in GPUS else f"the plan does not know the GPU {kind}"


def _plan(
    given: RunParameters, training: Training, check: Callable[[Plan], None], compared: Sequence[str] = ()
) -> Plan:
    from dmd2.plan import predict

    gpus = gpu_kind(given), given.chosen_gpus, given.nodes
    return predict(training.config, *gpus, given.price, compared=compared, check=check)


def _table(plans: list[Plan]) -> str:
    head = [
        "training",
        "GPUs",
        "memory of a GPU, GB",
        "hours",
        "GPU-hours",
        "cost",
        "checkpoint, GB",
        "disk, GB",
    ]
    rows = [
        [
            made.config.recipe,
            f"{made.mesh.gpus} x {made.gpu_name}",
            f"{made.memory_gb:.1f} of {USABLE * made.gpu.gb:.1f}",
            f"{made.hours:.1f}",
            f"{made.gpu_hours:.1f}",
            f"{made.cost:,.0f}" if made.price else "",
            f"{made.checkpoint / GB:.1f}",
            f"{disk_gb(made.config, made.checkpoint, made.weights):.0f} of {TRAINING_DISK_GB}",
        ]
        for made in plans
    ]
    return markdown_table(head, rows)


def disk_gb(config: Config, checkpoint: int, weights: dict[str, int]) -> float:
    """1e9 bytes below /tmp of a training: checkpoints with the one that is written, cached shards, teacher and student."""
    kept = config.distill.keep_checkpoints + bool(config.distill.best.images) + 1
    folders = WEIGHT_BYTES * (weights["teacher"] + weights["student"])
    return config.loader.cache_gb + (kept * checkpoint + folders) / GB


def _notes(given: RunParameters, plans: list[Plan]) -> list[str]:
    total = sum(made.gpu_hours for made in plans)
    limit = f" of at most {given.budget:g}" if given.budget else ""
    return [
        f"- All trainings together: {total:.1f} GPU-hours{limit}.",
        "- Predicted from counted FLOPs and bytes and the data sheet of the GPU; `dmd2 plan` shows the parts. Encoding, pairs and evaluation "
        "are not included, nor is a teacher of another size than the published one.",
    ]


def _what_fits(given: RunParameters, training: Training, name: str) -> str:
    """What to do about a training that does not fit. Its other ways of activation checkpointing are counted for it, as by `dmd2 plan`."""
    from dmd2.plan.prediction import CHECKPOINTING

    logger.info("%s does not fit: looking for settings with which it does", training.recipe)
    found = _plan(given, training, lambda plan: None, CHECKPOINTING).remedies
    if not found:
        return "no setting of engine or moments makes it fit; take more or larger GPUs"
    return f"add {' '.join(found[0].settings)} to {name}, with which it takes {found[0].gb:.1f} GB, or take more or larger GPUs"


def _check_fits(made: Plan) -> None:
    config = made.config
    if not made.fits:
        raise DoesNotFit(
            f"{config.recipe} takes at least {made.memory_gb:.1f} GB of a GPU by its plan, and {made.gpu_name} has "
            f"{USABLE * made.gpu.gb:.1f} for it"
        )
    if (needed := disk_gb(config, made.checkpoint, made.weights)) > TRAINING_DISK_GB:
        raise Refused(
            f"{config.recipe} takes {needed:.0f} GB of disk in its pod by its plan, which has {TRAINING_DISK_GB}; override "
            "distill.keep_checkpoints or loader.cache_gb"
        )
