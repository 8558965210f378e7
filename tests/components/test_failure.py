"""A training that failed for good is not repeated within its run, and the end of the run knows the cause."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from components.distill.component import distill
from components.failure import FAILURE, read_failure, write_failure
from components.find_teachers.runs import cause_of
from components.finish_run.component import finish_run


def train(root: Path, run: str, **given: Any) -> None:
    artifact = SimpleNamespace(metadata={"uri": str(root / "nothing")})
    distill.python_func(
        run_id=run, recipe="edm-digits", overrides="", root=str(root), nodes=1, gpus=0, pool={}, queue="", where="here", folder="run", start="",
        pairs="", prompts="", price=0.0, budget=0.0, samples=artifact, teacher=artifact, run=artifact, **given,
    )  # fmt: skip


@pytest.mark.parametrize("status", [64, 76])
def test_what_would_fail_again_is_not_repeated_in_the_same_run(tmp_path: Path, status: int) -> None:
    write_failure(str(tmp_path), "run-1", "run", status)
    with pytest.raises(SystemExit) as end:  # the inputs are not even looked at
        train(tmp_path, "run-1")
    assert end.value.code == status
    assert read_failure(str(tmp_path), "run-2") is None, "a new run may go on in the folder"


@pytest.mark.parametrize("status", [1, 74, 75, 79, 137, 143])
def test_what_may_pass_the_next_time_is_repeated(tmp_path: Path, status: int) -> None:
    write_failure(str(tmp_path), "run-1", "run", status)
    assert read_failure(str(tmp_path), "run-1") is None


@pytest.mark.slow
def test_a_training_with_a_wrong_input_says_so_and_the_repetition_starts_none(tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(SystemExit) as end:
            train(tmp_path, "run-1")
        assert end.value.code == 64
    assert read_failure(str(tmp_path), "run-1") is not None


def test_the_end_of_the_run_tells_the_cause(tmp_path: Path) -> None:
    write_failure(str(tmp_path), "run-1", "first", 76)
    page = tmp_path / "page"
    status = SimpleNamespace(state="FAILED", error_message="")
    finish_run.python_func(
        root=str(tmp_path),
        run_id="run-1",
        claim="",
        price=0.0,
        status=status,
        summary=SimpleNamespace(uri="", path=str(page)),
    )
    told = json.loads((tmp_path / "outcome.json").read_text())["error"]
    assert told.startswith("the training of first ended with exit status 76: the training diverged")
    assert told in page.read_text()
    assert cause_of(told) == "teacher"


def test_a_damaged_record_is_refused_by_name(tmp_path: Path, refusal: Callable[..., str]) -> None:
    (tmp_path / FAILURE).write_text("{")
    assert str(tmp_path / FAILURE) in refusal(lambda: read_failure(str(tmp_path), "run-1"))
