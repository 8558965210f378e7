"""The stages: each a function from folders to a folder, one verb of the command line, one component of the pipeline.

A stage that is called again with what it was already given returns at once; one that was interrupted continues.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from dmd2 import build, checkpoint, parallel
from dmd2 import report as reports
from dmd2.config import Config, EdmConfig, EvaluateConfig, FamilyConfig
from dmd2.data import latents
from dmd2.data.encoders import find
from dmd2.data.pairs import write_pairs
from dmd2.data.prompts import read_prompts
from dmd2.data.shards import HOLDOUT, TRAIN, deliver, told, write_shards
from dmd2.data.sources import open_source
from dmd2.data.stream import Batch, Shards, Stream
from dmd2.errors import Refused
from dmd2.folders import MANIFEST, Draft, Manifest, drafted, finished, joined, opened, read
from dmd2.models.family import ModelFamily, Prompt, Shown
from dmd2.package import Model, load_network, model_card, save_network
from dmd2.parallel import World
from dmd2.pictures import grid
from dmd2.plan import plan as plan
from dmd2.progress import Progress
from dmd2.rng import Rng
from dmd2.run import Pace, Score, play, use_best
from dmd2.sample import Sample
from dmd2.storage import at, fetched, is_local, local, replaced, sha256
from dmd2.tensors import save_tensors
from dmd2.trainer import Player

SMALL = 64
"""Pixels along a side up to which a picture grid has 8 rows of 10; of larger images, 2 rows of 4."""

PROMPTS = (
    "a photo of a red apple",
    "a portrait of an old sailor",
    "a small house by the sea",
    "a green parrot",
)
"""What the pictures of a student show that came without captions."""

Sampler = Callable[[Sequence[Prompt], int], torch.Tensor]
"""(prompts, seed) -> images, uint8 (N, C, H, W)."""


def shard(config: Config, source: str, out: str, workers: int = 0, part: str = "") -> Manifest:
    """Write the images of a source as shards, with some held out for evaluation.

    The bytes are the same for any number of workers and parts. Killed, the same command continues. To share the work
    among machines, give each a part, `--part 0/4` to `--part 3/4`, and at last call it once without: it makes the
    folder of what the parts have left.

    Args:
        source: `digits`, a folder of images with one sub-folder per class, or another layout (README, Data).
        out: Folder to make, local or gs://.
        workers: Processes; 0 = one per core.
        part: `i/n` for the i-th of n parts, counted from 0; empty for all of it.
    """
    images, share = open_source(source), _part(part)
    inputs = {"source": images.fingerprint}
    if done := finished(out, "shards", config, inputs):
        return done
    if part and config.data.format == "lmdb" and not is_local(out):
        raise Refused(
            "a table on a bucket is made by one machine; leave out --part, or set --data.format tar"
        )
    workers = workers or os.cpu_count() or 1
    with drafted(out, "shards", config, inputs, resumable=True, part=bool(part)) as draft:
        receipts = write_shards(images, config, draft, workers, share)
        if part:
            return _unpublished("shards", config, inputs, {"part": part, "units": len(receipts)})
        draft.facts |= {"source": source, "classes": images.classes} | told(receipts, len(images.classes))
        draft.facts["shards"] = deliver(receipts, config, draft)
    return read(out, "shards")


def encode(config: Config, data: str, vae: str, out: str) -> Manifest:
    """Encode the training images with a VAE, once for all. The images that are held out stay images.

    Started with torchrun or accelerate, each process encodes its share of the shards; the bytes are the same for any
    number of them, on machines of one kind. Killed, the same command continues.

    Args:
        data: Folder of shards.
        vae: Folder of a diffusers AutoencoderKL, or of a pipeline that has one; local, gs://, or a name on the hub.
        out: Folder to make, local or gs://.
    """
    networks = find(vae, config.encode.text)
    inputs = {"shards": read(data, "shards").digest, "vae": networks.digest}
    if done := finished(out, "latents", config, inputs):
        return done
    state, shards = latents.processes(), Shards(data, TRAIN, cache_gb=config.loader.cache_gb)
    encoder = latents.Encoder.load(shards, config, networks, state.device)
    if state.is_main_process:
        print(encoder.cost(), file=sys.stderr, flush=True)
    draft_of = partial(drafted, out, "latents", config, inputs, resumable=True)
    if state.num_processes > 1:
        with draft_of(part=True) as draft:
            latents.write_latents(encoder, draft, (state.process_index, state.num_processes))
        state.wait_for_everyone()
    if state.is_main_process:
        with draft_of() as draft:
            receipts = latents.write_latents(encoder, draft)
            draft.facts |= encoder.facts(networks, receipts)
            draft.facts["shards"] = latents.deliver(receipts, draft)
            alone = find(vae, text=False)
            alone.copy(draft.path)
            draft.facts["vae"] = alone.digest
    state.wait_for_everyone()
    return read(out, "latents")


def resolve(config: Config, source: str, out: str, base: str = "", vae: str = "") -> Manifest:
    """Bring a teacher from elsewhere into a folder. Nothing of it is executed, and what is not understood is refused.

    Args:
        source: For sd15 and sdxl: a pipeline folder of diffusers with safetensors (local, gs://, or a name on the hub),
            or a single-file checkpoint (.safetensors). For edm: NVIDIA's pickle, read without running it.
        out: Folder to make.
        base: For a single file: a pipeline folder of diffusers whose configs and tokenizers it goes with.
        vae: Another VAE than the teacher's own, such as the fp16-fixed one of SDXL.
    """
    with tempfile.TemporaryDirectory() as scratch:
        bring, inputs = _found(config, source, base, vae, Path(scratch))
        if done := finished(out, "teacher", config, inputs):
            return done
        with drafted(out, "teacher", config, inputs) as draft:
            bring(draft.path)
            facts = {"family": config.family.model_dump(mode="json"), "levels": []}
            (draft.path / "network.json").write_text(json.dumps(facts, indent=1))
            teacher = load_network(draft.path)
            draft.facts |= {"parameters": _count(teacher.network), "source": source} | teacher.family.facts
    return read(out, "teacher")


def a_teacher(config: Config, given: str, data: str, out: str) -> str:
    """The folder of the teacher: the one given if it is one already, what is given brought into `out`, or, with nothing
    given, a small one trained on the shards."""
    if not given:
        teach(config, data, out)
    elif at(given).generation(MANIFEST) and read(given, "teacher"):
        return given
    else:
        resolve(config, given, out)
    return out


def what_it_learns_from(config: Config, data: str, teacher: str, out: str) -> str:
    """The folder that `distill` takes: the shards, or for a network on latents what the teacher's VAE makes of them."""
    if not config.family.latent:
        return data
    encode(config, data, teacher, out)
    return out


def _found(
    config: Config, source: str, base: str, vae: str, scratch: Path
) -> tuple[Callable[[Path], None], dict[str, str]]:
    """How to bring a teacher into a folder, and the digest of what it is."""
    from dmd2.models import imports

    if isinstance(config.family, EdmConfig):
        path = fetched(source)
        network, weights = imports.edm_pickle(path)
        if network != config.family.network:
            _same_shape(config.family.model_copy(update={"network": network}), config)
        return lambda folder: build.family(config.family).save(weights, folder, ()), {"source": sha256(path)}
    if source.endswith((".safetensors", ".ckpt")):
        imports.single_file(fetched(source), local(base) if base else None, scratch / "pipeline")
        source = str(scratch / "pipeline")
    networks = find(source, text=True, whole=True)
    other = find(vae, text=False) if vae else None

    def bring(folder: Path) -> None:
        networks.copy(folder)
        if other:
            other.copy(folder)

    return bring, {"source": networks.digest} | ({"vae": other.digest} if other else {})


def adopt(config: Config, source: str, teacher: str, out: str) -> Manifest:
    """Make a run of a student that was distilled elsewhere, to evaluate it, to package it, or to start from it.

    Args:
        source: Weights of a U-Net (.safetensors, or .bin, which is read as tensors only), a raw training folder of DMD2, or
            a LoRA in kohya's or diffusers' naming.
        teacher: Folder of the teacher it was distilled from.
        out: Folder to make.
    """
    from dmd2.models import imports

    path = local(source) if is_local(source) else fetched(source)
    if not path.exists():
        raise Refused(f"{source} does not exist; give weights, or a training folder")
    inputs = {"source": _content(path), "teacher": read(teacher, "teacher").digest}
    if done := finished(out, "run", config, inputs):
        return done
    model = _network(teacher, read(teacher, "teacher"))
    _same_shape(model.config, config)
    if isinstance(config.family, EdmConfig):
        network, weights = imports.edm_student(path)
        _same_shape(config.family.model_copy(update={"network": network}), config)
        prompts = _classes(config.family)
    else:
        plain = {name.removeprefix("unet."): weight for name, weight in model.network.state_dict().items()}
        weights = {f"unet.{name}": w for name, w in imports.unet_weights(path, plain).items()}
        prompts = list(PROMPTS)
    with drafted(out, "run", config, inputs) as draft:
        save_network(draft.path, _student(model, config), weights)
        load_network(draft.path)
        draft.facts |= {"parameters": _count(model.network), "adopted": source, "prompts": prompts}
    return read(out, "run")


def teach(config: Config, data: str, out: str) -> Manifest:
    """Train a small EDM teacher on the shards. For demos, tests and ablations: a real user brings a teacher.

    Args:
        data: Folder of shards, or of latents if the network works on them (--family.latent).
        out: Folder to make.
    """
    samples = _samples(config, data)
    inputs = _digests(samples)
    if done := finished(out, "teacher", config, inputs):
        return done
    if not isinstance(config.family, EdmConfig):
        raise Refused(
            f"teach trains small teachers of the EDM family; recipe {config.recipe!r} needs a teacher of kind {config.family.kind}: bring one with dmd2 resolve"
        )
    world, settings = parallel.join(), config.teach
    with _together(world, out, "teacher", config, inputs) as draft:
        game = build.teaching(config, world)
        pace = Pace(
            settings.steps,
            settings.batch,
            settings.log_every,
            settings.save_every,
            settings.steps,
            1,
            config.engine.hang_s,
        )
        family = build.family(config.family, opened(data, samples, "vae/*") if config.family.latent else None)
        batches = _reader(config, data, settings.batch, world, samples.kind, family.read)
        play("teach", game, batches, pace, draft, lambda step: None, world)
        result = parallel.gathered(game.teacher.result(), world)
        if world.main:
            save_network(draft.path, Model(config.family, family, game.teacher.module, ()), result)
            draft.facts |= _size(game.teacher.module, settings.steps, settings.batch)
    return read(out, "teacher")


def pairs(config: Config, data: str, teacher: str, out: str, prompts: str = "") -> Manifest:
    """Sample the teacher, and keep noise and answer: what a one-step student learns from before it is distilled.

    Args:
        data: Folder of shards or latents, whose captions are sampled.
        teacher: Folder of the teacher.
        out: Folder to make. Killed, the same command continues.
        prompts: File of prompts to sample instead.
    """
    described, original = read(data, "shards", "latents"), read(teacher, "teacher")
    inputs = _digests(described) | {"teacher": original.digest} | _digest_of(prompts)
    if done := finished(out, "pairs", config, inputs):
        return done
    model, settings = _on(parallel.device(), _network(teacher, original)), config.pairs
    texts = (
        read_prompts(prompts) if prompts else _captions(Shards(data, TRAIN, described.kind), settings.count)
    )

    def answer(part: Sequence[str], seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        return model.pairs(part, seed, settings.steps, settings.guidance)

    with drafted(out, "pairs", config, inputs, resumable=True) as draft:
        receipts = write_pairs(config, texts, answer, draft)
        draft.facts |= {"classes": [""], "images": settings.count, "guidance": settings.guidance}
        draft.facts["shards"] = latents.deliver(receipts, draft)
    return read(out, "pairs")


def distill(
    config: Config, data: str, teacher: str, out: str, start: str = "", prompts: str = ""
) -> Manifest:
    """Distil a teacher into a one- or few-step student with DMD2.

    Args:
        data: Folder of shards, or of latents: the real samples of the GAN, and what to draw. Of pairs, for a regression.
        teacher: Folder of the teacher.
        out: Folder to make.
        start: Run to start from, instead of the teacher: its student, and its critic if it had one.
        prompts: File of prompts for the student to draw, instead of those of the data.
    """
    world, settings = parallel.join(), config.distill
    with world.in_turn():
        samples = read(data, "pairs") if settings.regression else _samples(config, data)
        original = read(teacher, "teacher")
        inputs = _digests(samples) | {"teacher": original.digest} | _digest_of(prompts)
        inputs |= {"start": read(start, "run").digest} if start else {}
        if done := finished(out, "run", config, inputs):
            return done
        model = _network(teacher, original, weights=world.main)
        _same_shape(model.config, config)
        _same_vae(opened(teacher, original, "vae/*"), samples, data)
        world.rows(settings.batch)
    with _together(world, out, "run", config, inputs) as draft:
        shown = _drawn(model.family, prompts, world.device) if prompts else None
        weights = model.network.state_dict() if world.main else {}
        begun = _start(start, weights=world.main)
        game = build.game(config, model.family, weights, world, begun, shown)
        del weights
        pace = Pace(
            settings.steps,
            settings.batch,
            settings.log_every,
            settings.save_every,
            settings.preview_every,
            settings.keep,
            config.engine.hang_s,
        )
        student = replace(_student(model, config), network=game.student.module)
        looked = replace(student, family=_decoding(config, model, opened(teacher, original)))
        draft.facts["prompts"] = _pictured(config.family, Shards(data, TRAIN, samples.kind), prompts)

        def preview(step: int) -> None:
            with game.student.as_used():
                picture = _picture(config.family, looked.sample, draft.facts["prompts"], config.seed)
            if world.main:
                (draft.path / "previews").mkdir(exist_ok=True)
                picture.save(draft.path / "previews" / f"{step:08d}.png")

        read_batch = model.family.read_pairs if settings.regression else model.family.read
        batches = _reader(config, data, settings.batch, world, samples.kind, read_batch)
        score = _score(config, student, game.student, data, samples, prompts, world)
        play("distill", game, batches, pace, draft, preview, world, score)
        if score:
            draft.facts |= use_best(draft, game.student, world)
        result = parallel.gathered(game.student.result(), world)
        if world.main:
            _save_student(draft, config, student, result, teacher, original)
            draft.facts |= _size(game.student.module, settings.steps, settings.batch)
    return read(out, "run")


def _score(
    config: Config,
    student: Model,
    player: Player,
    data: str,
    samples: Manifest,
    prompts: str,
    world: World,
) -> Score | None:
    """What checkpoints are judged by, if they are."""
    settings = config.distill.best
    if not settings.images:
        return None
    from dmd2.evaluation import features, judge  # slow to import, only needed here

    texts = read_prompts(prompts) if prompts else ()

    def shown(rows: range, beside: Batch) -> Sequence[Prompt]:
        return (
            [texts[row % len(texts)] for row in rows] if texts else balanced(config.family, beside, len(rows))
        )

    with world.in_turn():
        looks = features.pretrained(settings, "distill.best", world.device)
    train = Shards(data, TRAIN, samples.kind, config.loader.cache_gb)
    judged = judge.judge(settings, looks, student.sample, train, student.family, shown, world)

    def score(say: Callable[[str], None]) -> float:
        with player.as_used():
            return judged(say)

    return score


@contextmanager
def _together(world: World, out: str, kind: str, config: Config, inputs: dict[str, str]) -> Iterator[Draft]:
    """A folder that all processes work at: the main one begins it, and gives it its name when all are done."""
    if not world.main:
        meeting, draft = world.told(), joined(out, kind)
        draft.answer(meeting)
        if draft.apart and world.local_rank == 0:
            draft.take("checkpoints/")
        world.wait()
        yield draft
        world.wait()
        world.wait()
        return
    with drafted(out, kind, config, inputs, resumable=True) as draft:
        draft.call(meeting := secrets.randbits(62))
        world.told(meeting)
        world.wait()
        yield draft
        world.wait()
    world.wait()


def _save_student(
    draft: Draft,
    config: Config,
    student: Model,
    result: dict[str, torch.Tensor],
    teacher: str,
    original: Manifest,
) -> None:
    """The whole network; a low-rank update also alone, as diffusers reads it."""
    if config.distill.lora:
        from dmd2.models.lora import exported, merged

        (draft.path / "lora").mkdir(exist_ok=True)
        update = draft.path / "lora" / "pytorch_lora_weights.safetensors"
        save_tensors(exported(result, config.distill.lora), update)
        result = merged(student.family.weights(opened(teacher, original)), result, config.distill.lora)
    save_network(draft.path, student, result)


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
    model = _on(parallel.device(), _network(package, manifest))
    shown: list[Prompt] = [*prompts, *labels] or _any(model.config, manifest)
    wanted = list(itertools.islice(itertools.cycle(shown), count))
    if manifest.kind == "teacher":
        images = model.sample_teacher(wanted, seed, steps or 30, guidance)
    else:
        if guidance != 1:
            raise Refused(f"guidance is {guidance}; it is distilled into a student, so leave it out")
        images = replace(model, levels=_levels(model, steps)).sample(wanted, seed)
    with _delivered(out) as path:
        _save_png(grid(images, min(len(shown), 10)), path)
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
    student = _on(device, _network(run, made))
    guide = _on(device, _network(teacher, original))
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
            "nfe_student": len(student.levels),
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
        pictured = _pictured(config.family, Shards(data, HOLDOUT))
        for name, (_, _, sampler) in samplers.items():
            _save_png(_picture(config.family, sampler, pictured, settings.seed), draft.path / f"{name}.png")
        _save_png(grid(holdout.image[: len(pictured)], _columns(config.family)), draft.path / "real.png")
    return read(out, "evaluation")


def _samplers(student: Model, guide: Model, settings: EvaluateConfig) -> dict[str, tuple[str, int, Sampler]]:
    """By name: whose it is (empty = the recipe's), its steps, and what draws the images."""

    def teacher(steps: int) -> tuple[str, int, Sampler]:
        return (
            "teacher",
            steps,
            lambda part, seed: guide.sample_teacher(part, seed, steps, settings.teacher_guidance),
        )

    count = len(student.levels)
    found: dict[str, tuple[str, int, Sampler]] = {
        "student": ("", count, student.sample),
        "teacher": teacher(settings.teacher_steps),
        "teacher_1step": teacher(1),
    }
    if count > 1:
        found |= {
            "student_1step": ("", 1, replace(student, levels=student.levels[:1]).sample),
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
    model = _network(run, made)
    with drafted(out, "package", made.config, inputs) as draft:
        save_network(draft.path, model, model.network.state_dict())
        if made.config and made.config.distill.lora and not made.facts.get("adopted"):
            shutil.copytree(opened(run, made, "lora/*") / "lora", draft.path / "lora")
        (draft.path / "README.md").write_text(model_card(made, judged, decided))
        prompts = made.facts["prompts"]
        images = model.sample(prompts, seed=0)
        _save_png(grid(images, _columns(model.config)), draft.path / "samples.png")
        if not torch.equal(load_network(draft.path).sample(prompts, seed=0), images):
            raise Refused(
                "the package, loaded again, does not sample what the run samples; it was not published"
            )
        draft.facts |= {
            "recipe": made.config.recipe if made.config else "",
            "fid_student": judged.facts["fid_student"],
        }
    return read(out, "package")


def publish(package: str, out: str) -> Manifest:
    """Copy a package to where models are kept, its manifest last. What is published is never replaced.

    Args:
        package: Folder of the package.
        out: Folder to make, local or gs://.
    """
    made = read(package, "package")
    if at(out).generation(MANIFEST):
        there = read(out, "package")
        if there.digest != made.digest:
            raise Refused(
                f"{out} holds another package ({there.digest[:16]}, not {made.digest[:16]}); choose another --out"
            )
        return there
    with drafted(out, "package", made.config, made.inputs) as draft:
        whole = opened(package, made)
        for file in made.files:
            (draft.path / file.path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(whole / file.path, draft.path / file.path)
        draft.facts |= made.facts
    return read(out, "package")


def report(data: str, teacher: str, run: str, evaluation: str, gate: str, out: str, package: str = "") -> str:
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
    _belong_together(kinds, manifests)
    if package:
        manifests["package"] = read(package, "package")
    curves = opened(run, manifests["run"], "metrics.jsonl", "previews/*")
    pictures = opened(evaluation, manifests["evaluation"])
    with _delivered(out) as path:
        reports.write_report(path, manifests, curves, pictures)
    return out


def _reader(
    config: Config,
    data: str,
    batch: int,
    world: World,
    kind: str,
    read_batch: Callable[[Batch, Rng], Sample],
) -> Callable[[int], Iterator[Sample]]:
    """From a step on, this process's rows of each batch, with their random numbers."""
    shards = Shards(data, TRAIN, kind, config.loader.cache_gb)
    stream, rows = (
        Stream(shards, batch, config.seed, config.loader, world.rank, world.size),
        world.rows(batch),
    )

    def samples(first: int) -> Iterator[Sample]:
        for step, part in enumerate(stream.batches(first), first):
            yield read_batch(part, Rng.at(config.seed, step, rows, world.device)).to(world.device)

    return samples


def _decoding(config: Config, teacher: Model, folder: Path) -> ModelFamily:
    """The family, with the VAE that previews are to be made with."""
    vae = config.distill.preview_vae
    return build.family(config.family, folder, vae) if vae else teacher.family


def _student(teacher: Model, config: Config) -> Model:
    """A model of the teacher's network that takes the steps of the recipe."""
    return replace(teacher, levels=config.distill.student_levels)


def _start(run: str, weights: bool) -> build.Start | None:
    """Student and, if that run had one, critic; a head starts anew."""
    if not run or not weights:
        return build.Start({}) if run else None
    made = read(run, "run")
    student = _network(run, made).network.state_dict()
    saved = sorted({f.path.rpartition("/")[0] for f in made.files if f.path.startswith("checkpoints/")})
    if not saved or not made.config or made.config.distill.lora:
        return build.Start(student)
    beside = f"checkpoints/{made.facts['best_step']:08d}" if "best_step" in made.facts else saved[-1]
    critic = checkpoint.whole(opened(run, made, f"{beside}/*") / beside, "critic")
    network = {k.removeprefix("network."): v for k, v in critic.items() if k.startswith("network.")}
    return build.Start(student, network or None)


def _drawn(family: ModelFamily, prompts: str, device: torch.device) -> build.Prompts:
    """Draws what samples show from a file of prompts."""
    texts = read_prompts(prompts)

    def draw(rng: Rng) -> Shown:
        cond, null = family.condition([texts[i] for i in rng.choose(len(texts))])
        return Shown(cond.to(device), null.to(device))

    return draw


def _captions(shards: Shards, count: int) -> list[str]:
    found = [text for text in shards.in_order(count).text if text]
    if not found:
        raise Refused(
            f"{shards.uri} has no captions to draw; give --prompts, or shard a source with captions"
        )
    return found


def _levels(model: Model, steps: int) -> tuple[int, ...]:
    """The first of the student's levels; more steps than it was made for are refused."""
    if steps > len(model.levels):
        raise Refused(f"steps is {steps}; this student was made for {len(model.levels)}, and may take fewer")
    return model.levels[: steps or len(model.levels)]


def _same_shape(teacher: FamilyConfig, config: Config) -> None:
    mine, its = (_flat(family.model_dump(mode="json")) for family in (config.family, teacher))
    if differs := [
        f"{name} is {its.get(name)}, not {mine.get(name)}"
        for name in mine | its
        if mine.get(name) != its.get(name)
    ]:
        raise Refused(
            f"the teacher is of another shape than recipe {config.recipe!r}: {', '.join(differs[:3])}; use the recipe it was made for, or set --family to match"
        )


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in settings.items() if k != "network"} | settings.get("network", {})


def _same_vae(teacher: Path, samples: Manifest, data: str) -> None:
    """Latents mean something to a network only if they were made with its VAE."""
    if samples.kind == "latents" and samples.facts["vae"] != find(str(teacher), text=False).digest:
        raise Refused(
            f"the latents in {data} were made with another VAE than the teacher's; encode the shards again with --vae set to the teacher's folder"
        )


def _belong_together(folders: dict[str, str], manifests: dict[str, Manifest]) -> None:
    """Each was made from the others that are given."""
    for kind, manifest in manifests.items():
        for name, digest in manifest.inputs.items():
            if name in manifests and manifests[name].digest != digest:
                raise Refused(
                    f"{folders[kind]} was not made from {folders[name]}, but from another {name} folder; give folders of one run"
                )


def _size(network: nn.Module, steps: int, batch: int) -> dict[str, Any]:
    return {
        "parameters": _count(network),
        "steps": steps,
        "images": steps * batch,
    }


def _on(device: torch.device, model: Model) -> Model:
    model.network.to(device)
    return model


def _count(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def _columns(family: FamilyConfig) -> int:
    """Of a picture grid: a class each, as far as ten go."""
    return min(10 if family.image[1] <= SMALL else 4, family.classes)


def _cells(family: FamilyConfig) -> int:
    return _columns(family) * (8 if family.image[1] <= SMALL else 2)


def _classes(family: EdmConfig) -> list[Prompt]:
    return [cell % _columns(family) for cell in range(_cells(family))]


def _pictured(family: FamilyConfig, shards: Shards, prompts: str = "") -> list[Prompt]:
    """What the pictures of a run show: each class in a column, prompts of a file, or captions of the data."""
    if isinstance(family, EdmConfig):
        return _classes(family)
    texts = read_prompts(prompts) if prompts else _captions(shards, _cells(family))
    return list(itertools.islice(itertools.cycle(texts), _cells(family)))


def _picture(family: FamilyConfig, sampler: Sampler, prompts: Sequence[Prompt], seed: int) -> Image.Image:
    return grid(sampler(prompts, seed), _columns(family))


def _any(family: FamilyConfig, manifest: Manifest) -> list[Prompt]:
    """What to show if nobody says."""
    if isinstance(family, EdmConfig):
        return list(range(family.classes))
    if not (prompts := manifest.facts.get("prompts")):
        raise Refused("this network is told by text; give --prompts")
    return list(prompts)


def balanced(family: FamilyConfig, holdout: Batch, count: int) -> list[Prompt]:
    """What to draw, in the shares of the held-out images."""
    shown = holdout.label.tolist() if isinstance(family, EdmConfig) else holdout.text
    return list(itertools.islice(itertools.cycle(shown), count))


def sampled(name: str, sampler: Sampler, prompts: list[Prompt], settings: EvaluateConfig) -> torch.Tensor:
    """Images for all prompts; each part has its own seed, so that a part can be made again alone."""
    images = []
    with Progress(f"sample {name}", len(prompts), "images") as progress:
        for start in range(0, len(prompts), settings.batch):
            part = prompts[start : start + settings.batch]
            images.append(sampler(part, settings.seed * 1_000_003 + start))
            progress.advance(len(part))
    return torch.cat(images)


def _save_png(picture: Image.Image, path: Path) -> None:
    with replaced(path) as draft:
        picture.save(draft, format="PNG")


@contextmanager
def _delivered(out: str) -> Iterator[Path]:
    """A local path for a file that ends up at `out`, wherever that is."""
    if is_local(out):
        yield local(out)
        return
    folder, _, name = out.rpartition("/")
    with tempfile.TemporaryDirectory() as place:
        yield Path(place) / name
        at(folder).put(Path(place) / name, name)


def _network(folder: str, manifest: Manifest, weights: bool = True) -> Model:
    parts = ("vae", "unet", "scheduler", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    path = opened(folder, manifest, "network.*", "model_index.json", *(f"{p}/*" for p in parts))
    return load_network(path, weights)


def _samples(config: Config, data: str) -> Manifest:
    """Of what the network is trained on: shards of images, or of latents."""
    return read(data, "latents" if config.family.latent else "shards")


def _digests(samples: Manifest) -> dict[str, str]:
    """As an input; that of the images too, from which latents were made."""
    return {samples.kind: samples.digest} | {k: v for k, v in samples.inputs.items() if k == "shards"}


def _content(path: Path) -> str:
    """Digest of a file, or of all files of a folder."""
    if path.is_file():
        return sha256(path)
    files = sorted(p for p in path.rglob("*") if p.is_file())
    told = [(str(p.relative_to(path)), sha256(p)) for p in files]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def _digest_of(prompts: str) -> dict[str, str]:
    if not prompts:
        return {}
    return {"prompts": hashlib.sha256(json.dumps(read_prompts(prompts)).encode()).hexdigest()}


def _part(text: str) -> tuple[int, int]:
    """`2/8` -> (2, 8)."""
    number, _, count = (text or "0/1").partition("/")
    if not (number.isdecimal() and count.isdecimal() and int(number) < int(count)):
        raise Refused(f"part is {text!r}; give i/n with i from 0 to n - 1, for example 0/4")
    return int(number), int(count)


def _unpublished(kind: str, config: Config, inputs: dict[str, str], facts: dict[str, Any]) -> Manifest:
    """What a part has to tell: there is no folder yet."""
    return Manifest(kind=kind, config=config, inputs=inputs, files=[], facts=facts, versions={}, seconds=0)
