"""The decision whether a student is good enough to be packaged."""

from __future__ import annotations

from dmd2.config import Config
from dmd2.errors import Refused
from dmd2.evaluation.scores import MetricScores, scores_by
from dmd2.io.artifact import Manifest, find_finished, read_manifest
from dmd2.io.staging import draft_artifact


def gate(config: Config, evaluation: str, out: str) -> Manifest:
    """Accept or reject a student by comparing one of its scores with the teacher's.

    Args:
        evaluation: Folder of the evaluation.
        out: Folder to write the decision to.
    """
    evaluated = read_manifest(evaluation, "evaluation")
    inputs = {"evaluation": evaluated.digest}
    if done := find_finished(out, "gate", config, inputs):
        return done
    accepted, reason = decide(scores_by(config.gate.metric, evaluated.facts), config.gate.factor)
    with draft_artifact(out, "gate", config, inputs) as draft:
        draft.facts |= {"decision": "accepted" if accepted else "rejected", "reason": reason}
    return read_manifest(out, "gate")


def decide(scores: MetricScores, factor: float) -> tuple[bool, str]:
    """(whether the student is accepted, why): student <= factor * teacher if smaller scores are better, student >= teacher / factor
    if larger ones are."""
    student, teacher = scores.values["student"], scores.values["teacher"]
    if teacher <= 0:
        raise Refused(
            f"the teacher's {scores.title} is {scores.text('teacher')}; a multiple of it is a bound only if it is positive: set --gate.metric "
            "to another metric, or evaluate more images"
        )
    theirs = scores.text("teacher")
    if scores.better == "smaller":
        bound, formula = teacher * factor, f"{factor:g} x the teacher's {theirs}"
        accepted, relation = student <= bound, ("more than", "at most")
    else:
        bound, formula = teacher / factor, f"the teacher's {theirs} / {factor:g}"
        accepted, relation = student >= bound, ("less than", "at least")
    reason = (
        f"{scores.title} of the student {scores.text('student')} is {relation[accepted]} {formula} "
        f"= {scores.format.format(bound)}"
    )
    return accepted, reason
