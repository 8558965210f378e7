"""`dmd2 evaluate --follow`: each complete checkpoint of a training is scored once, whatever happens to the others."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from dmd2 import recipes, stages
from dmd2.config import Config
from dmd2.errors import Refused
from dmd2.evaluation.checkpoint_score import CheckpointScorer
from dmd2.io.artifact import Manifest, read_manifest
from dmd2.stages import follow
from dmd2.training.metrics_log import checkpoint_scores
from tests.conftest import MICRO, flags

SCORED = (
    *MICRO,
    "distill.best.images=16",
    "distill.best.features=efficientnet",
    "distill.keep_checkpoints=9",
)


@pytest.fixture(scope="module")
def config() -> Config:
    return recipes.resolve("edm-digits", SCORED)


@pytest.fixture(scope="module")
def run(config: Config, made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with checkpoints after 4, 8 and 10 steps, which it scored itself."""
    out = tmp_path_factory.mktemp("followed") / "run"
    stages.distill(config, str(made / "shards"), str(made / "teacher"), str(out))
    return out


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follow, "POLL_S", 0.02)


def followed(
    config: Config, made: Path, run: Path, out: Path, patience: int = 0, idle: float = 1.0
) -> Manifest:
    data, teacher = str(made / "shards"), str(made / "teacher")
    return stages.evaluate(
        config, data, teacher, out=str(out), follow=str(run), patience=patience, idle_minutes=idle
    )


def unfinished(run: Path, tmp_path: Path) -> Path:
    """A training that has not written a checkpoint yet -> the folder of its checkpoints."""
    (tmp_path / ".run.partial" / "checkpoints").mkdir(parents=True)
    return tmp_path / ".run.partial" / "checkpoints"


def scores_of(out: Path) -> dict[int, float]:
    return checkpoint_scores(out / "curve")


