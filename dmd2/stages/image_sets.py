"""The sets of images that an evaluation scores: student and teacher at several numbers of steps, and real images.

Only a batch of images is in memory at a time.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dmd2.config import Config, EvaluateConfig, FamilyConfig
from dmd2.data.loader import Shards
from dmd2.data.shards import HOLDOUT, TRAIN
from dmd2.encoders.text import count_cut_texts
from dmd2.evaluation.evaluator import BATCH, Evaluator, score_states
from dmd2.evaluation.features import load_extractor
from dmd2.evaluation.metrics import Metric
from dmd2.evaluation.scores import REAL, ImageSet, MetricScores, score_facts
from dmd2.image_grid import image_grid
from dmd2.model import Model
from dmd2.models.family import Prompt
from dmd2.progress import Progress
from dmd2.rng import seed_of_part
from dmd2.stages.pictures import Sampler, sample_grid, save_png
from dmd2.stages.prompts import grid_columns, preview_prompts, prompts_of_images, repeat_prompts

logger = logging.getLogger(__name__)

Batches = Iterator[tuple[Tensor, Sequence[Prompt]]]
"""(images, prompts): uint8 (B, C, H, W), and what they were sampled for or are labelled with."""


@dataclass(frozen=True)
class SampledSet:
    """A set of images that is sampled."""

    description: ImageSet
    sampler: Sampler


def sampled_sets(config: Config, student: Model, teacher: Model) -> dict[str, SampledSet]:
    """{name: set}: student and teacher as they are used, both in one step, and the teacher in as many steps as the student."""
    settings, count = config.evaluate, len(student.timesteps)

    def by_teacher(name: str, steps: int) -> SampledSet:
        calls = teacher.family.teacher_calls(steps, settings.teacher_guidance)
        return SampledSet(
            ImageSet(name, "teacher", steps, calls),
            lambda prompts, seed: teacher.sample_teacher(prompts, seed, steps, settings.teacher_guidance),
        )

    def by_student(name: str, steps: int) -> SampledSet:
        shortened = replace(student, timesteps=student.timesteps[:steps])
        return SampledSet(ImageSet(name, config.recipe, steps, steps), shortened.sample)

    sets = [
        by_student("student", count),
        by_teacher("teacher", settings.teacher_steps),
        by_teacher("teacher_1step", 1),
    ]
    if count > 1:
        sets += [by_student("student_1step", 1), by_teacher(f"teacher_{count}step", count)]
    return {each.description.name: each for each in sets}


def sampled_batches(title: str, sampler: Sampler, prompts: list[Prompt], settings: EvaluateConfig) -> Batches:
    """Images of all prompts; each batch has its own seed, so that it can be sampled again alone."""
    with Progress(f"evaluate {title}", len(prompts), "images") as progress:
        for start in range(0, len(prompts), settings.batch):
            batch = prompts[start : start + settings.batch]
            yield sampler(batch, seed_of_part(settings.seed, start)), batch
            progress.advance(len(batch))


def real_batches(family: FamilyConfig, shards: Shards, count: int) -> Batches:
    """Real images with their classes or captions: `count` at even distances, or all if there are fewer."""
    for batch in shards.evenly_spaced_batches(count, BATCH):
        yield batch.image, prompts_of_images(family, batch)


def score_sets(
    config: Config,
    data: str,
    sets: Mapping[str, SampledSet],
    selected: Sequence[Metric],
    device: torch.device,
) -> dict[str, Any]:
    """Score sampled sets and real training images against the held-out images in `data`; what the manifest says about it."""
    settings, holdout = config.evaluate, Shards(data, HOLDOUT)
    evaluator = Evaluator.load(selected, settings, lambda: load_extractor(config, data, device), device)
    real_prompts: list[Prompt] = []
    reference = evaluator.accumulate(
        _record_prompts(real_batches(config.family, holdout, settings.images), real_prompts)
    )
    prompts = repeat_prompts(real_prompts, settings.images)
    scores = {}
    with count_cut_texts() as cut:
        for name, each in sets.items():
            batches = sampled_batches(each.description.title, each.sampler, prompts, settings)
            scores[name] = score_states(evaluator.accumulate(batches), reference)
    if said := cut.describe(len(set(prompts)), "prompts"):
        logger.warning(said)
    train = real_batches(config.family, Shards(data, TRAIN), settings.images)
    scores[REAL] = score_states(evaluator.accumulate(train), reference)
    by_metric = [
        MetricScores.of(metric, {name: found[metric.name] for name, found in scores.items()})
        for metric in selected
    ]
    facts = score_facts(by_metric, [each.description for each in sets.values()])
    counts = {"images_real": len(real_prompts)}
    if config.family.prompts != "classes":
        counts |= {"prompts": len(set(prompts)), "prompts_cut": len(cut.texts)}
    return facts | evaluator.facts | counts


def _record_prompts(batches: Batches, prompts: list[Prompt]) -> Batches:
    """The same batches; their prompts are appended to the list."""
    for images, batch in batches:
        prompts += batch
        yield images, batch


def save_picture_grids(config: Config, data: str, sets: Mapping[str, SampledSet], folder: Path) -> None:
    """Save a picture grid of each set as `<name>.png`, and one of held-out images, for the preview prompts."""
    settings, holdout = config.evaluate, Shards(data, HOLDOUT)
    prompts = preview_prompts(config.family, holdout)
    for name, each in sets.items():
        save_png(sample_grid(config.family, each.sampler, prompts, settings.seed), folder / f"{name}.png")
    real = next(holdout.evenly_spaced_batches(settings.images, len(prompts))).image
    save_png(image_grid(real, grid_columns(config.family)), folder / f"{REAL}.png")
