"""Distillation of a teacher into a student with DMD2: read the inputs, build the trainer, train, save the student.

Several processes may run this function for one output (torchrun); rank 0 reads the weights and writes the result.
"""

from __future__ import annotations

from dataclasses import replace

from dmd2.config import Config
from dmd2.io.artifact import Manifest, find_finished, open_artifact, read_manifest
from dmd2.stages.inputs import prompts_digest, read_training_samples, sample_digests


def distill(
    config: Config, data: str, teacher: str, out: str, start: str = "", prompts: str = ""
) -> Manifest:
    """Distil a teacher into a one- or few-step student with DMD2.

    Args:
        data: Folder of shards or latents: the real samples of the GAN, and the classes or captions to sample.
            With a regression, folder of pairs.
        teacher: Folder of the teacher.
        out: Folder to write the run to.
        start: Run to start from instead of the teacher: its student, and its critic if it had one.
        prompts: File of prompts to sample instead of those of the data.
    """
    from dmd2.data.loader import Shards
    from dmd2.data.shards import TRAIN
    from dmd2.models.family import check_same_family
    from dmd2.parallel import ranks, sharding
    from dmd2.plan.utilization import training_throughput
    from dmd2.stages.distributed import batch_reader, draft_for_all_ranks, training_facts
    from dmd2.stages.networks import (
        check_same_vae,
        load_artifact_model,
        save_student,
        starting_weights,
        student_model,
    )
    from dmd2.stages.pictures import preview_family, sample_grid
    from dmd2.stages.prompts import preview_prompts, prompt_sampler
    from dmd2.training import build
    from dmd2.training.loop import LoopSettings, load_best, train

    world, settings = ranks.init_distributed(), config.distill
    with world.main_process_first():
        samples = read_manifest(data, "pairs") if settings.regression else read_training_samples(config, data)
        teacher_manifest = read_manifest(teacher, "teacher")
        inputs = sample_digests(samples) | {"teacher": teacher_manifest.digest} | prompts_digest(prompts)
        inputs |= {"start": read_manifest(start, "run").digest} if start else {}
        if done := find_finished(out, "run", config, inputs):
            return done
        model = load_artifact_model(teacher, teacher_manifest, weights=world.is_main)
        check_same_family(model.config, config.family)
        check_same_vae(open_artifact(teacher, teacher_manifest, "vae/*"), samples, data)
        world.local_rows(settings.batch)
    with draft_for_all_ranks(world, out, "run", config, inputs) as draft:
        draw_prompts = prompt_sampler(model.family, prompts, world.device) if prompts else None
        weights = model.network.state_dict() if world.is_main else {}
        started_from = starting_weights(start, weights=world.is_main)
        throughput = training_throughput(config, model.family, world)
        trainer = build.trainer(config, model.family, weights, world, started_from, draw_prompts)
        del weights
        loop_settings = LoopSettings(
            settings.steps,
            throughput,
            settings.log_every,
            settings.save_every,
            settings.preview_every,
            settings.keep_checkpoints,
            config.engine.hang_timeout_s,
        )
        student = replace(student_model(model, config), network=trainer.student.module)
        previewed = replace(
            student, family=preview_family(config, model, open_artifact(teacher, teacher_manifest))
        )
        draft.facts["prompts"] = preview_prompts(config.family, Shards(data, TRAIN, samples.kind), prompts)

        def preview(step: int) -> None:
            with trainer.student.swap_in_inference_weights():
                picture = sample_grid(config.family, previewed.sample, draft.facts["prompts"], config.seed)
            if world.is_main:
                (draft.path / "previews").mkdir(exist_ok=True)
                picture.save(draft.path / "previews" / f"{step:08d}.png")

        read_batch = model.family.read_pairs if settings.regression else model.family.read
        batches = batch_reader(config, data, settings.batch, world, samples.kind, read_batch)
        score = None
        if settings.best.images:
            from dmd2.stages.checkpoint_score import checkpoint_score  # slow to import

            score = checkpoint_score(config, student, trainer.student, data, samples, prompts, world)
        train("distill", trainer, batches, loop_settings, draft, preview, world, score)
        if score:
            draft.facts |= load_best(draft, trainer.student, world)
        result = sharding.gather_full_tensors(trainer.student.inference_weights(), world)
        if world.is_main:
            save_student(draft, config, student, result, teacher, teacher_manifest)
            draft.facts |= training_facts(trainer.student.module, settings.steps, settings.batch)
    return read_manifest(out, "run")