def test_checkpoints_that_appear_are_half_written_or_deleted(
    config: Config, made: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints, calls = unfinished(run, tmp_path), list[str]()

    def training() -> None:
        damaged = shutil.copytree(run / "checkpoints" / "00000004", checkpoints / "00000003")
        weights = min(damaged.glob("*.safetensors"))
        weights.write_bytes(weights.read_bytes()[:100])
        shutil.copytree(run / "checkpoints" / "00000008", checkpoints / ".00000008.partial")
        (checkpoints / "00000005").mkdir()
        wait_for(lambda: 3 in noticed)
        shutil.copytree(run / "checkpoints" / "00000004", checkpoints / "00000004")
        wait_for(lambda: len(calls) == 1)
        shutil.rmtree(checkpoints / "00000004")  # while it is scored
        (checkpoints / ".00000008.partial").rename(checkpoints / "00000008")
        wait_for(lambda: len(calls) == 2)
        shutil.copytree(run / "checkpoints" / "00000010", checkpoints / "00000010")
        checkpoints.parent.rename(tmp_path / "run")
        shutil.copy(run / "manifest.json", tmp_path / "run")

    noticed: set[int] = set()
    score = CheckpointScorer.__call__
    snapshot = follow.FollowedRun.take_snapshot

    def watched(self: CheckpointScorer, report: Callable[[str], None]) -> float:
        calls.append("scored")
        return score(self, report)

    def seen(self: follow.FollowedRun, step: int, root: Path) -> None:
        noticed.add(step)
        snapshot(self, step, root)

    monkeypatch.setattr(CheckpointScorer, "__call__", watched)
    monkeypatch.setattr(follow.FollowedRun, "take_snapshot", seen)
    thread = threading.Thread(target=training)
    thread.start()
    facts = followed(config, made, tmp_path / "run", tmp_path / "out").facts
    thread.join()
    assert scores_of(tmp_path / "out") == checkpoint_scores(run)
    assert len(calls) == 3, "each once"
    assert (facts["unreadable"], facts["stopped"]) == ([3], "the training is done")
    assert facts["best_step"] == read_manifest(run, "run").facts["best_step"]
    with pytest.raises(Refused, match=r"other inputs \(run\)"):
        followed(config, made, tmp_path / "another-run", tmp_path / "out")
    best = json.loads((tmp_path / "out" / "curve" / "best.json").read_text())
    assert best == {"step": facts["best_step"], "fid": facts["best_fid"]}


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_follower_that_was_killed_scores_only_the_rest(
    config: Config, made: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, score = list[int](), CheckpointScorer.__call__

    def killed(self: CheckpointScorer, report: Callable[[str], None]) -> float:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return score(self, report)

    monkeypatch.setattr(CheckpointScorer, "__call__", killed)
    with pytest.raises(KeyboardInterrupt):
        followed(config, made, run, tmp_path / "out")
    curve = tmp_path / ".out.partial" / "curve" / "metrics.jsonl"
    curve.write_text(curve.read_text() + '{"step": 8, "check')
    followed(config, made, run, tmp_path / "out")
    assert len(calls) == 4
    lines = (tmp_path / "out" / "curve" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [4, 8, 10]


FOLLOWER = """
import sys
from dmd2 import cli
from dmd2.evaluation.checkpoint_score import CheckpointScorer
from dmd2.stages import follow

follow.POLL_S, score = 0.02, CheckpointScorer.__call__


def say_and_score(self, report):
    print("scoring", flush=True)
    return score(self, report)


CheckpointScorer.__call__ = say_and_score
cli.run(sys.argv[1:])
"""
"""`dmd2` that says when it begins to score a checkpoint."""


@pytest.mark.slow
def test_a_follower_under_sigkill_scores_each_checkpoint_exactly_once(
    made: Path, run: Path, tmp_path: Path
) -> None:
    """Killed while it scores the first checkpoint, after it has noted one, and while it scores the next; checkpoints come and go."""
    checkpoints, out = unfinished(run, tmp_path), tmp_path / "out"
    curve = tmp_path / ".out.partial" / "curve" / "metrics.jsonl"
    place = {
        "--follow": tmp_path / "run",
        "--out": out,
        "--data": made / "shards",
        "--teacher": made / "teacher",
    }
    words = [str(word) for pair in place.items() for word in pair]
    command = [sys.executable, "-c", FOLLOWER, "evaluate", "edm-digits", *words, *flags(SCORED)]

    def started() -> subprocess.Popen[str]:
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)

    def killed(follower: subprocess.Popen[str]) -> None:
        follower.kill()
        assert follower.wait() == -signal.SIGKILL

    def wait_until_it_scores(follower: subprocess.Popen[str]) -> None:
        assert follower.stdout
        assert "scoring\n" in iter(follower.stdout.readline, "")

    shutil.copytree(run / "checkpoints" / "00000004", checkpoints / "00000004")
    follower = started()
    wait_until_it_scores(follower)
    killed(follower)
    assert not curve.exists() or not checkpoint_scores(curve.parent)
    follower = started()
    wait_for(lambda: curve.exists() and bool(checkpoint_scores(curve.parent)), seconds=600)
    killed(follower)
    shutil.rmtree(checkpoints / "00000004")  # as a training does that keeps few
    shutil.copytree(run / "checkpoints" / "00000008", checkpoints / "00000008")
    follower = started()
    wait_until_it_scores(follower)
    killed(follower)
    shutil.copytree(run / "checkpoints" / "00000010", checkpoints / "00000010")
    checkpoints.parent.rename(tmp_path / "run")
    shutil.copy(run / "manifest.json", tmp_path / "run")
    subprocess.run(command, check=True, capture_output=True)
    lines = (out / "curve" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [4, 8, 10]
    assert scores_of(out) == checkpoint_scores(run)
    assert read_manifest(out, "curve").facts["checkpoints"] == 3


def test_it_ends_without_improvement_or_without_a_checkpoint(
    config: Config, made: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worse = iter(range(1, 9))
    monkeypatch.setattr(CheckpointScorer, "__call__", lambda self, report: float(next(worse)))
    facts = followed(config, made, run, tmp_path / "out", patience=1).facts
    assert facts["stopped"] == "no improvement for 1 checkpoints"
    assert scores_of(tmp_path / "out") == {4: 1.0, 8: 2.0}
    facts = followed(config, made, tmp_path / "nowhere", tmp_path / "other", idle=1e-3).facts
    assert facts == {
        "stopped": "no new checkpoint for 0.001 minutes",
        "checkpoints": 0,
        "unreadable": [],
        "split": "train",
        "seed": 20,
    }


def test_a_run_or_one_to_follow_must_be_given(
    config: Config, made: Path, refusal: Callable[[Callable[[], object]], str]
) -> None:
    data, teacher = str(made / "shards"), str(made / "teacher")
    assert "--follow" in refusal(lambda: stages.evaluate(config, data, teacher, out="a"))
    assert "--follow" in refusal(lambda: stages.evaluate(config, data, teacher, "run", "a", follow="b"))
    assert "--out" in refusal(lambda: stages.evaluate(config, data, teacher, "run"))
