"""Scores of student and teacher against held-out real images.

The work is shared by blocks of images: among the processes that torchrun starts, and among machines by `--part`. Blocks that are
there are not made again, and the scores are computed from all of them at the end.
"""

from __future__ import annotations

import hashlib
import json
from functools import partial

from dmd2.config import Config
from dmd2.errors import Refused
from dmd2.evaluation import metrics
from dmd2.evaluation.protocols import SELECTION_SPLIT, find_protocol
from dmd2.evaluation.scores import SCORES_FILE
from dmd2.io.artifact import Manifest, find_finished, read_manifest
from dmd2.io.staging import draft_artifact
from dmd2.stages.inputs import read_training_samples, sample_digests
from dmd2.stages.parts import parse_part, part_manifest, part_of_part


def evaluate(
    config: Config,
    data: str,
    teacher: str,
    run: str = "",
    out: str = "",
    part: str = "",
    scores: str = "",
    reference: str = "",
    *,
    follow: str = "",
    patience: int = 0,
    idle_minutes: float = 60.0,
) -> Manifest:
    """Score student and teacher against held-out real images, both from the same noise and for the same classes or captions.

    Started with torchrun, each process samples its share of the images. To share the work among machines, give each a part,
    `--part 0/4` to `--part 3/4`; then run the command once without `--part`, which computes the scores. Images and scores
    do not depend on the number of processes or parts, on machines of one kind. Interrupted, the same command continues.

    With --follow instead of --run, the checkpoints of a training are scored as they appear, by FID to training samples.

    Args:
        data: Folder of shards, with held-out images; with --follow, of what the run is trained on.
        teacher: Folder of the teacher.
        run: Folder of the distillation.
        out: Folder to write the evaluation to.
        part: `i/n`: only the i-th of n parts of the images, counted from 0; empty = all.
        scores: Folder, local or gs://, that keeps what was measured of teachers and real images, so that a teacher is sampled once
            for all evaluations that share it. Empty = nothing is kept.
        reference: Folder of shards with other real images, whose classes or captions are sampled; empty = those held out in `data`.
        follow: Folder of a distillation, which may not have begun.
        patience: Of --follow: number of checkpoints without an improvement after which it ends; 0 = it follows to the end of the
            training.
        idle_minutes: Of --follow: minutes without a new checkpoint after which it ends.
    """
    if bool(run) == bool(follow) or not out:
        raise Refused(
            "evaluate needs --out, and either --run for a finished run or --follow for one in training"
        )
    if follow:
        if part or scores or reference:
            raise Refused(
                "--follow compares with training samples in one process; leave out --part, --scores, --reference"
            )
        return _follow(config, data, teacher, follow, out, patience, idle_minutes)
    find_protocol(config.evaluate.protocol)
    selected, share = metrics.select(config.evaluate.metrics), parse_part(part)
    original, made = read_manifest(teacher, "teacher"), read_manifest(run, "run")
    inputs = {"shards": read_manifest(data, "shards").digest, "teacher": original.digest, "run": made.digest}
    inputs |= {"reference": read_manifest(reference, "shards").digest} if reference else {}
    baselines = _baseline_digests(config)
    inputs |= {f"baseline.{name}": digest for name, digest in baselines.items()}
    for name, given in (("shards", data), ("teacher", teacher)):
        if made.inputs.get(name, inputs[name]) != inputs[name]:
            raise Refused(
                f"{run} was not made with the {name} in {given}; evaluate it with the {name} it was made with"
            )
    if done := find_finished(out, "evaluation", config, inputs):
        return done
    from dmd2.parallel import ranks
    from dmd2.stages.evaluation import open_evaluation
    from dmd2.stages.image_sets import Network, reference_shards
    from dmd2.stages.kept_scores import KeptScores

    world = ranks.init_distributed()
    with world.main_process_first():
        student, guide = Network(run, made, world.device), Network(teacher, original, world.device)
        real = reference_shards(data, reference)
        evaluation = open_evaluation(
            config, data, real, selected, student, guide, baselines, world.device, KeptScores(scores)
        )
    open_draft = partial(draft_artifact, out, "evaluation", config, inputs, resumable=True)
    if part or world.size > 1:
        with open_draft(part=True) as draft:
            evaluation.measure(draft.store, part_of_part(share, (world.rank, world.size)), world.is_main)
        world.barrier()
    if part:
        return part_manifest("evaluation", config, inputs, {"part": part})
    if world.is_main:
        with open_draft() as draft:
            evaluation.measure(draft.store, (0, 1), visible=True)
            draft.facts |= evaluation.score(draft.store, selected)
            (draft.path / SCORES_FILE).write_text(json.dumps(draft.facts["scores"], indent=1))
            evaluation.save_picture_grids(draft.store, draft.path)
            evaluation.save_galleries(draft.store, draft.path, draft.facts)
            evaluation.keep_scores(draft.store, draft.facts["scores"], draft.path)
    world.barrier()
    world.shutdown()
    return read_manifest(out, "evaluation")


def _baseline_digests(config: Config) -> dict[str, str]:
    """Those of `evaluate.baselines`, by name. Without any, torch is not imported."""
    if not config.evaluate.baselines:
        return {}
    from dmd2.stages.baselines import baseline_digests

    return baseline_digests(config)


def _follow(
    config: Config, data: str, teacher: str, run: str, out: str, patience: int, idle_minutes: float
) -> Manifest:
    """Score the checkpoints of a training until it ends."""
    samples, original = read_training_samples(config, data), read_manifest(teacher, "teacher")
    inputs = sample_digests(samples) | {"teacher": original.digest}
    inputs["run"] = hashlib.sha256(run.encode()).hexdigest()  # of its address: a training has no digest yet
    if done := find_finished(out, "curve", config, inputs):
        return done
    from dmd2.parallel import ranks
    from dmd2.stages.follow import FollowedRun, Follower, make_score

    world = ranks.init_distributed()
    if world.size > 1:
        raise Refused("--follow scores in one process; start it without torchrun")
    student, score = make_score(config, data, samples, teacher, original, world)
    with draft_artifact(out, "curve", config, inputs, resumable=True) as draft:
        follower = Follower(FollowedRun(run), draft, student, score, patience, 60 * idle_minutes)
        draft.facts |= follower.facts(follower.follow())
        draft.facts |= {"split": SELECTION_SPLIT, "seed": config.distill.best.seed}
    return read_manifest(out, "curve")
