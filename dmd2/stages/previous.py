"""The last accepted student of the same teacher, with which the gate compares a new one."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dmd2.errors import Refused
from dmd2.evaluation.protocols import check_comparable
from dmd2.evaluation.scores import student_facts
from dmd2.io.artifact import MANIFEST, Manifest, read_manifest
from dmd2.io.storage import join_uri, open_store

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Previous:
    """An accepted student and its scores."""

    uri: str
    scores: dict[str, Any]
    """Facts of its evaluation, with the scores of the student alone."""


def previous_scores(place: str, evaluation: Manifest) -> Previous | None:
    """The scores of the last accepted student, or None.

    Args:
        place: A package, an evaluation, or a folder of published models; empty = there is none.
        evaluation: That of the new student.

    Raises:
        Refused: The package or evaluation is of another teacher, or was scored in another way.
    """
    if not place:
        return None
    if not open_store(place).version(MANIFEST):
        if not (last := _last_published(place, evaluation)):
            logger.warning("%s has no earlier student to compare with", place)
        return last
    found = _read(place)
    _check_comparable(place, found.scores, evaluation)
    return found


def _read(place: str) -> Previous:
    manifest = read_manifest(place, "package", "evaluation")
    facts = manifest.facts
    if manifest.kind == "evaluation":
        facts = {"scored": student_facts(facts, manifest.inputs)}
    if "scored" not in facts:
        raise Refused(
            f"{place} was packaged by a version that did not note how the student was scored; give the folder of its evaluation"
        )
    return Previous(place, facts["scored"])


def _last_published(place: str, evaluation: Manifest) -> Previous | None:
    """The package below `place` that was made last, of those that can be compared."""
    names = [info.name for info in open_store(place).list_objects() if info.name.endswith(f"/{MANIFEST}")]
    found: list[tuple[str, Previous]] = []
    for name in names:
        uri = join_uri(place, name.removesuffix(f"/{MANIFEST}"))
        manifest = read_manifest(uri, "package")
        facts = manifest.facts
        if "scored" not in facts or manifest.inputs["evaluation"] == evaluation.digest:
            continue
        try:
            _check_comparable(uri, facts["scored"], evaluation)
        except Refused as difference:
            logger.info(str(difference))
            continue
        found.append((facts["made"], _read(uri)))
    return max(found, key=lambda each: each[0])[1] if found else None


def _check_comparable(place: str, facts: Mapping[str, Any], evaluation: Manifest) -> None:
    """Raise Refused if the student at `place` has another teacher or other shards, or was scored in another way."""
    new = student_facts(evaluation.facts, evaluation.inputs)
    for name in (name for name in new if name not in ("scores", "card")):
        if facts.get(name) != new[name]:
            raise Refused(
                f"{place} cannot be compared with the new student: {name} was {facts.get(name)} and is {new[name]}; leave out --previous"
            )
    if "card" in facts and "card" in new:
        check_comparable(facts["card"], new["card"], f"{place} and of the new student")
