"""Many processes, really started by torchrun, against one: the same game on every mesh; stopped, killed and resumed."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.conftest import ALONE
from tests.worker import WORLDS, played, resolved

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}


GAMES = [(world, game) for world, games in WORLDS.items() for game in games]


def torchrun(processes: int, *words: str) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}", *words]


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory, pipeline: Path) -> Path:
    """What happened in worlds of two and of four processes."""
    root = tmp_path_factory.mktemp("told")
    for world in (2, 4):
        (root / str(world)).mkdir()
        words = ["-m", "tests.worker", str(root / str(world)), str(pipeline)]
        ended = subprocess.run(
            torchrun(world, *words), env=ENVIRONMENT, capture_output=True, text=True, check=False
        )
        assert ended.returncode == 0, ended.stderr[-3000:]
    return root


@cache
def alone(case: str, pipeline: Path) -> dict[str, Tensor]:
    return played(*resolved(case, pipeline), ALONE)


@pytest.mark.parametrize(("world", "game"), [game for game in GAMES if "bfloat16" not in game[1]])
def test_losses_gradients_and_weights_are_those_of_one_process(
    world: int, game: str, told: Path, pipeline: Path
) -> None:
    theirs = torch.load(told / str(world) / f"{game}.pt", weights_only=True)
    mine = alone(game.split()[0], pipeline)
    assert theirs.keys() == mine.keys()
    for name, value in mine.items():
        # Adam makes a whole step of a gradient that is nothing but rounding: of weights, only much of one is wrong.
        atol = 1e-4 if ":" in name else 1e-6
        torch.testing.assert_close(
            theirs[name], value, rtol=1e-5, atol=atol, msg=partial("{}: {}".format, name)
        )


@pytest.mark.parametrize(("world", "game"), [game for game in GAMES if "bfloat16" in game[1]])
def test_in_bfloat16_they_are_within_its_noise(world: int, game: str, told: Path, pipeline: Path) -> None:
    """The distance to float32 says how large that is."""
    theirs = torch.load(told / str(world) / f"{game}.pt", weights_only=True)
    mine, exact = alone("bfloat16", pipeline), alone("parts", pipeline)

    def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
        keys = [key for key in exact if key.startswith(("student: ", "critic: "))]
        return float(sum((a[key] - b[key]).square().sum() for key in keys)) ** 0.5

    assert distance(mine, exact) > 0
    assert distance(theirs, mine) < 1.5 * distance(mine, exact)
