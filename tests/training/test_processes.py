"""Many processes, really started by torchrun, against one: the same trainer on every mesh; stopped, killed and resumed."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dmd2 import recipes, stages
from dmd2.training import build, checkpoint
from dmd2.training.metrics_log import METRICS, read_metrics, truncate_after
from dmd2.training.trainer import DMD2Trainer
from tests import warm
from tests.conftest import ALONE, MICRO, flags
from tests.training.test_loop import assert_same, numbers
from tests.worker import WORLDS, played, resolved, state_of

GAMES = [(world, trainer) for world, games in WORLDS.items() for trainer in games]
COLD = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(warm.ROOT)}
"""For what is about torchrun itself, its signals and its restarts."""


def torchrun(processes: int, *words: str) -> list[str]:
    """A real one, whose children are the workers."""
    return [sys.executable, *warm.torchrun(processes, *words)[1:]]


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory, pipeline: Path) -> Path:
    """What happened in worlds of two and of four processes."""
    root = tmp_path_factory.mktemp("told")
    for world in (2, 4):
        (root / str(world)).mkdir()
        words = ["-m", "tests.worker", str(root / str(world)), str(pipeline)]
        ended = subprocess.run(
            warm.torchrun(world, *words), env=warm.environment(), capture_output=True, text=True, check=False
        )
        assert ended.returncode == 0, ended.stderr[-3000:]
    return root


@cache
def alone(case: str, pipeline: Path) -> dict[str, Tensor]:
    return played(*resolved(case, pipeline), ALONE)


EXACT = [game for game in GAMES if not game[1].startswith(("bfloat16", "8bit"))]


@pytest.mark.parametrize(("world", "trainer"), EXACT)
def test_losses_gradients_and_weights_are_those_of_one_process(
    world: int, trainer: str, told: Path, pipeline: Path
) -> None:
    theirs = torch.load(told / str(world) / f"{trainer}.pt", weights_only=True)
    mine = alone(trainer.split()[0], pipeline)
    assert theirs.keys() == mine.keys()
    for name, value in mine.items():
        # Adam makes a whole step of a gradient that is nothing but rounding: of weights, only much of one is wrong.
        atol = 1e-4 if ":" in name else 1e-6
        torch.testing.assert_close(
            theirs[name], value, rtol=1e-5, atol=atol, msg=partial("{}: {}".format, name)
        )


@pytest.mark.parametrize(("world", "trainer"), [trainer for trainer in GAMES if "bfloat16" in trainer[1]])
def test_in_bfloat16_they_are_within_its_noise(world: int, trainer: str, told: Path, pipeline: Path) -> None:
    """The distance to float32 says how large that is."""
    theirs = torch.load(told / str(world) / f"{trainer}.pt", weights_only=True)
    mine, exact = alone(trainer.split()[0], pipeline), alone("parts", pipeline)

    def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
        keys = [key for key in exact if key.startswith(("student: ", "critic: "))]
        return float(sum((a[key] - b[key]).square().sum() for key in keys)) ** 0.5

    assert distance(mine, exact) > 0
    assert distance(theirs, mine) < 1.5 * distance(mine, exact)


def test_8_bit_moments_of_two_processes_are_loaded_by_one_bit_for_bit(told: Path, pipeline: Path) -> None:
    theirs = torch.load(told / "2" / "8bit 2 sharded.pt", weights_only=True)
    config, family, steps = resolved("8bit", pipeline)
    trainer = build.trainer(config, family, family.network().state_dict(), ALONE)
    assert isinstance(trainer, DMD2Trainer)
    checkpoint.load(told / "2" / "checkpoints", steps, trainer.state())
    mine = state_of(trainer, ALONE)
    assert sum(value.dtype == torch.uint8 for value in mine.values()) > 10
    for name, value in mine.items():
        assert torch.equal(value, theirs[name]), name


def test_deterministic_mode_gives_the_same_bits_every_time(made: Path, tmp_path: Path) -> None:
    for out in ("one", "two"):
        words = distilling(made, tmp_path / out, "engine.deterministic=True", "distill.steps=6")
        ended = subprocess.run(
            warm.torchrun(2, *words),
            env=warm.environment(OMP_NUM_THREADS="2"),
            capture_output=True,
            text=True,
            check=False,
        )
        assert ended.returncode == 0, ended.stderr[-3000:]
    assert_same(tmp_path / "one", tmp_path / "two")


LONG = (
    *MICRO,
    "distill.save_every=3",
    "distill.log_every=1",
    "distill.student.ema=0.9",
)


def distilling(made: Path, out: Path, *more: str) -> list[str]:
    places = ["--data", str(made / "shards"), "--teacher", str(made / "teacher"), "--out", str(out)]
    return ["-m", "dmd2", "distill", "edm-digits", *places, *flags((*LONG, *more))]


def reached(process: subprocess.Popen[str], out: Path, step: int) -> None:
    """Wait until an unfinished run has told of a step."""
    while process.poll() is None and max((line["step"] for line in read_metrics(out)), default=0) < step:
        time.sleep(0.02)
    assert process.poll() is None, process.communicate()[1][-3000:]


def workers(process: subprocess.Popen[str]) -> list[int]:
    """The processes that torchrun has started."""
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


@pytest.mark.parametrize("again", [2, pytest.param(5, marks=pytest.mark.slow)])
def test_processes_that_are_started_again_find_each_other_and_not_those_that_died(again: int) -> None:
    words = torchrun(2, f"--max-restarts={again}", "-m", "tests.restarted", str(again))
    done = subprocess.run(words, env=COLD, stderr=subprocess.PIPE, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_mistake_is_told_in_a_sentence_by_many_processes_too(made: Path, tmp_path: Path) -> None:
    words = [
        "--data",
        str(made / "shards"),
        "--teacher",
        str(made / "shards"),
        "--out",
        str(tmp_path / "run"),
    ]
    command = torchrun(2, "-m", "dmd2", "distill", "edm-digits", *words)
    done = subprocess.run(command, env=COLD, stderr=subprocess.PIPE, text=True, check=False)
    assert "a teacher folder is needed here" in done.stderr
    assert "[rank1]" not in done.stderr
    assert re.search(r"Root Cause.*exitcode +: 64", done.stderr, re.DOTALL)


def test_processes_that_wait_for_one_that_hangs_write_their_stacks_and_end(
    made: Path, tmp_path: Path
) -> None:
    log, unfinished = tmp_path / "stderr", tmp_path / ".run.partial"
    words = torchrun(2, *distilling(made, tmp_path / "run", "engine.hang_timeout_s=10", "distill.steps=500"))
    with log.open("w") as stderr:
        process = subprocess.Popen(words, env=COLD, stderr=stderr, text=True)
    reached(process, unfinished, 1)
    waits, hangs = workers(process)
    os.kill(hangs, signal.SIGSTOP)
    while Path(f"/proc/{waits}").exists():
        assert process.poll() is None
        time.sleep(0.1)
    os.kill(hangs, signal.SIGCONT)  # so that torchrun can end it without waiting
    assert process.wait(timeout=600) != 0
    stacks = log.read_text().partition("Timeout (0:00:10)!")[2]
    assert 'dmd2/training/loop.py", line' in stacks
    assert "in make_steps" in stacks


def forgotten(out: Path) -> int:
    """The step that a run goes on from; what is told of later ones is removed, so that it can be waited for."""
    saved = max(checkpoint.saved_steps(out / "checkpoints"), default=0)
    truncate_after(out / METRICS, saved)
    return saved


def started_again(process: subprocess.Popen[str], out: Path, lost: Sequence[int]) -> None:
    """Wait until torchrun has started others in their place, and they have told of a step."""
    since = time.monotonic()

    def wait_while(condition: Callable[[], object]) -> None:
        while condition():
            assert process.poll() is None, process.communicate()[1][-3000:]
            assert time.monotonic() - since < 180
            time.sleep(0.05)

    # One that is left may still publish a checkpoint: what it told of is forgotten only when it has ended.
    wait_while(lambda: set(workers(process)) & set(lost))
    first = forgotten(out)
    wait_while(lambda: all(line["step"] <= first for line in read_metrics(out)))


FEW = [("term", 4, "sharded"), ("one", 2, "resident"), ("all", 2, "sharded")]
"""How a run is stopped, how many processes it has then, and where their weights are."""


def many() -> list[tuple[str, int, str]]:
    draw = random.Random(5)
    sizes = {"one": (2,), "all": (1, 2), "term": (1, 2, 4)}
    order = ("term", "one", "all", "term", "all", "term", "one", "term", "all", "term")
    return [(how, draw.choice(sizes[how]), draw.choice(("resident", "sharded"))) for how in order]


@pytest.mark.parametrize(
    ("stops", "steps", "environment"),
    [(FEW, 24, warm.environment), pytest.param(many(), 72, COLD.copy, marks=pytest.mark.slow)],
    ids=["three", "ten"],
)
def test_a_run_that_is_stopped_on_other_numbers_of_processes_is_the_uninterrupted_one(
    stops: list[tuple[str, int, str]],
    steps: int,
    environment: Callable[[], dict[str, str]],
    made: Path,
    tmp_path: Path,
) -> None:
    """By SIGTERM, by SIGKILL of one, in whose place torchrun starts another by itself, and by SIGKILL of all."""
    whole, out, unfinished = tmp_path / "whole", tmp_path / "run", tmp_path / ".run.partial"
    long = f"distill.steps={steps}"
    stages.distill(
        recipes.resolve("edm-digits", (*LONG, long)), str(made / "shards"), str(made / "teacher"), str(whole)
    )
    draw = random.Random(5)
    for how, size, weights in stops:
        saved = forgotten(unfinished)
        words = distilling(made, out, long, f"engine.weights={weights}")
        process = subprocess.Popen(
            torchrun(size, "--max-restarts=1", *words), env=environment(), stderr=subprocess.PIPE, text=True
        )
        reached(process, unfinished, saved + draw.choice((1, 2, 3)))
        if how == "term":
            process.send_signal(signal.SIGTERM)
            said = process.communicate(timeout=600)[1]
            assert process.returncode != 0
            assert "saved; the same command resumes" in said
            (stopped,) = checkpoint.saved_steps(unfinished / "checkpoints")[-1:]
            assert max(line["step"] for line in read_metrics(unfinished)) == stopped, (
                "it saved where it stopped"
            )
            continue
        there = workers(process)
        if how == "one":
            os.kill(there[1], signal.SIGKILL)
            started_again(process, unfinished, there)
        for pid in (process.pid, *workers(process)):
            os.kill(pid, signal.SIGKILL)
        process.communicate()

    ended = subprocess.run([warm.python(), *distilling(made, out, long)], env=environment(), check=False)
    assert ended.returncode == 0
    for mine, theirs in zip(numbers(out), numbers(whole), strict=True):
        assert mine == pytest.approx(theirs, rel=2e-5, abs=1e-6)
