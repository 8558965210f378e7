"""Stages that look at a student: samples, the evaluation, the gate."""

from __future__ import annotations

import itertools
from dataclasses import replace

import torch

from dmd2 import parallel
from dmd2.config import Config, EdmConfig, EvaluateConfig, FamilyConfig
from dmd2.data.shards import HOLDOUT, TRAIN
from dmd2.data.stream import RawBatch, Shards
from dmd2.errors import Refused
from dmd2.image_grid import grid
from dmd2.io.artifact import Manifest, drafted, finished, read
from dmd2.model import Model
from dmd2.models.family import Prompt
from dmd2.progress import Progress
from dmd2.rng import seed_of_part
from dmd2.stages.common import Sampler, columns, delivered, network_of, on, picture_of, pictured, save_png


def sample(
    package: str,
    out: str,
    count: int = 80,
    seed: int = 0,
    labels: tuple[int, ...] = (),
    prompts: tuple[str, ...] = (),
    steps: int = 0,
    guidance: float = 1.0,
) -> str:
    """Sample a package, the student of a run, or a teacher into a picture grid.

    Args:
        package: Folder of a package, of a finished run, or of a teacher.
        out: PNG file to write.
        count: Images.
        seed: Seed of the noise.
        labels: Classes, repeated to `count`; all classes in turn if none are given.
        prompts: Texts, repeated to `count`; for networks that are told by text.
        steps: Steps; 0 = those of the student, or 30 of a teacher. A student of several steps may take fewer.
        guidance: Scale of a teacher's guidance; a student has none.
    """
    if count < 1:
        raise Refused(f"count is {count}; draw at least one image")
    if steps < 0:
        raise Refused(f"steps is {steps}; give a positive number, or 0 for the usual one")
    manifest = read(package, "package", "run", "teacher")
    model = on(parallel.device(), network_of(package, manifest))
    shown: list[Prompt] = [*prompts, *labels] or _any(model.config, manifest)
    wanted = list(itertools.islice(itertools.cycle(shown), count))
    if manifest.kind == "teacher":
        images = model.sample_teacher(wanted, seed, steps or 30, guidance)
    else:
        if guidance != 1:
            raise Refused(f"guidance is {guidance}; it is distilled into a student, so leave it out")
        images = replace(model, timesteps=_timesteps(model, steps)).sample(wanted, seed)
    with delivered(out) as path:
        save_png(grid(images, min(len(shown), 10)), path)
    return out


def evaluate(config: Config, data: str, teacher: str, run: str, out: str) -> Manifest:
    """Compare student and teacher with held-out real images: FID, from the same noise and the same classes.

    Args:
        data: Folder of shards, with held-out images.
        teacher: Folder of the teacher.
        run: Folder of the distillation.
        out: Folder to make.
    """
    from dmd2.evaluation.features import by_name, distance  # slow to import, only needed here

    original, made = read(teacher, "teacher"), read(run, "run")
    inputs = {"shards": read(data, "shards").digest, "teacher": original.digest, "run": made.digest}
    for name, given in (("shards", data), ("teacher", teacher)):
        if made.inputs.get(name, inputs[name]) != inputs[name]:
            raise Refused(
                f"{run} was not made with the {name} in {given}; evaluate it with the {name} it was made with"
            )
    if done := finished(out, "evaluation", config, inputs):
        return done
    device, settings = parallel.device(), config.evaluate
    student = on(device, network_of(run, made))
    guide = on(device, network_of(teacher, original))
    holdout = Shards(data, HOLDOUT).in_order(settings.images)
    if len(holdout.image) < 2:
        raise Refused(
            f"{data} holds out {len(holdout.image)} image; FID needs at least 2, better thousands: shard again"
        )
    prompts = balanced(config.family, holdout, settings.images)
    with drafted(out, "evaluation", config, inputs) as draft:
        features = by_name(config, data, holdout, device)
        real = features(holdout.image)
        samplers = _samplers(student, guide, settings)
        for name, (_, _, sampler) in samplers.items():
            images = sampled(name, sampler, prompts, settings)
            draft.facts[f"fid_{name}"] = distance(features(images), real)
        train = Shards(data, TRAIN).in_order(settings.images)
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
        shown = pictured(config.family, Shards(data, HOLDOUT))
        for name, (_, _, sampler) in samplers.items():
            save_png(picture_of(config.family, sampler, shown, settings.seed), draft.path / f"{name}.png")
        save_png(grid(holdout.image[: len(shown)], columns(config.family)), draft.path / "real.png")
    return read(out, "evaluation")


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


def gate(config: Config, evaluation: str, out: str) -> Manifest:
    """Accept or reject a student by its FID.

    Args:
        evaluation: Folder of the evaluation.
        out: Folder to make.
    """
    judged = read(evaluation, "evaluation")
    inputs = {"evaluation": judged.digest}
    if done := finished(out, "gate", config, inputs):
        return done
    student, teacher, factor = judged.facts["fid_student"], judged.facts["fid_teacher"], config.gate.factor
    accepted = student <= factor * teacher
    reason = (
        f"FID of the student {student:.2f} is {'at most' if accepted else 'more than'} {factor:g} x the teacher's "
        f"{teacher:.2f} = {factor * teacher:.2f}"
    )
    with drafted(out, "gate", config, inputs) as draft:
        draft.facts |= {"decision": "accepted" if accepted else "rejected", "reason": reason}
    return read(out, "gate")


def balanced(family: FamilyConfig, holdout: RawBatch, count: int) -> list[Prompt]:
    """What to draw, in the shares of the held-out images."""
    shown = holdout.label.tolist() if isinstance(family, EdmConfig) else holdout.text
    return list(itertools.islice(itertools.cycle(shown), count))


def sampled(name: str, sampler: Sampler, prompts: list[Prompt], settings: EvaluateConfig) -> torch.Tensor:
    """Images for all prompts; each part has its own seed, so that a part can be made again alone."""
    images = []
    with Progress(f"sample {name}", len(prompts), "images") as progress:
        for start in range(0, len(prompts), settings.batch):
            part = prompts[start : start + settings.batch]
            images.append(sampler(part, seed_of_part(settings.seed, start)))
            progress.advance(len(part))
    return torch.cat(images)


def _timesteps(model: Model, steps: int) -> tuple[int, ...]:
    """The first of the student's timesteps; more steps than it was made for are refused."""
    if steps > len(model.timesteps):
        raise Refused(
            f"steps is {steps}; this student was made for {len(model.timesteps)}, and may take fewer"
        )
    return model.timesteps[: steps or len(model.timesteps)]


def _any(family: FamilyConfig, manifest: Manifest) -> list[Prompt]:
    """What to show if nobody says."""
    if isinstance(family, EdmConfig):
        return list(range(family.classes))
    if not (prompts := manifest.facts.get("prompts")):
        raise Refused("this network is told by text; give --prompts")
    return list(prompts)
