"""Scores of checkpoints: the best checkpoint of a run is kept and becomes the student."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dmd2 import recipes, report
from dmd2.batch import Batch
from dmd2.data.loader import Shards
from dmd2.errors import Interrupted
from dmd2.evaluation import features
from dmd2.evaluation.checkpoint_score import CheckpointScorer, chunks_of_rank, evenly_spaced
from dmd2.evaluation.features import FeatureExtractor
from dmd2.io.artifact import open_artifact, read_manifest
from dmd2.io.tensors import load_tensors
from dmd2.model import load_network
from dmd2.stages.networks import starting_weights
from dmd2.training import checkpoint
from dmd2.training.metrics_log import SCORE, checkpoint_scores, read_metrics
from dmd2.training.optim import Metrics
from dmd2.training.trainer import DMD2Trainer
from tests import warm
from tests.conftest import ALONE, MICRO, flags
from tests.evaluation.test_frechet import fid
from tests.training.test_loop import assert_same, distill, numbers
from tests.training.test_on_a_bucket import machines

SCORED = (
    *MICRO,
    "distill.best.images=24",
    "distill.best.features=efficientnet",
    "distill.keep_checkpoints=1",
)
WORSE = (*SCORED, "distill.student.lr=0.3", "distill.student.ema=0.5")
"""A student that training moves far away from its teacher, so an early checkpoint is better than the last."""


@pytest.fixture(scope="module")
def whole(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 10 steps with checkpoints after 4, 8 and 10."""
    out = tmp_path_factory.mktemp("best") / "run"
    distill(recipes.resolve("edm-digits", WORSE), made, out)
    return out


def test_every_checkpoint_is_scored_and_the_best_is_kept_and_becomes_the_student(whole: Path) -> None:
    scores, facts = checkpoint_scores(whole), read_manifest(whole, "run").facts
    assert list(scores) == [4, 8, 10]
    best = min(scores, key=scores.__getitem__)
    assert best != 10, f"the last is the best, {scores}, so that this test shows nothing"
    assert facts["best_step"] == best
    assert facts["best_fid"] == scores[best]
    assert checkpoint.saved_steps(whole / "checkpoints") == [best, 10]
    saved = checkpoint.load_object(whole / "checkpoints" / f"{best:08d}", "student.average0")
    for name, weight in load_tensors(whole / "network.safetensors").items():
        assert torch.equal(weight, saved[f"shadow.{name}"]), name


def test_the_score_is_the_fid_between_samples_of_the_result_and_training_samples(
    whole: Path, made: Path
) -> None:
    config = recipes.resolve("edm-digits", WORSE)
    shards = Shards(made / "shards", "train")
    train = shards.select(evenly_spaced(24, shards))
    extract = features.load_pretrained(config.distill.best, "distill.best", torch.device("cpu"))
    student, seed = load_network(whole), config.distill.best.seed * 1_000_003
    labels = train.label.tolist()
    images = [student.sample(labels[:16], seed), student.sample([*labels[16:], *labels[:8]], seed + 16)[:8]]
    expected = fid(extract(torch.cat(images)).numpy(), extract(train.image).numpy())
    assert read_manifest(whole, "run").facts["best_fid"] == pytest.approx(expected, rel=1e-4)


