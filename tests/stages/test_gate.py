"""The gate on evaluations of real runs: what it believes, what it refuses, and with what it compares."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dmd2 import stages
from dmd2.config import Config
from dmd2.evaluation.scores import SCORES_FILE
from dmd2.io.artifact import MANIFEST, Manifest, read_manifest, sealed_text
from dmd2.io.local import sha256

Refusal = Callable[..., str]


def copy_of(made: Path, tmp_path: Path, change: Callable[[dict[str, Any]], None], seal: bool = True) -> str:
    """A copy of the evaluation whose facts were changed, with or without a new seal."""
    folder = Path(shutil.copytree(made / "evaluation", tmp_path / "changed", dirs_exist_ok=True))
    content = json.loads((folder / MANIFEST).read_text())
    change(content["facts"])
    if seal:
        path = folder / SCORES_FILE
        path.write_text(json.dumps(content["facts"]["scores"]))
        (entry,) = (file for file in content["files"] if file["path"] == SCORES_FILE)
        entry |= {"size": path.stat().st_size, "sha256": sha256(path)}
        (folder / MANIFEST).write_text(sealed_text(Manifest.model_validate(content)))
    else:
        (folder / MANIFEST).write_text(json.dumps(content))
    return str(folder)


def set_fid(**values: float | None) -> Callable[[dict[str, Any]], None]:
    def change(facts: dict[str, Any]) -> None:
        for name, value in values.items():
            facts["scores"][name]["fid"]["value"] = facts[f"fid_{name}"] = value
        facts.pop("details", None)  # of the scores that were there

    return change


def test_an_edited_score_is_refused_by_whoever_reads_it(
    made: Path, micro: Config, tmp_path: Path, refusal: Refusal
) -> None:
    edited = copy_of(made, tmp_path, set_fid(student=0.1), seal=False)
    folders = (str(made / "run"), edited, str(made / "gate"))
    data = (str(made / "shards"), str(made / "teacher"))
    readers: list[Callable[[], object]] = [
        lambda: stages.gate(micro, edited, str(tmp_path / "gate")),
        lambda: stages.package(*folders, str(tmp_path / "package")),
        lambda: stages.report(*data, *folders, str(tmp_path / "report.html")),
    ]
    for reader in readers:
        assert f"{edited}/{MANIFEST} was changed after it was written" in refusal(reader)


def test_an_edited_decision_is_refused(made: Path, tmp_path: Path, refusal: Refusal) -> None:
    gate = Path(shutil.copytree(made / "gate", tmp_path / "gate"))
    path = gate / MANIFEST
    path.write_text(path.read_text().replace('"accepted"', '"rejected"'))
    folders = (str(made / "run"), str(made / "evaluation"), str(gate))
    assert f"{path} was changed" in refusal(lambda: stages.package(*folders, str(tmp_path / "package")))


def test_other_scores_are_another_evaluation(
    made: Path, micro: Config, tmp_path: Path, refusal: Refusal
) -> None:
    """A gate that was used before does not answer with its old decision, and nothing is packaged with it."""
    generous = micro.model_copy(update={"gate": micro.gate.model_copy(update={"factor": 1e6})})
    replaced = copy_of(made, tmp_path, set_fid(student=1.0))
    assert (
        read_manifest(replaced, "evaluation").digest
        != read_manifest(made / "evaluation", "evaluation").digest
    )
    gate = str(shutil.copytree(made / "gate", tmp_path / "gate"))
    assert "other inputs" in refusal(lambda: stages.gate(generous, replaced, gate))
    folders = (str(made / "run"), replaced, gate)
    assert "do not belong" in refusal(lambda: stages.package(*folders, str(tmp_path / "package")))


def test_a_replaced_file_of_scores_is_refused_by_name(
    made: Path, micro: Config, tmp_path: Path, refusal: Refusal
) -> None:
    folder = Path(shutil.copytree(made / "evaluation", tmp_path / "evaluation"))
    (folder / SCORES_FILE).write_text((folder / SCORES_FILE).read_text().replace('"fid"', '"fix"'))
    assert f"{folder / SCORES_FILE} was changed" in refusal(
        lambda: stages.gate(micro, str(folder), str(tmp_path / "gate"))
    )


@pytest.mark.parametrize("value", [None, math.nan])
def test_a_score_that_is_no_number_is_refused_by_name(
    made: Path, micro: Config, tmp_path: Path, refusal: Refusal, value: float | None
) -> None:
    folder = copy_of(made, tmp_path, set_fid(teacher=value))
    assert f"{folder}/{MANIFEST}: the FID of 'teacher' is" in refusal(
        lambda: stages.gate(micro, folder, str(tmp_path / "gate"))
    )


def test_a_student_of_a_teacher_that_draws_nothing_is_rejected(
    made: Path, micro: Config, tmp_path: Path
) -> None:
    folder = copy_of(made, tmp_path, set_fid(teacher=400.0, student=499.0))
    facts = stages.gate(micro, folder, str(tmp_path / "gate")).facts
    assert facts["decision"] == "rejected"
    assert "FID of the teacher 400.00" in facts["reason"]
    assert {each["condition"]: each["verdict"] for each in facts["conditions"]}[
        "teacher.fid<=300"
    ] == "violated"


def test_a_manifest_without_a_seal_is_read_and_the_log_says_so(
    made: Path, micro: Config, tmp_path: Path, refusal: Refusal, caplog: pytest.LogCaptureFixture
) -> None:
    """As those of version 0.1.0; a decision in a folder that was used before is then compared with the scores."""

    def unsealed(student: float) -> str:
        folder = Path(copy_of(made, tmp_path, set_fid(student=student, teacher=10.0)))
        content = json.loads((folder / MANIFEST).read_text())
        content.pop("seal")
        (folder / MANIFEST).write_text(json.dumps(content))
        return str(folder)

    gate = str(tmp_path / "gate")
    first = stages.gate(micro, unsealed(1.0), gate)
    assert "cannot be told whether it was changed" in caplog.text
    assert stages.gate(micro, unsealed(1.0), gate) == first
    folder = Path(unsealed(1.0))
    path = folder / MANIFEST
    path.write_text(path.read_text().replace('"value": 1.0', '"value": 100.0'))
    (folder / SCORES_FILE).unlink()
    assert refusal(lambda: stages.gate(micro, str(folder), gate))


def test_a_student_is_compared_with_the_last_published_one_of_its_teacher(
    made: Path, micro: Config, tmp_path: Path, refusal: Refusal
) -> None:
    generous = micro.model_copy(update={"gate": micro.gate.model_copy(update={"factor": 1e6})})
    run, evaluation, gate = (str(made / name) for name in ("run", "evaluation", "gate"))
    package = stages.package(run, evaluation, gate, str(tmp_path / "package"))
    stages.publish(str(tmp_path / "package"), str(tmp_path / "models" / package.digest[:16]))
    fid = package.facts["fid_student"]
    worse = copy_of(made, tmp_path, set_fid(student=fid * 1e7, teacher=fid * 2))
    facts = stages.gate(generous, worse, str(tmp_path / "gate"), str(tmp_path / "models")).facts
    assert facts["decision"] == "rejected"
    assert facts["previous"].startswith(str(tmp_path / "models"))
    assert "the last accepted student's" in facts["reason"]
    itself = stages.gate(
        generous, str(made / "evaluation"), str(tmp_path / "again"), str(tmp_path / "models")
    )
    assert "previous" not in itself.facts, "a run that is continued does not find its own package"

    def reseeded(facts: dict[str, Any]) -> None:
        facts["seed"] = 11

    other = copy_of(made, tmp_path, reseeded)
    facts = stages.gate(generous, other, str(tmp_path / "third"), str(tmp_path / "models")).facts
    assert "previous" not in facts
    assert "seed was 10 and is 11" in refusal(
        lambda: stages.gate(generous, other, str(tmp_path / "fourth"), str(tmp_path / "package"))
    )

    def other_reference(facts: dict[str, Any]) -> None:
        facts["card"]["reference"] = 64 * "0"

    other = copy_of(made, tmp_path, other_reference)
    assert "the new student cannot be compared: reference is" in refusal(
        lambda: stages.gate(generous, other, str(tmp_path / "fifth"), str(tmp_path / "package"))
    )

    def with_clip(facts: dict[str, Any]) -> None:
        facts["card"]["weights"]["clip"] = 64 * "0"

    other = copy_of(made, tmp_path, with_clip)
    facts = stages.gate(generous, other, str(tmp_path / "sixth"), str(tmp_path / "package")).facts
    assert facts["previous"] == str(tmp_path / "package"), "one more metric does not change the others"
