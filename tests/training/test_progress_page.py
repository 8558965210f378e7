"""The page about a training while it goes on: rewritten at one address, last with how it ended."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dmd2 import stages
from dmd2.config import Config
from dmd2.io.storage import open_store
from dmd2.stages import output_file, progress_page
from dmd2.stages.progress_page import ProgressPage
from dmd2.training.spending import Spending, training_seconds
from tests.conftest import ALONE

Refusal = Callable[[Callable[[], object]], str]


@pytest.fixture
def versions(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Each version of a page, as it is written."""
    written = list[str]()
    real = output_file.local_output

    @contextmanager
    def watched(out: str) -> Iterator[Path]:
        with real(out) as path:
            yield path
            written.append(path.read_text())

    monkeypatch.setattr(progress_page, "local_output", watched)
    return written


def test_the_page_is_rewritten_while_a_run_goes_on(
    micro: Config,
    made: Path,
    tmp_path: Path,
    bucket: str,
    versions: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(progress_page, "EVERY_S", 0.0)
    places = (str(made / "shards"), str(made / "teacher"), str(tmp_path / "run"))
    stages.distill(micro, *places, progress=f"{bucket}/run page.html")
    first, *between, last = versions
    assert "Step 0 of 10 (0%), starting." in first
    assert ["Step 2 of 10 (20%), 0:" in page for page in between] == [True, False, False, False, False]
    assert "Step 10 of 10 (100%), finished." in last
    assert (
        last.count("Student after step") == 4
    )  # two previews, each with its caption and its text for screen readers
    assert last.count("class=plot") > 3
    assert "GPU-hours" not in last
    assert open_store(bucket).read("run page.html").decode() == last


def test_a_run_that_fails_says_so_on_its_page(
    micro: Config, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Failed(Exception): ...

    def fail(step: int, eta_s: float) -> None:
        if step == 4:
            raise Failed("<b>no more</b>")

    monkeypatch.setattr(ProgressPage, "update", lambda self, step, eta_s: fail(step, eta_s))
    page = tmp_path / "page.html"
    with pytest.raises(Failed):
        stages.distill(
            micro, str(made / "shards"), str(made / "teacher"), str(tmp_path / "run"), progress=str(page)
        )
    text = page.read_text()
    assert "Step 4 of 10 (40%), ended by: &lt;b&gt;no more&lt;/b&gt;." in text


def test_a_page_that_cannot_be_written_ends_no_training_that_has_begun(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    page = ProgressPage(
        str(tmp_path / "pages" / "page.html"), "digits", tmp_path / "run", 10, Spending(), ALONE
    )
    with caplog.at_level(logging.WARNING), page.from_start_to_end():
        (tmp_path / "pages" / "page.html").unlink()
        (tmp_path / "pages" / "page.html").mkdir()
    assert "page.html was not written: " in caplog.text


def test_an_address_that_is_none_is_refused_before_the_training(
    micro: Config, made: Path, tmp_path: Path, refusal: Refusal
) -> None:
    places = (str(made / "shards"), str(made / "teacher"), str(tmp_path / "run"))
    said = refusal(lambda: stages.distill(micro, *places, progress="ftp://page.html"))
    assert "ftp" in said
    assert not (tmp_path / "run").exists()


def test_gpu_hours_and_money_count_all_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dmd2.training.spending.time.monotonic", lambda: 2800.0)
    spending = Spending(gpus=4, before_s=900, restarts=2, price=2.5, budget=10, start=1000)
    assert spending.gpu_hours == (900 + 1800) * 4 / 3600
    assert spending.sentences() == [
        "3.00 of at most 10 GPU-hours of 4 GPUs so far, over 3 starts, 7.50 at 2.5 an hour."
    ]
    assert Spending(gpus=4, start=1000).sentences() == ["2.00 GPU-hours of 4 GPUs so far."]
    assert Spending(price=2.5).sentences() == []


def test_a_start_that_was_killed_counts_with_its_steps() -> None:
    lines = [
        {"step": 100, "samples_per_s": 16.0},
        {"step": 100, "checkpoint/fid": 3.0},
        {"step": 300, "samples_per_s": 8.0},
    ]
    assert training_seconds(lines, batch=8) == 100 * 8 / 16 + 200 * 8 / 8
