"""Scores in manifests: those of version 0.1.0 are still read, and the gate decides in the direction of the metric."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from dmd2.evaluation.metrics import Better
from dmd2.evaluation.scores import MetricScores, markdown_table, read_scores, score_table, scores_by
from dmd2.stages.gate import decide

EARLIER: dict[str, Any] = {
    "fid_student": 2.781, "fid_teacher": 2.456, "fid_teacher_1step": 31.89, "fid_real": 0.616, "nfe_student": 1, "nfe_teacher": 35,
    "images": 2000, "features": "classifier",
    "variants": [
        {"name": "student", "recipe": "edm-digits", "steps": 1, "calls": 1, "fd": 2.781},
        {"name": "teacher", "recipe": "teacher", "steps": 18, "calls": 35, "fd": 2.456},
        {"name": "teacher_1step", "recipe": "teacher", "steps": 1, "calls": 1, "fd": 31.89},
    ],
}  # fmt: skip
"""Facts of an evaluation of version 0.1.0."""


def scores_of(better: Better, student: float, teacher: float) -> MetricScores:
    return MetricScores("a", "A", better, "{:.2f}", {"student": student, "teacher": teacher})


def test_an_evaluation_of_an_earlier_version_is_read() -> None:
    (fid,) = read_scores(EARLIER)
    assert (fid.title, fid.better) == ("FID", "smaller")
    assert fid.values == {"student": 2.781, "teacher": 2.456, "teacher_1step": 31.89, "real": 0.616}
    assert scores_by("fid", EARLIER) == fid


def test_the_table_of_scores_has_a_row_for_each_set_of_images() -> None:
    assert markdown_table(*score_table(EARLIER)).splitlines() == [
        "|  | steps | network calls | FID (smaller is better) | / teacher's |",
        "| --- | --: | --: | --: | --: |",
        "| student | 1 | 1 | 2.78 | 1.13 |",
        "| teacher | 18 | 35 | 2.46 | 1.00 |",
        "| teacher in 1 step | 1 | 1 | 31.89 | 12.98 |",
        "| real training images |  |  | 0.62 | 0.25 |",
    ]


@pytest.mark.parametrize(
    ("better", "student", "teacher", "accepted", "reason"),
    [
        ("smaller", 2.5, 2.0, True, "A of the student 2.50 is at most 1.25 x the teacher's 2.00 = 2.50"),
        ("smaller", 2.6, 2.0, False, "A of the student 2.60 is more than 1.25 x the teacher's 2.00 = 2.50"),
        ("larger", 2.0, 2.5, True, "A of the student 2.00 is at least the teacher's 2.50 / 1.25 = 2.00"),
        ("larger", 1.9, 2.5, False, "A of the student 1.90 is less than the teacher's 2.50 / 1.25 = 2.00"),
        ("smaller", float("nan"), 2.0, False, "A of the student nan is more than 1.25 x the teacher's 2.00 = 2.50"),
    ],
)  # fmt: skip
def test_the_gate_decides_in_the_direction_of_the_metric(
    better: Better, student: float, teacher: float, accepted: bool, reason: str
) -> None:
    assert decide(scores_of(better, student, teacher), 1.25) == (accepted, reason)


def test_a_score_of_the_teacher_that_is_not_positive_is_no_bound(refusal: Callable[..., str]) -> None:
    assert "--gate.metric" in refusal(lambda: decide(scores_of("smaller", 0.1, -0.01), 1.25))
