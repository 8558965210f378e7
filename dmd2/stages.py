"""The stages: each a function from folders to a folder, one verb of the command line, one component of the pipeline.

A stage that is called again with what it was already given returns at once; one that was interrupted continues.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from dmd2 import build, parallel
from dmd2 import report as reports
from dmd2.config import Config, EdmConfig, EvaluateConfig
from dmd2.data.shards import HOLDOUT, TRAIN, write_shards
from dmd2.data.sources import open_source
from dmd2.data.stream import Batch, Shards, Stream
from dmd2.errors import Refused
from dmd2.evaluation.features import by_name, distance
from dmd2.package import Model, load_network, model_card, save_network
from dmd2.pictures import grid
from dmd2.progress import Progress
from dmd2.run import Pace, play
from dmd2.sample import Sample
from dmd2.storage import Manifest, check, drafted, finished, local, read

PREVIEW_ROWS = 8
"""Rows of a picture grid; a column per class, as far as ten go."""

Sampler = Callable[[Sequence[int], int], torch.Tensor]
"""(labels, seed) -> images, uint8 (N, C, H, W)."""


def shard(config: Config, source: str, out: str) -> Manifest:
    """Write the images of a source as WebDataset shards, with some held out for evaluation.

    Args:
        source: `digits`, or a folder of images with one sub-folder per class.
        out: Folder to make.
    """
    images = open_source(source)
    inputs = {"source": images.fingerprint}
    if done := finished(out, "shards", config, inputs):
        return done
    with drafted(out, "shards", config, inputs) as draft:
        tally = write_shards(images, config, draft.path)
        draft.facts |= {
            "source": source,
            "train": tally.images[TRAIN],
            "holdout": tally.images[HOLDOUT],
            "classes": images.classes,
            "histogram": [tally.histogram[i] for i in range(len(images.classes))],
            "broken": tally.broken,
            "shards": tally.shards,
        }
    return read(out, "shards")


def teach(config: Config, data: str, out: str) -> Manifest:
    """Train a small EDM teacher on the shards. For demos, tests and ablations: a real user brings a teacher.

    Args:
        data: Folder of shards.
        out: Folder to make.
    """
    inputs = {"shards": read(data, "shards").digest}
    if done := finished(out, "teacher", config, inputs):
        return done
    device, settings = parallel.device(), config.teach
    with drafted(out, "teacher", config, inputs, resumable=True) as draft:
        game = build.teaching(config, device)
        pace = Pace(
            settings.steps,
            settings.batch,
            settings.log_every,
            settings.save_every,
            settings.steps,
            1,
            config.seed,
        )
        play(
            "teach", game, _reader(config, data, settings.batch, device), pace, draft.path, lambda step: None
        )
        save_network(draft.path, config.family, (), game.teacher.result())
        draft.facts |= _size(game.teacher.module, settings.steps, settings.batch)
    return read(out, "teacher")


def distill(config: Config, data: str, teacher: str, out: str) -> Manifest:
    """Distil a teacher into a one- or few-step student with DMD2.

    Args:
        data: Folder of shards: the real images of the GAN, and the classes to draw.
        teacher: Folder of the teacher.
        out: Folder to make.
    """
    inputs = {"shards": read(data, "shards").digest, "teacher": read(teacher, "teacher").digest}
    if done := finished(out, "run", config, inputs):
        return done
    check(teacher, read(teacher, "teacher"))
    model = load_network(teacher)
    _same_shape(model.config, config)
    device, settings = parallel.device(), config.distill
    with drafted(out, "run", config, inputs, resumable=True) as draft:
        game = build.trainer(config, model.network, device)
        pace = Pace(
            settings.steps,
            settings.batch,
            settings.log_every,
            settings.save_every,
            settings.preview_every,
            settings.keep,
            config.seed,
        )
        labels = _columns(config.family.network.classes)

        def preview(step: int) -> None:
            student = build.family(config.family).network().to(device)
            student.load_state_dict(game.student.result())
            images = Model(config.family, model.family, student, settings.student_levels).sample(
                labels, config.evaluate.seed
            )
            (draft.path / "previews").mkdir(exist_ok=True)
            grid(images, len(labels) // PREVIEW_ROWS).save(draft.path / "previews" / f"{step:08d}.png")

        play("distill", game, _reader(config, data, settings.batch, device), pace, draft.path, preview)
        save_network(draft.path, config.family, settings.student_levels, game.student.result())
        draft.facts |= _size(game.student.module, settings.steps, settings.batch)
    return read(out, "run")


def sample(package: str, out: str, count: int = 80, seed: int = 0, labels: tuple[int, ...] = ()) -> Path:
    """Sample a package, or the student of a run, into a picture grid.

    Args:
        package: Folder of a package or of a finished run.
        out: PNG file to write.
        count: Images.
        seed: Seed of the noise.
        labels: Classes, repeated to `count`; all classes in turn if none are given.
    """
    if count < 1:
        raise Refused(f"count is {count}; draw at least one image")
    model = load_network(package)
    if not model.levels:
        raise Refused(f"{package} holds a teacher; sample takes a package or a run")
    classes = list(labels) or list(range(model.config.network.classes))
    images = model.sample(list(itertools.islice(itertools.cycle(classes), count)), seed)
    path = local(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    _save_png(grid(images, min(len(classes), 10)), path)
    return path


def evaluate(config: Config, data: str, teacher: str, run: str, out: str) -> Manifest:
    """Compare student and teacher with held-out real images: FID, from the same noise and the same classes.

    Args:
        data: Folder of shards, with held-out images.
        teacher: Folder of the teacher.
        run: Folder of the distillation.
        out: Folder to make.
    """
    inputs = {
        "shards": read(data, "shards").digest,
        "teacher": read(teacher, "teacher").digest,
        "run": read(run, "run").digest,
    }
    made = read(run, "run")
    for name, given in (("shards", data), ("teacher", teacher)):
        if made.inputs[name] != inputs[name]:
            raise Refused(
                f"{run} was not made with the {name} in {given}; evaluate it with the {name} it was made with"
            )
    if done := finished(out, "evaluation", config, inputs):
        return done
    check(teacher, read(teacher, "teacher"))
    check(run, made)
    device, settings = parallel.device(), config.evaluate
    holdout = Shards(data, HOLDOUT).in_order(settings.images)
    if len(holdout.image) < 2:
        raise Refused(
            f"{data} holds out {len(holdout.image)} image; FID needs at least 2, better thousands: shard again"
        )
    labels = balanced(holdout, settings.images)
    student, original = _on(device, load_network(run)), _on(device, load_network(teacher))
    with drafted(out, "evaluation", config, inputs) as draft:
        features = by_name(config, data, holdout, device)
        real = features(holdout.image)
        samplers: dict[str, Sampler] = {
            "student": student.sample,
            "teacher": lambda part, seed: original.sample_teacher(part, seed, settings.teacher_steps),
            "teacher_1step": lambda part, seed: Model(
                original.config, original.family, original.network, (len(original.family.diffusion) - 1,)
            ).sample(part, seed),
        }
        for name, sampler in samplers.items():
            images = sampled(name, sampler, labels, settings)
            draft.facts[f"fid_{name}"] = distance(features(images), real)
        train = Shards(data, TRAIN).in_order(settings.images)
        draft.facts |= features.facts | {
            "fid_real": distance(features(train.image), real),
            "nfe_student": len(student.levels),
            "nfe_teacher": original.family.teacher_calls(settings.teacher_steps),
            "images": settings.images,
            "images_real": len(holdout.image),
            "seed": settings.seed,
        }
        _grids(draft.path, config, samplers)
        grid(holdout.image[:80], 10).save(draft.path / "real.png")
    return read(out, "evaluation")


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


def package(run: str, evaluation: str, gate: str, out: str) -> Manifest:
    """Make what users load: weights, how to use them, a model card. Then load it and compare.

    Args:
        run: Folder of the distillation.
        evaluation: Folder of its evaluation.
        gate: Folder of the gate that accepted it.
        out: Folder to make.
    """
    made, judged, decided = read(run, "run"), read(evaluation, "evaluation"), read(gate, "gate")
    if judged.inputs["run"] != made.digest or decided.inputs["evaluation"] != judged.digest:
        raise Refused(
            f"{evaluation} and {gate} do not judge the run in {run}; evaluate that run and pass it through the gate"
        )
    if decided.facts["decision"] != "accepted":
        raise Refused(f"{gate} rejected this run ({decided.facts['reason']}); nothing is packaged")
    inputs = {"run": made.digest, "evaluation": judged.digest, "gate": decided.digest}
    if done := finished(out, "package", made.config, inputs):
        return done
    check(run, made)
    model = load_network(run)
    with drafted(out, "package", made.config, inputs) as draft:
        save_network(draft.path, model.config, model.levels, model.network.state_dict())
        (draft.path / "README.md").write_text(model_card(made, judged, decided))
        labels = _columns(model.config.network.classes)
        images = model.sample(labels, seed=0)
        _save_png(grid(images, len(labels) // PREVIEW_ROWS), draft.path / "samples.png")
        if not torch.equal(load_network(draft.path).sample(labels, seed=0), images):
            raise Refused(
                "the package, loaded again, does not sample what the run samples; it was not published"
            )
        draft.facts |= {
            "recipe": made.config.recipe if made.config else "",
            "fid_student": judged.facts["fid_student"],
        }
    return read(out, "package")


def report(
    data: str, teacher: str, run: str, evaluation: str, gate: str, out: str, package: str = ""
) -> Path:
    """Write one self-contained HTML page about a whole run.

    Args:
        data: Folder of shards.
        teacher: Folder of the teacher.
        run: Folder of the distillation.
        evaluation: Folder of its evaluation.
        gate: Folder of its gate.
        out: HTML file to write.
        package: Folder of the package, if there is one.
    """
    kinds = {"shards": data, "teacher": teacher, "run": run, "evaluation": evaluation, "gate": gate}
    manifests = {kind: read(folder, kind) for kind, folder in kinds.items()}
    if package:
        manifests["package"] = read(package, "package")
    path = local(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    reports.write_report(path, manifests, local(run), local(evaluation))
    return path


def _reader(config: Config, data: str, batch: int, device: torch.device) -> Callable[[int], Iterator[Sample]]:
    family = build.family(config.family)
    stream = Stream(Shards(data, TRAIN), batch, config.seed, config.loader.shards_in_memory)
    return lambda first: (family.read(part).to(device) for part in stream.batches(first))


def _same_shape(teacher: EdmConfig, config: Config) -> None:
    if teacher != config.family:
        mine, its = config.family.network.model_dump(), teacher.network.model_dump()
        differs = [
            f"{name} is {its[name]}, not {mine[name]}" for name in mine if its[name] != mine[name]
        ] or ["its noise levels differ"]
        raise Refused(
            f"the teacher is of another shape than recipe {config.recipe!r}: {', '.join(differs[:3])}; use the recipe it was made for, or set --family to match"
        )


def _size(network: nn.Module, steps: int, batch: int) -> dict[str, Any]:
    return {
        "parameters": sum(p.numel() for p in network.parameters()),
        "steps": steps,
        "images": steps * batch,
    }


def _on(device: torch.device, model: Model) -> Model:
    model.network.to(device)
    return model


def _columns(classes: int) -> list[int]:
    """Labels of a picture grid: a column per class."""
    return [label for _ in range(PREVIEW_ROWS) for label in range(min(classes, 10))]


def balanced(holdout: Batch, count: int) -> list[int]:
    """Classes to draw, in the shares of the held-out images."""
    return list(itertools.islice(itertools.cycle(holdout.label.tolist()), count))


def sampled(name: str, sampler: Sampler, labels: list[int], settings: EvaluateConfig) -> torch.Tensor:
    """Images for all labels; each part has its own seed, so that a part can be made again alone."""
    images = []
    with Progress(f"sample {name}", len(labels), "images") as progress:
        for start in range(0, len(labels), settings.batch):
            part = labels[start : start + settings.batch]
            images.append(sampler(part, settings.seed * 1_000_003 + start))
            progress.advance(len(part))
    return torch.cat(images)


def _grids(folder: Path, config: Config, samplers: dict[str, Sampler]) -> None:
    """A picture of each sampler, all from the same noise and classes."""
    labels = _columns(config.family.network.classes)
    for name, sampler in samplers.items():
        _save_png(
            grid(sampler(labels, config.evaluate.seed), len(labels) // PREVIEW_ROWS), folder / f"{name}.png"
        )


def _save_png(picture: Image.Image, path: Path) -> None:
    draft = path.with_name(f".{path.name}.partial")
    picture.save(draft, format="PNG")
    draft.replace(path)
