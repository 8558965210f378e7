"""The parameters of a run, and the checks of them that need no other machine: made before a run is submitted, and again by its first step."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any

from components.distill.launch import JobSize, Where
from dmd2 import recipes
from dmd2.config import Config
from dmd2.errors import Refused
from dmd2.evaluation import metrics
from dmd2.io.hub import HUB_NAME, repository_name
from dmd2.io.model_registry import check_registry_address
from dmd2.io.storage import is_remote, join_uri, open_store
from dmd2.licence import Terms
from dmd2.stages.inputs import check_prompts
from dmd2.stages.package import check_extracts

MIN_HOLDOUT = 2
"""Held-out images without which there is no evaluation."""
MAX_GPUS = 16
"""GPUs of the largest machines."""
MAX_PARTS = 256
"""Pods of one stage: the workflow of a run lists all of them."""
STEP_REQUESTS: dict[Where, tuple[str, str]] = {"here": ("8", "32Gi"), "trainjob": ("500m", "2Gi")}
"""Processors and memory that the step of a training asks for. One that follows a TrainJob waits in the same queue, and asks for little,
or it would hold the quota that its own training waits for."""
LAYOUT = re.compile(r"[a-z]+:(?!//)")
"""The name of a layout before the address of a source, or of a column before that of a file of prompts."""


@dataclass(frozen=True)
class Training:
    """One training of a run: a recipe with some of its fields replaced."""

    recipe: str
    overrides: str
    """As `field=value`, separated by spaces."""

    @property
    def config(self) -> Config:
        """Raises Refused for an unknown recipe or a wrong override."""
        return _resolve(self.recipe, self.overrides)


@cache
def _resolve(recipe: str, overrides: str) -> Config:
    return recipes.resolve(recipe, overrides.split())


@dataclass(frozen=True)
class RunParameters:
    """The parameters of the pipeline `distill` that decide what is done; its docstring describes them."""

    source: str = "digits"
    teacher: str = ""
    recipe: str = "edm-digits"
    overrides: str = ""
    first_overrides: str = ""
    start: str = ""
    prompts: str = ""
    pairs: str = ""
    base: str = ""
    vae: str = ""
    gate: float = 0.0
    license: str = ""
    license_link: str = ""
    restrictions: str = ""
    safety_checker: str = ""
    low_rank: int = 0
    destination: str = ""
    hub: str = ""
    model_registry: str = ""
    scores: str = ""
    root: str = ""
    nodes: int = 1
    gpus: int = -1
    pool: dict[str, Any] = field(default_factory=dict)
    budget: float = 0.0
    price: float = 0.0
    parts: int = 1
    queue: str = "dmd2"

    @cached_property
    def last(self) -> Training:
        """The training of the recipe itself."""
        return Training(self.recipe, self.overrides)

    @cached_property
    def first(self) -> Training | None:
        """The training of the stage before, if the recipe needs one and none is given: its own settings of the distillation, all
        others as in the recipe."""
        stage = self.last.config.distill.first_stage
        if stage == "teacher" or self.start:
            return None
        shared = [change for change in self.overrides.split() if not change.startswith("distill.")]
        return Training(stage, " ".join([*shared, *self.first_overrides.split()]))

    @property
    def trainings(self) -> list[Training]:
        """In their order."""
        return [training for training in (self.first, self.last) if training]

    @property
    def learns_from_pairs(self) -> Training | None:
        """The training with a regression, if there is one."""
        return next((one for one in self.trainings if one.config.distill.regression), None)

    @property
    def chosen_gpus(self) -> int:
        """GPUs of the trainings: those given, or else those of the recipe."""
        if self.gpus >= 0:
            return self.gpus
        return math.gcd(*(recipes.default_gpus(training.config) for training in self.trainings))

    @property
    def addresses(self) -> dict[str, str]:
        """Name -> address, of all that are given; without layouts and columns."""
        names = (
            "source",
            "teacher",
            "start",
            "prompts",
            "pairs",
            "base",
            "vae",
            "safety_checker",
            "destination",
            "scores",
            "root",
        )
        given = {name: LAYOUT.sub("", getattr(self, name), count=1) for name in names}
        return {name: address for name, address in given.items() if address and address != "digits"}


def check_parameters(given: RunParameters, on_cluster: bool) -> Config:
    """The Config of the run; raises Refused for parameters that a later stage would refuse.

    Args:
        on_cluster: The stages run in pods, which see no folder of this machine and lose their own.
    """
    config = given.last.config
    _check_chain(given)
    _check_sizes(given, on_cluster)
    for training in given.trainings:
        _check_training(given, training)
    _check_parts(given)
    _check_data(given)
    _check_package(given)
    metrics.select(config.evaluate.metrics)
    for name, address in given.addresses.items():
        _check_address(name, address, on_cluster)
    return config


def _check_training(given: RunParameters, training: Training) -> None:
    """The training itself, with its prompts, on its number of processes."""
    config, processes = training.config, given.nodes * max(1, given.chosen_gpus)
    if config.distill.fake_prompts == "list" and not given.prompts:
        raise Refused(
            f"recipe {training.recipe!r} draws the prompts of fake samples from a list; give a file as prompts, or override "
            "distill.fake_prompts=independent to use the captions of the data"
        )
    if not config.distill.regression:  # its pairs may be sampled for the prompts
        check_prompts(config, given.prompts)
    if config.distill.batch % processes:
        raise Refused(
            f"a batch of {config.distill.batch} images ({training.recipe}) cannot be divided among {processes} GPUs; give a divisor as gpus, or "
            "-1 for that of the recipe"
        )


def _check_chain(given: RunParameters) -> None:
    """What lies before the training of the recipe."""
    first, learner = given.first, given.learns_from_pairs
    if given.first_overrides and not first:
        raise Refused(
            f"first_overrides is {given.first_overrides!r}, and recipe {given.recipe!r} has no first stage to run; leave it out"
        )
    if first and first.config.distill.first_stage != "teacher":
        raise Refused(
            f"recipe {given.recipe!r} starts from a run of {first.recipe}, which starts from a run itself; run {first.recipe} alone, and give "
            "its folder `run` as start"
        )
    if first and first.config.family != given.last.config.family:
        raise Refused(
            f"first_overrides gives {first.recipe} another network than {given.recipe} has; give fields of `family` as overrides, which hold "
            "for both"
        )
    if given.pairs and not learner:
        raise Refused("pairs are given, and no training of this run has a regression; leave them out")


def _check_sizes(given: RunParameters, on_cluster: bool) -> None:
    gpus = given.chosen_gpus
    JobSize(given.nodes, gpus).check()
    if given.nodes > 1 and not on_cluster:
        raise Refused(f"nodes is {given.nodes}; without a cluster there is one machine, give 1")
    if gpus > MAX_GPUS:
        raise Refused(
            f"gpus is {gpus}, and no machine has more than {MAX_GPUS}; give fewer, or -1 for those of the recipe"
        )
    for name, value in (("gate", given.gate), ("budget", given.budget), ("price", given.price)):
        if not (math.isfinite(value) and value >= 0):
            raise Refused(f"{name} is {value:g}; give a finite number, or 0 for none")


def _check_parts(given: RunParameters) -> None:
    if not 1 <= given.parts <= MAX_PARTS:
        raise Refused(f"parts is {given.parts}; give 1 to {MAX_PARTS} pods that share a stage")
    if given.parts > 1 and given.last.config.data.format == "lmdb":
        raise Refused("a table is made by one machine; give parts 1, or data.format=tar")


def _check_data(given: RunParameters) -> None:
    config = given.last.config
    if not given.source:
        raise Refused("source is empty; give digits, or the address of images")
    if given.source == "digits" and config.family.prompts == "texts":
        raise Refused(f"recipe {given.recipe!r} needs images with captions; give their address as source")
    if config.data.holdout < MIN_HOLDOUT:
        raise Refused(
            f"data.holdout is {config.data.holdout}; an evaluation needs at least {MIN_HOLDOUT} held-out images, better thousands"
        )
    if not given.teacher and not (config.family.can_teach and recipes.default_gpus(config) == 0):
        raise Refused(
            f"recipe {given.recipe!r} needs a teacher; give a folder, a checkpoint or a name on the hub"
        )
    if not given.teacher and (given.base or given.vae):
        raise Refused("base and vae belong to a teacher that is given; leave them out")


def _check_package(given: RunParameters) -> None:
    """What is said of an accepted student, and where its package goes."""
    if given.low_rank:
        config = given.last.config
        check_extracts(config, given.low_rank, config.distill.lora is not None)
    Terms(given.license, given.license_link, given.restrictions).check()
    for name, address in (("hub", given.hub), ("model_registry", given.model_registry)):
        if address and not given.destination:
            raise Refused(
                f"{name} is {address}, which comes after a folder of models; give it as destination"
            )
    if given.hub:
        repository_name(given.hub)
    if given.model_registry:
        check_registry_address(given.model_registry)


def _check_address(name: str, address: str, on_cluster: bool) -> None:
    """Refuse an unknown scheme and, on a cluster, what is not on a bucket."""
    open_store(address)
    if not on_cluster or is_remote(address):
        return
    if name in ("teacher", "base", "vae", "safety_checker") and HUB_NAME.fullmatch(address):
        return
    kept = (
        "would be lost with its pod" if name in ("root", "destination", "scores") else "is not there in a pod"
    )
    raise Refused(
        f"{name} is {address}, a path of one machine, which {kept}; give an address on a bucket, as gs://bucket/folder"
    )


def chain_outputs(given: RunParameters, root: str, where: Where = "here") -> dict[str, Any]:
    """What the wiring of the pipeline is told: sizes, what runs before the training of the recipe, and where each result lies.

    An empty recipe = nothing to run; an empty address = not used.
    """
    first, learner, gpus = given.first, given.learns_from_pairs, given.chosen_gpus
    made = learner if not given.pairs else None
    parts = [f"{number}/{given.parts}" for number in range(given.parts)] if given.parts > 1 else []
    return {
        "gpus": gpus,
        "gpu": min(gpus, 1),
        "where": where,
        "step_gpus": gpus if where == "here" else 0,
        "step_cpu": STEP_REQUESTS[where][0],
        "step_memory": STEP_REQUESTS[where][1],
        "step_pool": given.pool if gpus and where == "here" else {},
        "pool": given.pool if gpus else {},
        "parts": parts,
        "encode_parts": parts if given.last.config.family.vae_stride else [],
        "pairs_recipe": made.recipe if made else "",
        "pairs_overrides": made.overrides if made else "",
        "pairs": given.pairs or (join_uri(root, "pairs") if learner else ""),
        "first_recipe": first.recipe if first else "",
        "first_overrides": first.overrides if first else "",
        "start": given.start or (join_uri(root, "first") if first else ""),
    }


def summary(given: RunParameters) -> Iterator[str]:
    """The steps of the run that train or sample, in words."""
    learner = given.learns_from_pairs
    if learner and not given.pairs:
        yield f"pairs of {learner.recipe}"
    for training in given.trainings:
        yield f"distillation of {training.recipe}" + (f", started from {given.start}" if given.start else "")
