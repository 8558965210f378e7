"""The decision on a student: conditions on its scores, each met, violated, or without enough evidence for either.

A condition compares a score with a number, with a multiple of the teacher's score, or with a multiple of the score of the last accepted
student of the same teacher. It is met or violated only if it is so over the whole interval of 95 %; in between there is not enough
evidence. Everything that is compared comes from the manifests of evaluations.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from dmd2.config import GateConfig
from dmd2.errors import Refused
from dmd2.evaluation.metrics import Better
from dmd2.evaluation.scores import MetricScores

STUDENT, TEACHER, PREVIOUS = "student", "teacher", "previous"
"""Names of sets of images; `previous` are those of the last accepted student of the same teacher."""
NAMES = {TEACHER: "the teacher's", PREVIOUS: "the last accepted student's"}
Verdict = Literal["met", "violated", "not enough evidence"]
Decision = Literal["accepted", "rejected", "not enough evidence"]
SIGNS: dict[Better, str] = {"smaller": "<=", "larger": ">="}
RULE = re.compile(r"(?P<metric>\w+)(?P<sign><=|>=)(?P<number>[-+\d.eE]+)(?:\*(?P<of>teacher|previous))?")


@dataclass(frozen=True)
class Condition:
    """A bound of a score of the student: `number`, or `number` times the score of `of`."""

    metric: str
    number: float
    of: str = ""
    """TEACHER, PREVIOUS, or empty for an absolute bound."""
    subject: str = STUDENT
    """The set whose score is bounded."""
    sign: str = ""
    """`<=` or `>=` as it was written; empty = as the direction of the metric says."""

    @classmethod
    def parse(cls, rule: str, option: str, subject: str = STUDENT) -> Condition:
        """Read `fid<=20`, `clip>=0.95*teacher` or `kid<=1.1*previous`; `option` is where it was written, for errors."""
        found = RULE.fullmatch(rule.replace(" ", ""))
        try:
            number = float(found["number"]) if found else math.nan
        except ValueError:
            number = math.nan
        if not found or not math.isfinite(number):
            raise Refused(
                f"--{option} has {rule!r}, which is no condition; write METRIC<=NUMBER or METRIC>=NUMBER, and *teacher or *previous "
                "after the number for a multiple of that score"
            )
        return cls(found["metric"], number, found["of"] or "", subject, found["sign"])


@dataclass(frozen=True)
class Finding:
    """What became of a condition."""

    condition: str
    subject: str
    """The set whose score is bounded."""
    verdict: Verdict
    reason: str


def conditions(settings: GateConfig, better: Better) -> list[Condition]:
    """All conditions of a gate whose metric has this direction."""
    own = {TEACHER: settings.factor} | ({PREVIOUS: settings.regression} if settings.regression else {})
    found = [Condition(settings.metric, f if better == "smaller" else 1 / f, of) for of, f in own.items()]
    found += [Condition.parse(rule, "gate.rules") for rule in settings.rules]
    return found + [Condition.parse(rule, "gate.teacher", TEACHER) for rule in settings.teacher]


def examine(condition: Condition, scores: MetricScores) -> Finding:
    """Compare a score with its bound."""
    sign = SIGNS[scores.better]
    if condition.sign not in ("", sign):
        raise Refused(
            f"the gate bounds {scores.title} by {condition.sign}, but of it {scores.direction}; write {condition.metric}{sign}..."
        )
    value = scores.values[condition.subject]
    bound = _multiple(condition, scores) if condition.of else condition.number
    excess = _excess(condition, scores, sign)
    verdict: Verdict = "met" if excess[1] <= 0 else "violated" if excess[0] > 0 else "not enough evidence"
    return Finding(
        _condition_text(condition, sign),
        condition.subject,
        verdict,
        _reason(condition, scores, value, bound, verdict),
    )


def decide(findings: Sequence[Finding]) -> tuple[Decision, str]:
    """(the decision, why): a violated condition rejects; otherwise one without enough evidence leaves it open."""

    def reasons(verdict: Verdict, *subjects: str) -> str:
        return "; ".join(f.reason for f in findings if f.verdict == verdict and f.subject in subjects)

    if violated := reasons("violated", STUDENT, TEACHER):
        return "rejected", violated
    if undecided := reasons("not enough evidence", STUDENT):
        return "not enough evidence", f"{undecided}; evaluate more images"
    return "accepted", reasons("met", STUDENT)


def facts(findings: Sequence[Finding]) -> list[dict[str, Any]]:
    return [asdict(finding) for finding in findings]


def _multiple(condition: Condition, scores: MetricScores) -> float:
    """The bound as a multiple of another score, which must be positive."""
    other = scores.values[condition.of]
    if other <= 0:
        raise Refused(
            f"{NAMES[condition.of]} {scores.title} is {scores.text(condition.of)}; a multiple of it is a bound only if it is positive: set "
            "--gate.metric to another metric, or evaluate more images"
        )
    return condition.number * other


def _excess(condition: Condition, scores: MetricScores, sign: str) -> tuple[float, float]:
    """The interval of how far the score is beyond its bound; positive is a violation.

    The bias of finite sets, which two sets have in common, brings their ratio closer to one. So a ratio must be met, or violated, by
    the scores without it too, where they are known."""
    found = [_excess_of(condition, scores, sign, scores.values)]
    unbiased = {name: each["infinity"] for name, each in scores.details.items() if "infinity" in each}
    if condition.of and {condition.subject, condition.of} <= unbiased.keys():
        found.append(_excess_of(condition, scores, sign, unbiased))
    return min(low for low, _ in found), max(high for _, high in found)


def _excess_of(
    condition: Condition, scores: MetricScores, sign: str, values: Mapping[str, float]
) -> tuple[float, float]:
    """Ratios of positive scores are compared by their logarithms, whose errors do not grow with the factor. Bounds of the teacher
    reject what is no teacher, so its value decides."""
    value, number = values[condition.subject], condition.number
    direction = 1 if sign == "<=" else -1
    if not condition.of:
        error = scores.margin(condition.subject) if condition.subject == STUDENT else 0.0
        centre = direction * (value - number)
    elif min(value, other := values[condition.of]) > 0:
        error = scores.margin_of_sum({condition.subject: 1 / value, condition.of: -1 / other})
        centre = direction * math.log(value / other / number)
    else:
        error = scores.margin_of_sum({condition.subject: 1.0, condition.of: -number})
        centre = direction * (value - number * values[condition.of])
    return centre - error, centre + error


def _condition_text(condition: Condition, sign: str) -> str:
    subject = "" if condition.subject == STUDENT else f"{condition.subject}."
    times = f"*{condition.of}" if condition.of else ""
    return f"{subject}{condition.metric}{sign}{condition.number:g}{times}"


RELATIONS: dict[tuple[Better, Verdict], str] = {
    ("smaller", "met"): "is at most",
    ("smaller", "violated"): "is more than",
    ("larger", "met"): "is at least",
    ("larger", "violated"): "is less than",
    ("smaller", "not enough evidence"): "cannot be told from",
    ("larger", "not enough evidence"): "cannot be told from",
}


def _reason(condition: Condition, scores: MetricScores, value: float, bound: float, verdict: Verdict) -> str:
    text = f"{scores.title} of the {condition.subject} {scores.text(condition.subject)} {RELATIONS[scores.better, verdict]} "
    shown = scores.format.format(bound)
    if not condition.of:
        return f"{text}{shown}"
    return f"{text}{condition.number:g} x {NAMES[condition.of]} {scores.text(condition.of)} = {shown}"
