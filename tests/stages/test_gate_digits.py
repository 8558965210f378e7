"""The three answers of the gate on students that were trained on digits, each compared with an accepted one."""

from __future__ import annotations

from pathlib import Path

import pytest

from dmd2 import recipes, stages
from dmd2.config import Config, GateConfig

pytestmark = pytest.mark.slow
SMALL = (
    "family.network.channels=16", "data.holdout=4000", "teach.steps=100", "distill.batch=16", "distill.preview_every=1000",
    "distill.save_every=1000", "evaluate.teacher_steps=2",
)  # fmt: skip
NO_REGRESSION = GateConfig(factor=1e6, regression=1.05, teacher=())
"""The FID of a student must be at most 5 % above that of the accepted one; the teacher, hardly trained, does not count."""
STUDENTS = {"good": (200, 0), "worse": (60, 0), "as good": (200, 1)}
"""{student: (training steps, seed)}."""


def resolved(*overrides: str) -> Config:
    return recipes.resolve("edm-digits", (*SMALL, *overrides)).model_copy(update={"gate": NO_REGRESSION})


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards, a teacher and its students. Read only."""
    root = tmp_path_factory.mktemp("digits")
    shards, teacher = str(root / "shards"), str(root / "teacher")
    stages.shard(resolved(), "digits", shards, workers=1)
    stages.teach(resolved(), shards, teacher)
    for name, (steps, seed) in STUDENTS.items():
        config = resolved(f"distill.steps={steps}", f"seed={seed}")
        stages.distill(config, shards, teacher, str(root / name))
    return root


def evaluation(root: Path, student: str, images: int) -> str:
    """The evaluation of a student, made if it is not there."""
    out, scores = root / f"evaluation-{student}-{images}", str(root / "scores")
    config, data, teacher = resolved(f"evaluate.images={images}"), str(root / "shards"), str(root / "teacher")
    stages.evaluate(config, data, teacher, str(root / student), str(out), scores=scores)
    return str(out)


@pytest.mark.parametrize(
    ("student", "previous", "images", "decision"),
    [
        ("good", "worse", 400, "accepted"),
        ("worse", "good", 400, "rejected"),
        ("good", "as good", 24, "not enough evidence"),
    ],
)
def test_a_student_is_compared_with_the_last_accepted_one(
    student: str, previous: str, images: int, decision: str, root: Path, tmp_path: Path
) -> None:
    """Of two that were trained equally long, with different seeds, 24 images do not tell whether one is 5 % worse."""
    before, after = (evaluation(root, name, images) for name in (previous, student))
    facts = stages.gate(resolved(), after, str(tmp_path / "gate"), before).facts
    assert facts["decision"] == decision, facts["reason"]
    assert "fid<=1.05*previous" in {each["condition"] for each in facts["conditions"]}