def stopped(made: Path, out: Path, after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Begin the run, and stop it by a signal during a step."""
    original = DMD2Trainer.step

    def step(self: DMD2Trainer, real: Batch, number: int) -> Metrics:
        if number + 1 == after:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, real, number)

    with monkeypatch.context() as patched:
        patched.setattr(DMD2Trainer, "step", step)
        with pytest.raises(Interrupted):
            distill(recipes.resolve("edm-digits", WORSE), made, out)


@pytest.mark.parametrize("after", [4, 9])
def test_a_run_that_is_stopped_ends_with_the_same_student(
    made: Path, whole: Path, tmp_path: Path, after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a checkpoint is due, which is then scored when the run goes on, and where none is."""
    stopped(made, tmp_path / "run", after, monkeypatch)
    scored, chunks = len(checkpoint_scores(tmp_path / ".run.partial")), []
    compute = FeatureExtractor.__call__
    monkeypatch.setattr(
        FeatureExtractor, "__call__", lambda self, images: chunks.append(len(images)) or compute(self, images)
    )
    distill(recipes.resolve("edm-digits", WORSE), made, tmp_path / "run")
    assert len(chunks) == 2 * (3 - scored), (
        "two chunks of the student's samples for each score, none of training samples"
    )
    assert checkpoint_scores(tmp_path / "run") == checkpoint_scores(whole)
    assert_same(tmp_path / "run", whole)


def test_a_run_that_is_killed_while_it_scores_a_checkpoint_loses_nothing(
    made: Path, whole: Path, tmp_path: Path
) -> None:
    """SIGKILL while the second checkpoint is scored, which is saved already."""
    code = """
import os, signal, sys
from dmd2.config import Config
from dmd2.evaluation.checkpoint_score import CheckpointScorer
from dmd2 import stages
calls, score = [], CheckpointScorer.__call__
def killed(self, report):
    calls.append(1)
    if len(calls) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return score(self, report)
CheckpointScorer.__call__ = killed
stages.distill(Config.model_validate_json(sys.argv[1]), *sys.argv[2:])
"""
    config = recipes.resolve("edm-digits", WORSE)
    folders = [str(made / "shards"), str(made / "teacher"), str(tmp_path / "run")]
    words = [warm.python(), "-c", code, config.model_dump_json(), *folders]
    ended = subprocess.run(words, env=warm.environment(), capture_output=True, text=True, check=False)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    unfinished = tmp_path / ".run.partial"
    assert checkpoint.saved_steps(unfinished / "checkpoints") == [4, 8]
    assert list(checkpoint_scores(unfinished)) == [4]
    distill(config, made, tmp_path / "run")
    assert_same(tmp_path / "run", whole)
    assert numbers(tmp_path / "run") == numbers(whole)


def test_four_processes_select_the_same_checkpoint_as_one(
    made: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They continue from where one was stopped, and begin by scoring that checkpoint; two of them have none of the 24 training samples."""
    stopped(made, tmp_path / "run", 4, monkeypatch)
    folders = ["--data", str(made / "shards"), "--teacher", str(made / "teacher")]
    words = [*folders, "--out", str(tmp_path / "run"), *flags((*WORSE, "engine.weights=sharded"))]
    ended = subprocess.run(
        warm.torchrun(4, "-m", "dmd2", "distill", "edm-digits", *words),
        env=warm.environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert list(checkpoint_scores(tmp_path / "run")) == [4, 8, 10]
    for mine, theirs in zip(
        checkpoint_scores(tmp_path / "run").values(), checkpoint_scores(whole).values(), strict=True
    ):
        assert mine == pytest.approx(theirs, rel=1e-2), (
            "a pixel of a sample is rounded another way now and then"
        )
    assert (
        read_manifest(tmp_path / "run", "run").facts["best_step"]
        == read_manifest(whole, "run").facts["best_step"]
    )
    its, of_one = (load_tensors(run / "network.safetensors") for run in (tmp_path / "run", whole))
    for name, weight in its.items():
        torch.testing.assert_close(weight, of_one[name], rtol=1e-3, atol=1e-3)


def test_machines_that_share_nothing_but_a_bucket_take_the_best_from_there(
    made: Path, whole: Path, bucket: str, tmp_path: Path
) -> None:
    folders = ("--data", str(made / "shards"), "--teacher", str(made / "teacher"), "--out", f"{bucket}/run")
    for process in machines(
        tmp_path, "ab", "distill", "edm-digits", *folders, *flags((*WORSE, "engine.shards=2"))
    ):
        said = process.communicate(timeout=600)[1]
        assert process.returncode == 0, said[-3000:]
    manifest = read_manifest(f"{bucket}/run", "run")
    assert manifest.facts["best_step"] == read_manifest(whole, "run").facts["best_step"]
    its = load_tensors(open_artifact(f"{bucket}/run", manifest, "network.*") / "network.safetensors")
    for name, weight in load_tensors(whole / "network.safetensors").items():
        torch.testing.assert_close(its[name], weight, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("count", [24, 40, 50])
def test_samples_are_the_same_for_any_number_of_processes(count: int) -> None:
    """Each process has equally many chunks; those that are added for that lie beyond the count."""
    alone = list(chunks_of_rank(count, ALONE))
    together = [list(chunks_of_rank(count, replace(ALONE, rank=rank, size=5))) for rank in range(5)]
    assert len({len(rows) for rows in together}) == 1
    every = sorted((rows for part in together for rows in part), key=lambda rows: rows.start)
    assert every[: len(alone)] == alone
    assert all(rows.start >= count for rows in every[len(alone) :])


def test_samples_are_taken_in_runs_if_single_ones_would_open_more_shards(made: Path) -> None:
    shards = Shards(made / "shards", "train")
    assert list(shards.counts) == [16, 16, 16]
    assert evenly_spaced(48, shards).tolist() == list(range(48))
    assert evenly_spaced(20, shards).tolist() == [*range(16), 24, 25, 26, 27]


def test_a_signal_stops_the_scoring_of_a_checkpoint(
    made: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = CheckpointScorer.__call__, []

    def signalled(self: CheckpointScorer, report: Callable[[str], None]) -> float:
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, report)

    with monkeypatch.context() as patched:
        patched.setattr(CheckpointScorer, "__call__", signalled)
        with pytest.raises(Interrupted, match="while the checkpoint of step 8 was scored") as caught:
            distill(recipes.resolve("edm-digits", WORSE), made, tmp_path / "run")
    assert caught.value.status == 75
    distill(recipes.resolve("edm-digits", WORSE), made, tmp_path / "run")
    assert_same(tmp_path / "run", whole)


def test_a_run_that_ends_within_a_rollout_is_scored_there_too(made: Path, tmp_path: Path) -> None:
    walks = ("distill.student_timesteps=999,499", "distill.continue_rollouts=True", "distill.steps=7")
    distill(recipes.resolve("edm-digits", (*SCORED, *walks)), made, tmp_path / "run")
    assert list(checkpoint_scores(tmp_path / "run")) == [5, 7]


def test_another_run_starts_from_student_and_critic_of_the_best_checkpoint(whole: Path) -> None:
    start = starting_weights(str(whole), weights=True)
    assert start
    assert start.critic
    best = whole / "checkpoints" / f"{read_manifest(whole, 'run').facts['best_step']:08d}"
    critic = checkpoint.load_object(best, "critic")
    last = checkpoint.load_object(whole / "checkpoints" / "00000010", "critic")
    assert all(torch.equal(weight, critic[f"network.{name}"]) for name, weight in start.critic.items())
    assert not all(torch.equal(weight, last[f"network.{name}"]) for name, weight in start.critic.items())


def test_report_and_model_card_say_which_checkpoint_was_selected(whole: Path, made: Path) -> None:
    from dmd2.model_card import best_checkpoint, model_card

    made_of = read_manifest(whole, "run")
    sentence = best_checkpoint(made_of)
    assert f"of step {made_of.facts['best_step']} of 10" in sentence
    manifests = {"run": made_of} | {
        kind: read_manifest(made / kind, kind) for kind in ("shards", "teacher", "evaluation", "gate")
    }
    report.write_report(whole.parent / "report.html", manifests, whole, made / "evaluation")
    page = (whole.parent / "report.html").read_text()
    assert sentence in page
    assert sentence in model_card(made_of, manifests["evaluation"], manifests["gate"], "")
    assert best_checkpoint(read_manifest(made / "run", "run")) == ""


def test_checkpoints_are_not_scored_by_default(made: Path) -> None:
    assert not any(SCORE in line for line in read_metrics(made / "run"))
    assert "best_step" not in read_manifest(made / "run", "run").facts


def test_missing_feature_weights_are_refused_before_the_first_step(
    made: Path, tmp_path: Path, refusal: Callable[..., str]
) -> None:
    lost = (*SCORED, "distill.best.features=inception", "distill.best.inception.uri=/nowhere/weights.pt")
    sentence = refusal(lambda: distill(recipes.resolve("edm-digits", lost), made, tmp_path / "run"))
    assert "set --distill.best.inception.uri to a copy of them" in sentence
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("distill.best.images=1",), "best.images is 1; a distance between samples needs at least 2"),
        (("distill.best.images=-1",), "images: Input should be greater than or equal to 0"),
    ],
)
def test_settings_that_cannot_be_scored_are_refused(
    settings: tuple[str, ...], message: str, refusal: Callable[..., str]
) -> None:
    assert message in refusal(lambda: recipes.resolve("edm-digits", (*MICRO, *settings)))


def test_a_regression_cannot_be_scored(refusal: Callable[..., str]) -> None:
    scored = ("distill.best.images=24",)
    assert "a regression sees no training samples" in refusal(
        lambda: recipes.resolve("sdxl-1step-warmup", scored)
    )
