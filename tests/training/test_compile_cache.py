"""Graphs that one process has compiled are found by the next, whose own cache is empty."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dmd2 import recipes
from dmd2.parallel.ranks import World
from dmd2.training.compile_cache import CompileCache
from tests import warm
from tests.conftest import ALONE

COMPILE = """
import sys, torch
from torch._dynamo.utils import counters
from dmd2.training.compile_cache import CompileCache
from tests.conftest import ALONE
cache = CompileCache(sys.argv[1], ALONE)
cache.load()
product = torch.compile(lambda x: x @ x, dynamic=False)
for size in map(int, sys.argv[2:]):
    product(torch.ones(size, size))
    cache.save()
print(counters["inductor"]["fxgraph_cache_hit"], counters["inductor"]["fxgraph_cache_miss"])
"""


def hits_and_misses(folder: Path, sizes: tuple[int, ...], own: Path) -> list[int]:
    environment = warm.environment() | {"TORCHINDUCTOR_CACHE_DIR": str(own)}
    words = [warm.python(), "-c", COMPILE, str(folder), *map(str, sizes)]
    ended = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return [int(word) for word in ended.stdout.split()]


def test_a_second_start_finds_all_graphs_of_the_first(tmp_path: Path) -> None:
    folder = tmp_path / "graphs"
    assert hits_and_misses(folder, (4, 5), tmp_path / "a") == [0, 2]
    (file,) = folder.iterdir()
    first = file.read_bytes()
    assert hits_and_misses(folder, (4, 5), tmp_path / "b") == [2, 0], "those of both times that it saved"
    assert file.read_bytes() == first, "nothing new, so nothing is written"


@pytest.mark.parametrize("damaged", [b"", b"no graphs", bytes(1000)])
def test_a_damaged_file_is_as_good_as_none(
    damaged: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    cache = CompileCache(str(tmp_path), ALONE)
    (tmp_path / cache.name).write_bytes(damaged)
    cache.load()
    assert "compiled graphs of earlier processes: 0" in caplog.text


def test_each_rank_of_a_machine_has_its_own_file_and_other_machines_read_them() -> None:
    names = {CompileCache("f", World(torch.device("cpu"), rank, 4, rank % 2, 2)).name for rank in range(4)}
    assert len(names) == 2


def test_a_folder_for_graphs_without_compiling_is_refused(refusal: Callable[..., str]) -> None:
    words = refusal(
        lambda: recipes.resolve("edm-digits", ["engine.compile=off", "engine.compile_cache=graphs"])
    )
    assert "compile is off, so there are no graphs to keep" in words
