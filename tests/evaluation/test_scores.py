"""Scores in manifests: those of version 0.1.0 are still read, and what they say is checked."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from dmd2.evaluation.metrics import METRICS
from dmd2.evaluation.scores import (
    MetricScores,
    markdown_table,
    read_scores,
    sampled_image_sets,
    score_facts,
    score_table,
    scores_by,
)

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


def test_an_evaluation_of_an_earlier_version_is_read() -> None:
    (fid,) = read_scores(EARLIER)
    assert (fid.title, fid.better) == ("FID", "smaller")
    assert fid.values == {"student": 2.781, "teacher": 2.456, "teacher_1step": 31.89, "real": 0.616}
    assert scores_by("fid", EARLIER) == fid


def test_scores_are_written_by_set_and_read_again_and_so_are_lists_of_metrics() -> None:
    written = [
        MetricScores("fid", "FID", "smaller", "{:.2f}", {"student": 2.0, "real": 1.0}),
        MetricScores("clip", "CLIP score", "larger", "{:.4f}", {"student": 0.3}, {"student": (0.2, 0.4)}),
    ]
    facts = score_facts(written, [])
    assert facts["scores"] == {
        "student": {
            "fid": {"value": 2.0, "low": None, "high": None},
            "clip": {"value": 0.3, "low": 0.2, "high": 0.4},
        },
        "real": {"fid": {"value": 1.0, "low": None, "high": None}},
    }
    assert read_scores(json.loads(json.dumps(facts))) == written
    assert read_scores({"scores": [asdict(each) for each in written]}) == written


def test_the_table_of_scores_has_a_row_for_each_set_of_images() -> None:
    assert markdown_table(*score_table(EARLIER)).splitlines() == [
        "|  | steps | network calls | FID (smaller is better) | / teacher's |",
        "| --- | --: | --: | --: | --: |",
        "| student | 1 | 1 | 2.78 | 1.13 |",
        "| teacher | 18 | 35 | 2.46 | 1.00 |",
        "| teacher in 1 step | 1 | 1 | 31.89 | 12.98 |",
        "| real training images |  |  | 0.62 | 0.25 |",
    ]


def test_what_a_manifest_says_of_sets_and_formats_is_checked(refusal: Callable[..., str]) -> None:
    def variant(**changes: Any) -> dict[str, Any]:
        return EARLIER | {"variants": [EARLIER["variants"][0] | changes]}

    assert "'../secret'" in refusal(lambda: sampled_image_sets(variant(name="../secret")))
    assert "'<script>'" in refusal(lambda: sampled_image_sets(variant(calls="<script>")))
    (fid,) = read_scores(EARLIER)
    for harmful in ("{.__class__}", "{:.999999999f}", "{:.2f}{:.2f}", "<script>alert(1)</script>{:.2f}"):
        facts = {"scores": [asdict(fid) | {"format": harmful}]}
        assert "the format" in refusal(lambda facts=facts: read_scores(facts))
    for row in METRICS.values():
        assert read_scores({"scores": [asdict(fid) | {"format": row.format}]})
