"""The sets of images that an evaluation scores: student and teacher at several numbers of steps, and real images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from dmd2.config import Config, EvaluateConfig, FamilyConfig
from dmd2.data.loader import RawBatch
from dmd2.evaluation.scores import REAL, ImageSet
from dmd2.image_grid import image_grid
from dmd2.model import Model
from dmd2.models.family import Prompt
from dmd2.progress import Progress
from dmd2.rng import seed_of_part
from dmd2.stages.pictures import Sampler, sample_grid, save_png
from dmd2.stages.prompts import grid_columns, prompts_of_images

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


def real_batches(family: FamilyConfig, images: RawBatch) -> Batches:
    """Real images with their classes or captions."""
    yield images.image, prompts_of_images(family, images)


def save_picture_grids(
    config: Config, sets: dict[str, SampledSet], holdout: RawBatch, prompts: list[Prompt], folder: Path
) -> None:
    """Save a picture grid of each set as `<name>.png`, and one of held-out images."""
    for name, each in sets.items():
        picture = sample_grid(config.family, each.sampler, prompts, config.evaluate.seed)
        save_png(picture, folder / f"{name}.png")
    save_png(image_grid(holdout.image[: len(prompts)], grid_columns(config.family)), folder / f"{REAL}.png")
