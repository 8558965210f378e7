"""The decision about a student."""

from __future__ import annotations

from dmd2.config import Config
from dmd2.io.artifact import Manifest, find_finished, read_manifest
from dmd2.io.staging import draft_artifact


def gate(config: Config, evaluation: str, out: str) -> Manifest:
    """Accept or reject a student by its FID.

    Args:
        evaluation: Folder of the evaluation.
        out: Folder to make.
    """
    judged = read_manifest(evaluation, "evaluation")
    inputs = {"evaluation": judged.digest}
    if done := find_finished(out, "gate", config, inputs):
        return done
    student, teacher, factor = judged.facts["fid_student"], judged.facts["fid_teacher"], config.gate.factor
    accepted = student <= factor * teacher
    reason = (
        f"FID of the student {student:.2f} is {'at most' if accepted else 'more than'} {factor:g} x the teacher's "
        f"{teacher:.2f} = {factor * teacher:.2f}"
    )
    with draft_artifact(out, "gate", config, inputs) as draft:
        draft.facts |= {"decision": "accepted" if accepted else "rejected", "reason": reason}
    return read_manifest(out, "gate")
