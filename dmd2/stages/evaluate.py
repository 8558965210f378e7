"""Scores of student and teacher against held-out real images."""

from __future__ import annotations

from dmd2.config import Config
from dmd2.errors import Refused
from dmd2.evaluation import metrics
from dmd2.evaluation.scores import REAL, MetricScores, score_facts
from dmd2.io.artifact import Manifest, find_finished, read_manifest
from dmd2.io.staging import draft_artifact


def evaluate(config: Config, data: str, teacher: str, run: str, out: str) -> Manifest:
    """Score student and teacher against held-out real images, both from the same noise and for the same classes or captions.

    Args:
        data: Folder of shards, with held-out images.
        teacher: Folder of the teacher.
        run: Folder of the distillation.
        out: Folder to make.
    """
    selected, settings = metrics.select(config.evaluate.metrics), config.evaluate
    original, made = read_manifest(teacher, "teacher"), read_manifest(run, "run")
    inputs = {"shards": read_manifest(data, "shards").digest, "teacher": original.digest, "run": made.digest}
    for name, given in (("shards", data), ("teacher", teacher)):
        if made.inputs.get(name, inputs[name]) != inputs[name]:
            raise Refused(
                f"{run} was not made with the {name} in {given}; evaluate it with the {name} it was made with"
            )
    if done := find_finished(out, "evaluation", config, inputs):
        return done
    from dmd2.data.loader import Shards
    from dmd2.data.shards import HOLDOUT, TRAIN
    from dmd2.evaluation.evaluator import Evaluator, score_states
    from dmd2.evaluation.features import load_extractor
    from dmd2.parallel import ranks
    from dmd2.stages.image_sets import real_batches, sampled_batches, sampled_sets, save_picture_grids
    from dmd2.stages.networks import load_on_device
    from dmd2.stages.prompts import preview_prompts, prompts_of_images, repeat_prompts

    device = ranks.device()
    sets = sampled_sets(config, load_on_device(run, made, device), load_on_device(teacher, original, device))
    holdout = Shards(data, HOLDOUT).evenly_spaced(settings.images)
    if len(holdout.image) < 2:
        raise Refused(
            f"{data} holds out {len(holdout.image)} image; an evaluation needs at least 2, better thousands: shard again"
        )
    prompts = repeat_prompts(prompts_of_images(config.family, holdout), settings.images)
    with draft_artifact(out, "evaluation", config, inputs) as draft:
        evaluator = Evaluator.load(
            selected, settings, lambda: load_extractor(config, data, holdout, device), device
        )
        reference = evaluator.accumulate(real_batches(config.family, holdout))
        scores = {}
        for name, each in sets.items():
            batches = sampled_batches(each.description.title, each.sampler, prompts, settings)
            scores[name] = score_states(evaluator.accumulate(batches), reference)
        train = Shards(data, TRAIN).evenly_spaced(settings.images)
        scores[REAL] = score_states(evaluator.accumulate(real_batches(config.family, train)), reference)
        by_metric = [
            MetricScores.of(metric, {name: found[metric.name] for name, found in scores.items()})
            for metric in selected
        ]
        draft.facts |= evaluator.facts | score_facts(by_metric, [each.description for each in sets.values()])
        draft.facts |= {
            "nfe_student": sets["student"].description.calls,
            "nfe_teacher": sets["teacher"].description.calls,
            "images": settings.images,
            "images_real": len(holdout.image),
            "seed": settings.seed,
        }
        preview = preview_prompts(config.family, Shards(data, HOLDOUT))
        save_picture_grids(config, sets, holdout, preview, draft.path)
    return read_manifest(out, "evaluation")
