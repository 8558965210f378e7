"""Comparison of student and teacher with held-out real images."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from dmd2.config import Config, EvaluateConfig
from dmd2.errors import Refused
from dmd2.io.artifact import Manifest, find_finished, read_manifest
from dmd2.io.staging import draft_artifact

if TYPE_CHECKING:
    import torch

    from dmd2.model import Model
    from dmd2.models.family import Prompt
    from dmd2.stages.pictures import Sampler


def evaluate(config: Config, data: str, teacher: str, run: str, out: str) -> Manifest:
    """Compare student and teacher with held-out real images: FID, from the same noise and the same classes.

    Args:
        data: Folder of shards, with held-out images.
        teacher: Folder of the teacher.
        run: Folder of the distillation.
        out: Folder to make.
    """
    from dmd2.data.loader import Shards
    from dmd2.data.shards import HOLDOUT, TRAIN
    from dmd2.evaluation.features import by_name, distance
    from dmd2.image_grid import image_grid
    from dmd2.parallel import ranks
    from dmd2.stages.networks import load_on_device
    from dmd2.stages.pictures import sample_grid, save_png
    from dmd2.stages.prompts import grid_columns, preview_prompts, prompts_of_images

    original, made = read_manifest(teacher, "teacher"), read_manifest(run, "run")
    inputs = {"shards": read_manifest(data, "shards").digest, "teacher": original.digest, "run": made.digest}
    for name, given in (("shards", data), ("teacher", teacher)):
        if made.inputs.get(name, inputs[name]) != inputs[name]:
            raise Refused(
                f"{run} was not made with the {name} in {given}; evaluate it with the {name} it was made with"
            )
    if done := find_finished(out, "evaluation", config, inputs):
        return done
    device, settings = ranks.device(), config.evaluate
    student = load_on_device(run, made, device)
    guide = load_on_device(teacher, original, device)
    holdout = Shards(data, HOLDOUT).evenly_spaced(settings.images)
    if len(holdout.image) < 2:
        raise Refused(
            f"{data} holds out {len(holdout.image)} image; FID needs at least 2, better thousands: shard again"
        )
    prompts = prompts_of_images(config.family, holdout, settings.images)
    with draft_artifact(out, "evaluation", config, inputs) as draft:
        features = by_name(config, data, holdout, device)
        real = features(holdout.image)
        samplers = _samplers(student, guide, settings)
        for name, (_, _, sampler) in samplers.items():
            images = sample_images(name, sampler, prompts, settings)
            draft.facts[f"fid_{name}"] = distance(features(images), real)
        train = Shards(data, TRAIN).evenly_spaced(settings.images)
        draft.facts |= features.facts | {
            "fid_real": distance(features(train.image), real),
            "nfe_student": len(student.timesteps),
            "nfe_teacher": guide.family.teacher_calls(settings.teacher_steps, settings.teacher_guidance),
            "images": settings.images,
            "images_real": len(holdout.image),
            "seed": settings.seed,
            "variants": [
                {
                    "name": name,
                    "recipe": recipe or config.recipe,
                    "steps": steps,
                    "calls": steps
                    if not recipe
                    else guide.family.teacher_calls(steps, settings.teacher_guidance),
                    "fd": draft.facts[f"fid_{name}"],
                }
                for name, (recipe, steps, _) in samplers.items()
            ],
        }
        shown = preview_prompts(config.family, Shards(data, HOLDOUT))
        for name, (_, _, sampler) in samplers.items():
            save_png(sample_grid(config.family, sampler, shown, settings.seed), draft.path / f"{name}.png")
        save_png(
            image_grid(holdout.image[: len(shown)], grid_columns(config.family)), draft.path / "real.png"
        )
    return read_manifest(out, "evaluation")


def _samplers(student: Model, guide: Model, settings: EvaluateConfig) -> dict[str, tuple[str, int, Sampler]]:
    """By name: whose it is (empty = the recipe's), its steps, and what draws the images."""

    def teacher(steps: int) -> tuple[str, int, Sampler]:
        return (
            "teacher",
            steps,
            lambda part, seed: guide.sample_teacher(part, seed, steps, settings.teacher_guidance),
        )

    count = len(student.timesteps)
    found: dict[str, tuple[str, int, Sampler]] = {
        "student": ("", count, student.sample),
        "teacher": teacher(settings.teacher_steps),
        "teacher_1step": teacher(1),
    }
    if count > 1:
        found |= {
            "student_1step": ("", 1, replace(student, timesteps=student.timesteps[:1]).sample),
            f"teacher_{count}step": teacher(count),
        }
    return found


def sample_images(
    name: str, sampler: Sampler, prompts: list[Prompt], settings: EvaluateConfig
) -> torch.Tensor:
    """Images for all prompts; each part has its own seed, so that a part can be made again alone."""
    import torch

    from dmd2.progress import Progress
    from dmd2.rng import seed_of_part

    images = []
    with Progress(f"sample {name}", len(prompts), "images") as progress:
        for start in range(0, len(prompts), settings.batch):
            part = prompts[start : start + settings.batch]
            images.append(sampler(part, seed_of_part(settings.seed, start)))
            progress.advance(len(part))
    return torch.cat(images)
