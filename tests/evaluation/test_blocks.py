"""An evaluation in blocks: the same images and scores for any number of processes, parts and interruptions."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from torch import Tensor

from dmd2 import recipes, stages
from dmd2.config import Config
from dmd2.evaluation.evaluator import Evaluator
from dmd2.io.artifact import Manifest, read_manifest
from dmd2.model import Model
from dmd2.models.family import Prompt
from tests import warm
from tests.conftest import MICRO, flags

FOLDERS = ("shards", "teacher", "run")


def evaluate(
    config: Config, made: Path, out: Path, part: str = "", scores: str = "", reference: str = ""
) -> Manifest:
    data, teacher, run = (str(made / name) for name in FOLDERS)
    return stages.evaluate(config, data, teacher, run, str(out), part, scores, reference)


def assert_same(one: Path, other: Path) -> None:
    """Scores and pictures are the same, bit for bit."""
    a, b = (read_manifest(folder, "evaluation") for folder in (one, other))
    assert a.facts == b.facts
    assert a.digest == b.digest


def test_parts_in_any_order_give_the_scores_of_one_process(micro: Config, made: Path, tmp_path: Path) -> None:
    out = tmp_path / "evaluation"
    for part in ("2/3", "0/3"):
        assert evaluate(micro, made, out, part).facts == {"part": part}
        assert not out.exists()
    evaluate(micro, made, out)  # makes those of the part that is missing
    assert_same(out, made / "evaluation")
    assert not list(out.glob(".*")), "the blocks are deleted"


def test_an_interrupted_evaluation_makes_only_the_blocks_that_are_missing(
    micro: Config, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[int] = []
    original = Evaluator.measure

    def measure(self: Evaluator, images: Tensor, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        measured.append(len(images))
        if len(measured) == 4:
            raise KeyboardInterrupt
        return original(self, images, prompts)

    monkeypatch.setattr(Evaluator, "measure", measure)
    with pytest.raises(KeyboardInterrupt):
        evaluate(micro, made, tmp_path / "evaluation")
    evaluate(micro, made, tmp_path / "evaluation")
    # 12 held-out images, 24 training images, and two blocks of 12 of student, teacher, and teacher in one step
    assert sorted(measured) == [12] * 8 + [24], "one block twice: the one that was interrupted"
    assert_same(tmp_path / "evaluation", made / "evaluation")


def test_a_damaged_block_is_refused_by_name(
    micro: Config, made: Path, tmp_path: Path, refusal: Callable[[Callable[[], object]], str]
) -> None:
    out = tmp_path / "evaluation"
    evaluate(micro, made, out, "0/2")
    block = min((tmp_path / ".evaluation.partial" / ".blocks").rglob("*.safetensors"))
    block.write_bytes(block.read_bytes()[:-8])
    assert str(block) in refusal(lambda: evaluate(micro, made, out))


def test_two_processes_give_the_scores_of_one(made: Path, tmp_path: Path) -> None:
    folders = [word for name in ("teacher", "run") for word in (f"--{name}", str(made / name))]
    words = ["--data", str(made / "shards"), *folders, "--out", str(tmp_path / "evaluation"), *flags(MICRO)]
    ended = subprocess.run(
        warm.torchrun(2, "-m", "--", "dmd2", "evaluate", "edm-digits", *words),
        env=warm.environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert_same(tmp_path / "evaluation", made / "evaluation")


def no_sampling(*arguments: object) -> Tensor:
    raise AssertionError("the teacher is sampled once")


def test_a_teacher_is_sampled_once_for_all_its_students(
    micro: Config, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = tmp_path / "scores"
    evaluate(micro, made, tmp_path / "one", scores=str(kept))
    # teacher, teacher in one step, held-out images, training images
    manifests = [read_manifest(folder, "scores") for folder in kept.iterdir()]
    assert sorted(tuple(m.inputs) for m in manifests) == [("shards",)] * 2 + [("teacher", "reference")] * 2
    found = [m.facts["scores"]["teacher"] for m in manifests if "teacher" in m.facts.get("scores", {})]
    assert found == [read_manifest(made / "evaluation", "evaluation").facts["scores"]["teacher"]]
    monkeypatch.setattr(Model, "sample_teacher", no_sampling)
    evaluate(micro, made, tmp_path / "other", scores=str(kept))
    for name in ("one", "other"):
        assert_same(tmp_path / name, made / "evaluation")
    guided = recipes.resolve("edm-digits", (*MICRO, "evaluate.seed=11"))
    with pytest.raises(AssertionError, match="sampled once"):
        evaluate(guided, made, tmp_path / "third", scores=str(kept))


def test_an_edited_measurement_is_refused(
    micro: Config, made: Path, tmp_path: Path, refusal: Callable[[Callable[[], object]], str]
) -> None:
    kept = tmp_path / "scores"
    evaluate(micro, made, tmp_path / "one", scores=str(kept))
    block = min(kept.rglob("*.safetensors"))
    block.write_bytes(block.read_bytes()[:-1] + b"x")
    again = lambda: evaluate(micro, made, tmp_path / "other", scores=str(kept))  # noqa: E731
    assert str(block) in refusal(again)


def test_other_shards_give_reference_and_prompts(
    micro: Config, pictures: Path, made: Path, tmp_path: Path
) -> None:
    other = str(tmp_path / "shards")
    stages.shard(recipes.resolve("edm-digits", (*MICRO, "data.holdout=0")), str(pictures), other)
    facts = evaluate(micro, made, tmp_path / "out", reference=other).facts
    assert facts["images_real"] == 24
    assert facts["card"]["reference"] == read_manifest(other, "shards").digest
