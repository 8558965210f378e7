"""Scores of student and teacher against held-out real images."""

from __future__ import annotations

import json

from dmd2.config import Config
from dmd2.errors import Refused
from dmd2.evaluation import metrics
from dmd2.io.artifact import Manifest, find_finished, read_manifest
from dmd2.io.staging import draft_artifact

SCORES = "scores.json"
"""File with the scores, which are in the manifest as well: the digest of an artifact is that of its files."""


def evaluate(config: Config, data: str, teacher: str, run: str, out: str) -> Manifest:
    """Score student and teacher against held-out real images, both from the same noise and for the same classes or captions.

    Args:
        data: Folder of shards, with held-out images.
        teacher: Folder of the teacher.
        run: Folder of the distillation.
        out: Folder to write the evaluation to.
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
    from dmd2.data.shards import HOLDOUT
    from dmd2.parallel import ranks
    from dmd2.stages.image_sets import sampled_sets, save_picture_grids, score_sets
    from dmd2.stages.networks import load_on_device

    if (count := min(settings.images, len(Shards(data, HOLDOUT)))) < 2:
        raise Refused(
            f"{data} holds out {count} image; an evaluation needs at least 2, better thousands: shard again"
        )
    device = ranks.device()
    sets = sampled_sets(config, load_on_device(run, made, device), load_on_device(teacher, original, device))
    with draft_artifact(out, "evaluation", config, inputs) as draft:
        draft.facts |= score_sets(config, data, sets, selected, device)
        draft.facts |= {
            "nfe_student": sets["student"].description.calls,
            "nfe_teacher": sets["teacher"].description.calls,
            "images": settings.images,
            "seed": settings.seed,
        }
        (draft.path / SCORES).write_text(json.dumps(draft.facts["scores"], indent=1))
        save_picture_grids(config, data, sets, draft.path)
    return read_manifest(out, "evaluation")
