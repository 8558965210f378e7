"""Distillation of a teacher into a student."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from dmd2.config import Config
from dmd2.data.prompts import read_prompts
from dmd2.data.shards import TRAIN
from dmd2.data.stream import RawBatch, Shards
from dmd2.encoders.pipeline_folder import find
from dmd2.errors import Refused
from dmd2.io.artifact import Manifest, find_finished, open_artifact, read_manifest
from dmd2.io.staging import Draft
from dmd2.io.tensors import save_tensors
from dmd2.model import Model, save_network
from dmd2.models.family import CondPair, ModelFamily, Prompt
from dmd2.parallel import ranks, sharding
from dmd2.parallel.ranks import World
from dmd2.rng import Rng
from dmd2.stages.distributed import batch_reader, draft_for_all_ranks, size_facts
from dmd2.stages.inputs import digest_of, digests, samples_of
from dmd2.stages.networks import network_of, same_shape, student_of
from dmd2.stages.pictures import picture_of
from dmd2.stages.prompts import balanced, pictured
from dmd2.training import build, checkpoint
from dmd2.training.loop import Score, load_best, train
from dmd2.training.metrics_log import LoopSettings
from dmd2.training.optim import Trainable


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
    world, settings = ranks.init_distributed(), config.distill
    with world.main_process_first():
        samples = read_manifest(data, "pairs") if settings.regression else samples_of(config, data)
        original = read_manifest(teacher, "teacher")
        inputs = digests(samples) | {"teacher": original.digest} | digest_of(prompts)
        inputs |= {"start": read_manifest(start, "run").digest} if start else {}
        if done := find_finished(out, "run", config, inputs):
            return done
        model = network_of(teacher, original, weights=world.is_main)
        same_shape(model.config, config)
        _same_vae(open_artifact(teacher, original, "vae/*"), samples, data)
        world.local_rows(settings.batch)
    with draft_for_all_ranks(world, out, "run", config, inputs) as draft:
        shown = _drawn(model.family, prompts, world.device) if prompts else None
        weights = model.network.state_dict() if world.is_main else {}
        begun = _start(start, weights=world.is_main)
        trainer = build.trainer(config, model.family, weights, world, begun, shown)
        del weights
        pace = LoopSettings(
            settings.steps,
            settings.batch,
            settings.log_every,
            settings.save_every,
            settings.preview_every,
            settings.keep_checkpoints,
            config.engine.hang_timeout_s,
        )
        student = replace(student_of(model, config), network=trainer.student.module)
        looked = replace(student, family=_decoding(config, model, open_artifact(teacher, original)))
        draft.facts["prompts"] = pictured(config.family, Shards(data, TRAIN, samples.kind), prompts)

        def preview(step: int) -> None:
            with trainer.student.swap_in_inference_weights():
                picture = picture_of(config.family, looked.sample, draft.facts["prompts"], config.seed)
            if world.is_main:
                (draft.path / "previews").mkdir(exist_ok=True)
                picture.save(draft.path / "previews" / f"{step:08d}.png")

        read_batch = model.family.read_pairs if settings.regression else model.family.read
        batches = batch_reader(config, data, settings.batch, world, samples.kind, read_batch)
        score = _score(config, student, trainer.student, data, samples, prompts, world)
        train("distill", trainer, batches, pace, draft, preview, world, score)
        if score:
            draft.facts |= load_best(draft, trainer.student, world)
        result = sharding.gather_full_tensors(trainer.student.inference_weights(), world)
        if world.is_main:
            _save_student(draft, config, student, result, teacher, original)
            draft.facts |= size_facts(trainer.student.module, settings.steps, settings.batch)
    return read_manifest(out, "run")


def _score(
    config: Config,
    student: Model,
    trainable: Trainable,
    data: str,
    samples: Manifest,
    prompts: str,
    world: World,
) -> Score | None:
    """What checkpoints are judged by, if they are."""
    settings = config.distill.best
    if not settings.images:
        return None
    from dmd2.evaluation import checkpoint_score, features  # slow to import, only needed here

    texts = read_prompts(prompts) if prompts else ()

    def shown(rows: range, beside: RawBatch) -> Sequence[Prompt]:
        return (
            [texts[row % len(texts)] for row in rows] if texts else balanced(config.family, beside, len(rows))
        )

    with world.main_process_first():
        looks = features.pretrained(settings, "distill.best", world.device)
    train = Shards(data, TRAIN, samples.kind, config.loader.cache_gb)
    judged = checkpoint_score.judge(settings, looks, student.sample, train, student.family, shown, world)

    def score(say: Callable[[str], None]) -> float:
        with trainable.swap_in_inference_weights():
            return judged(say)

    return score


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
        result = merged(student.family.weights(open_artifact(teacher, original)), result, config.distill.lora)
    save_network(draft.path, student, result)


def _decoding(config: Config, teacher: Model, folder: Path) -> ModelFamily:
    """The family, with the VAE that previews are to be made with."""
    vae = config.distill.preview_vae
    return build.family(config.family, folder, vae) if vae else teacher.family


def _start(run: str, weights: bool) -> build.Start | None:
    """Student and, if that run had one, critic; a head starts anew."""
    if not run or not weights:
        return build.Start({}) if run else None
    made = read_manifest(run, "run")
    student = network_of(run, made).network.state_dict()
    saved = sorted({f.path.rpartition("/")[0] for f in made.files if f.path.startswith("checkpoints/")})
    if not saved or not made.config or made.config.distill.lora:
        return build.Start(student)
    beside = f"checkpoints/{made.facts['best_step']:08d}" if "best_step" in made.facts else saved[-1]
    critic = checkpoint.load_object(open_artifact(run, made, f"{beside}/*") / beside, "critic")
    network = {k.removeprefix("network."): v for k, v in critic.items() if k.startswith("network.")}
    return build.Start(student, network or None)


def _drawn(family: ModelFamily, prompts: str, device: torch.device) -> build.Prompts:
    """Draws what samples show from a file of prompts."""
    texts = read_prompts(prompts)

    def draw(rng: Rng) -> CondPair:
        cond, uncond = family.condition([texts[i] for i in rng.choose(len(texts))])
        return CondPair(cond.to(device), uncond.to(device))

    return draw


def _same_vae(teacher: Path, samples: Manifest, data: str) -> None:
    """Latents mean something to a network only if they were made with its VAE."""
    if samples.kind == "latents" and samples.facts["vae"] != find(str(teacher), text=False).digest:
        raise Refused(
            f"the latents in {data} were made with another VAE than the teacher's; encode the shards again with --vae set to the teacher's folder"
        )
