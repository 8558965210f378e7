"""The decision whether a student is good enough to be packaged."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from dmd2.config import Config
from dmd2.errors import Refused
from dmd2.evaluation import decision
from dmd2.evaluation.scores import SCORES_FILE, MetricScores, read_scores, scores_by
from dmd2.io.artifact import MANIFEST, Manifest, find_finished, open_artifact, read_manifest
from dmd2.io.staging import draft_artifact
from dmd2.io.storage import join_uri, open_store
from dmd2.stages.previous import previous_scores


def gate(config: Config, evaluation: str, out: str, previous: str = "") -> Manifest:
    """Accept or reject a student by its scores, or say that there is not enough evidence for either.

    Args:
        evaluation: Folder of the evaluation.
        out: Folder to write the decision to.
        previous: Package or evaluation of the last accepted student of the same teacher, or a folder of published models in which to
            look for it.
    """
    evaluated = read_manifest(evaluation, "evaluation")
    _check_scores(evaluation, evaluated)
    inputs = {"evaluation": evaluated.digest}
    if previous and open_store(previous).version(MANIFEST):
        inputs["previous"] = read_manifest(previous, "package", "evaluation").digest
    if done := find_finished(out, "gate", config, inputs):
        if not evaluated.seal:  # its digest does not cover its scores
            _check_same_decision(out, done, config, evaluated)
        return done
    before = previous_scores(previous, evaluated)
    found = examine(config, evaluated.facts, before.scores if before else {})
    answer, reason = decision.decide(found)
    with draft_artifact(out, "gate", config, inputs) as draft:
        draft.facts |= {"decision": answer, "reason": reason, "conditions": decision.facts(found)}
        if before:
            draft.facts["previous"] = before.uri
    return read_manifest(out, "gate")


def _check_same_decision(out: str, done: Manifest, config: Config, evaluation: Manifest) -> None:
    answer, _ = decision.decide(examine(config, evaluation.facts, {}))
    if done.facts["decision"] != answer:
        raise Refused(
            f"{out} holds the decision {done.facts['decision']!r}, but these scores give {answer!r}; choose another --out or remove it"
        )


def examine(config: Config, facts: Mapping[str, Any], previous: Mapping[str, Any]) -> list[decision.Finding]:
    """What became of each condition of the gate. `facts` and `previous` are those of the evaluation and of the last accepted student."""
    computed = {scores.name for scores in read_scores(facts)}
    all_conditions = decision.conditions(config.gate, scores_by(config.gate.metric, facts).better)
    found = []
    for condition in all_conditions:
        if condition.subject == decision.TEACHER and condition.metric not in computed:
            continue
        scores = scores_by(condition.metric, facts)
        if condition.of == decision.PREVIOUS:
            if not previous:
                continue
            scores = scores.with_set(
                decision.PREVIOUS, scores_by(condition.metric, previous), decision.STUDENT
            )
        found.append(decision.examine(condition, scores))
    return found


def _check_scores(folder: str, evaluation: Manifest) -> None:
    """Raise Refused if the file with the scores is not what the manifest says, or a score is no number."""
    for scores in read_scores(evaluation.facts):
        _check_numbers(folder, scores)
    if any(file.path == SCORES_FILE for file in evaluation.files):
        path = open_artifact(folder, evaluation, SCORES_FILE) / SCORES_FILE
        if json.loads(path.read_text()) != evaluation.facts["scores"]:
            raise Refused(
                f"{join_uri(folder, SCORES_FILE)} and the scores in the manifest beside it differ; evaluate again"
            )


def _check_numbers(folder: str, scores: MetricScores) -> None:
    for name, value in scores.values.items():
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise Refused(
                f"{join_uri(folder, MANIFEST)}: the {scores.title} of {name!r} is {value!r}, which is no number; evaluate again, with a "
                "network that has finite weights"
            )
