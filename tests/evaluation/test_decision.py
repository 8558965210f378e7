"""The decision of the gate: three answers, in the direction of the metric, by intervals of scores and of their differences."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest

from dmd2.config import GateConfig
from dmd2.evaluation.confidence import GROUPS, margin, student_t
from dmd2.evaluation.decision import Condition, Decision, conditions, decide, examine
from dmd2.evaluation.metrics import Better
from dmd2.evaluation.scores import MetricScores

Refusal = Callable[..., str]


def scores_of(
    better: Better, replicates: Mapping[str, list[float]] | None = None, **values: float
) -> MetricScores:
    return MetricScores("a", "A", better, "{:.2f}", values, {}, dict(replicates or {}))


def decision(scores: MetricScores, **gate: Any) -> tuple[Decision, str]:
    settings = GateConfig(
        **{"metric": "a", "teacher": ("a<=300",) if scores.better == "smaller" else ()} | gate
    )
    found = [c for c in conditions(settings, scores.better) if c.of in ("", *scores.values)]
    return decide([examine(each, scores) for each in found])


@pytest.mark.parametrize(
    ("better", "student", "teacher", "answer", "reason"),
    [
        ("smaller", 2.5, 2.0, "accepted", "A of the student 2.50 is at most 1.25 x the teacher's 2.00 = 2.50"),
        ("smaller", 2.6, 2.0, "rejected", "A of the student 2.60 is more than 1.25 x the teacher's 2.00 = 2.50"),
        ("larger", 2.0, 2.5, "accepted", "A of the student 2.00 is at least 0.8 x the teacher's 2.50 = 2.00"),
        ("larger", 1.9, 2.5, "rejected", "A of the student 1.90 is less than 0.8 x the teacher's 2.50 = 2.00"),
        ("smaller", -0.1, 2.0, "accepted", "A of the student -0.10 is at most 1.25 x the teacher's 2.00 = 2.50"),
        ("smaller", 499.0, 400.0, "rejected", "A of the teacher 400.00 is more than 300.00"),
    ],
)  # fmt: skip
def test_scores_without_intervals_are_compared_by_their_values(
    better: Better, student: float, teacher: float, answer: str, reason: str
) -> None:
    found = decision(scores_of(better, student=student, teacher=teacher))
    assert found[0] == answer
    assert reason in found[1]


def around(value: float, error: float, seed: int) -> list[float]:
    """Replicates whose mean is the value and whose standard error is `error`."""
    draw = random.Random(seed)
    noise = [draw.gauss(0, 1) for _ in range(GROUPS)]
    mean = sum(noise) / GROUPS
    spread = (sum((x - mean) ** 2 for x in noise) / (GROUPS - 1)) ** 0.5
    return [value + error * GROUPS**0.5 * (x - mean) / spread for x in noise]


@pytest.mark.parametrize(
    ("student", "error", "answer"),
    [(2.0, 0.05, "accepted"), (3.0, 0.05, "rejected"), (2.0, 0.5, "not enough evidence"), (2.5, 0.05, "not enough evidence")],
)  # fmt: skip
def test_a_condition_is_met_or_violated_only_over_the_whole_interval(
    student: float, error: float, answer: str
) -> None:
    replicates = {"student": around(student, error, 0), "teacher": around(2.0, error, 1)}
    assert decision(scores_of("smaller", replicates, student=student, teacher=2.0))[0] == answer


def test_what_student_and_teacher_have_in_common_is_no_error_of_their_ratio() -> None:
    common = around(0.0, 0.3, 0)
    replicates = {"student": [2.2 * (1 + x) for x in common], "teacher": [2.0 * (1 + x) for x in common]}
    scores = scores_of("smaller", replicates, student=2.2, teacher=2.0)
    assert scores.margin("student") > 1
    assert decision(scores)[0] == "accepted"
    alone = scores_of("smaller", replicates | {"teacher": around(2.0, 0.6, 1)}, student=2.2, teacher=2.0)
    assert decision(alone)[0] == "not enough evidence"


def test_few_images_do_not_hide_a_worse_student_behind_the_bias_of_both() -> None:
    """FIDs of 9.5 and 7.8 of which 6 are the bias of few images."""
    replicates = {"student": around(9.5, 0.2, 0), "teacher": around(7.8, 0.2, 1)}
    scores = scores_of("smaller", replicates, student=9.5, teacher=7.8)
    assert decision(scores, factor=1.5)[0] == "accepted"
    unbiased = replace(scores, details={"student": {"infinity": 3.5}, "teacher": {"infinity": 1.8}})
    assert decision(unbiased, factor=1.5)[0] == "not enough evidence"
    assert decision(unbiased, factor=3)[0] == "accepted"


def test_a_student_is_compared_with_the_last_accepted_one_too() -> None:
    values = {"student": 2.4, "teacher": 2.0, "previous": 2.0}
    replicates = {name: around(value, 0.01, seed) for seed, (name, value) in enumerate(values.items())}
    answer, reason = decision(scores_of("smaller", replicates, **values))
    assert (answer, "the last accepted student's" in reason) == ("rejected", True)
    assert decision(scores_of("smaller", replicates, **values), regression=0)[0] == "accepted"
    noisy = {name: around(value, 0.3, seed) for seed, (name, value) in enumerate(values.items())}
    assert decision(scores_of("smaller", noisy, **values))[0] == "not enough evidence"


def test_further_conditions_are_all_required() -> None:
    scores = scores_of("larger", student=0.3, teacher=0.31)
    assert decision(scores, rules=("a>=0.29", "a >= 0.95*teacher"))[0] == "accepted"
    answer, reason = decision(scores, rules=("a>=0.29", "a>=0.99*teacher"))
    assert (answer, "0.99 x the teacher's" in reason, "0.29" in reason) == ("rejected", True, False)


def test_what_is_no_condition_is_refused(refusal: Refusal) -> None:
    for rule in (
        "fid",
        "fid<20",
        "fid<=",
        "fid<=nan",
        "fid<=1e999",
        "fid<=1e+",
        "fid<=2*student",
        "<=3",
        "fid<=2;x",
    ):
        assert "which is no condition" in refusal(lambda rule=rule: Condition.parse(rule, "gate.rules"))
    scores = scores_of("smaller", student=2.0, teacher=2.0)
    assert "write a<=" in refusal(lambda: decision(scores, rules=("a>=1",)))


def test_a_score_of_the_teacher_that_is_not_positive_is_no_bound(refusal: Refusal) -> None:
    assert "--gate.metric" in refusal(lambda: decision(scores_of("smaller", student=0.1, teacher=-0.01)))


def test_students_quantiles_are_those_of_the_tables() -> None:
    for freedom, quantile in ((4, 2.776), (9, 2.262), (19, 2.093), (99, 1.984)):
        assert student_t(freedom) == pytest.approx(quantile, rel=0.01)
    assert margin(around(5.0, 0.1, 3)) == pytest.approx(0.1 * 2.093, rel=1e-3)
