"""The sets of images that an evaluation scores: student and teacher at several numbers of steps, and real images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dmd2.config import Config, FamilyConfig
from dmd2.data.loader import Shards
from dmd2.data.shard_table import HOLDOUT, TRAIN
from dmd2.errors import Refused
from dmd2.evaluation.scores import ImageSet, sets_to_sample
from dmd2.io.artifact import Manifest, read_manifest
from dmd2.models.family import Prompt
from dmd2.parallel.ranks import is_emulated
from dmd2.stages.networks import load_artifact_model, load_on_device
from dmd2.stages.pictures import Sampler
from dmd2.stages.prompts import repeat_prompts

REFERENCE = "reference"
"""Name of the set of real images that the others are compared with."""


@dataclass(frozen=True)
class SampledSet:
    """A set of images that is sampled."""

    description: ImageSet
    sampler: Sampler
    pins: dict[str, Any]
    """What decides its images beside prompts, seed and precision."""


class Network:
    """A student or teacher, loaded onto the device when it is first sampled."""

    def __init__(self, folder: str, manifest: Manifest, device: torch.device) -> None:
        self.manifest, self.digest = manifest, manifest.digest
        self.shape = load_artifact_model(folder, manifest, weights=False)
        """The model without its weights."""
        self.load = cache(lambda: replace(load_on_device(folder, manifest, device), dtype=precision(device)))


def precision(device: torch.device) -> torch.dtype:
    """The precision in which an evaluation samples: bfloat16 on a GPU that has it, else float32."""
    fast = device.type == "cuda" and not is_emulated(device, torch.bfloat16)
    return torch.bfloat16 if fast else torch.float32


def sampled_sets(config: Config, student: Network, teacher: Network) -> dict[str, SampledSet]:
    """{name: set}, with what samples it."""
    guidance = config.evaluate.teacher_guidance

    def by_teacher(description: ImageSet) -> SampledSet:
        def sample(prompts: Sequence[Prompt], seed: int) -> Tensor:
            return teacher.load().sample_teacher(prompts, seed, description.steps, guidance)

        pins = {"teacher": teacher.digest, "steps": description.steps, "guidance": guidance}
        return SampledSet(description, sample, pins)

    def by_student(description: ImageSet) -> SampledSet:
        def sample(prompts: Sequence[Prompt], seed: int) -> Tensor:
            model = student.load()
            return replace(model, timesteps=model.timesteps[: description.steps]).sample(prompts, seed)

        return SampledSet(description, sample, {"student": student.digest, "steps": description.steps})

    found = sets_to_sample(config, len(student.shape.timesteps), teacher.shape.family)
    return {each.name: by_teacher(each) if each.recipe == "teacher" else by_student(each) for each in found}


@dataclass(frozen=True)
class RealSet:
    """Real images, with the classes or captions of all of them; the images themselves are read when they are needed."""

    title: str
    shards: Shards
    positions: np.ndarray
    prompts: list[Prompt]

    @classmethod
    def of(cls, title: str, shards: Shards, count: int, family: FamilyConfig) -> RealSet:
        positions = shards.even_positions(count)
        described = shards.labels_and_texts(positions)
        prompts: list[Prompt] = [label if family.prompts == "classes" else text for label, text in described]
        return cls(title, shards, positions, prompts)

    def images(self, rows: range) -> Tensor:
        return self.select(list(rows))

    def select(self, rows: Sequence[int]) -> Tensor:
        """The images of single rows."""
        return self.shards.select(self.positions[list(rows)]).image


def prompts_to_sample(config: Config, reference: Sequence[Prompt]) -> list[Prompt]:
    """`evaluate.images` prompts: those of the reference images again and again, or all classes in turn."""
    family, settings = config.family, config.evaluate
    if settings.prompts == "reference":
        return repeat_prompts(reference, settings.images)
    if family.prompts != "classes":
        raise Refused(
            "evaluate.prompts is 'balanced', but this network is conditioned on texts; set it to reference"
        )
    return repeat_prompts(range(family.classes), settings.images)


def reference_shards(data: str, reference: str) -> Shards:
    """The images that others are compared with: held-out ones of `data`, or another set of shards: its held-out images if it has
    some, else all."""
    if not reference:
        return Shards(data, HOLDOUT)
    made = read_manifest(reference, "shards")
    return Shards(reference, HOLDOUT if made.config and made.config.data.holdout else TRAIN)
