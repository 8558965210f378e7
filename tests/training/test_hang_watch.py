"""A rank that compiles is waited for, up to a time-out of its own; two real processes over gloo."""

from __future__ import annotations

import re
import subprocess

from tests import warm


def started(compiling_s: float, hang_s: float, compile_s: float) -> subprocess.CompletedProcess[str]:
    words = ["-m", "tests.compiling", str(compiling_s), str(hang_s), str(compile_s)]
    return subprocess.run(
        warm.torchrun(2, *words), env=warm.environment(), capture_output=True, text=True, check=False
    )


def test_a_process_that_waits_for_one_that_compiles_does_not_take_it_for_hanging() -> None:
    ended = started(compiling_s=6, hang_s=3, compile_s=60)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert ended.stdout.count("made the step") == 2
    assert re.search(
        r"no step for \d s: process 1 on \S+ is compiling, which may take 60 s \(engine.compile_timeout_s\)",
        ended.stderr,
    )


def test_one_that_compiles_for_too_long_is_named_and_ends_the_run() -> None:
    ended = started(compiling_s=60, hang_s=2, compile_s=5)
    assert ended.returncode != 0
    assert "made the step" not in ended.stdout
    assert re.search(
        r"no step for \d s, and process 1 on \S+ is compiling, but engine.compile_timeout_s is 5; set it higher",
        ended.stderr,
    )
    assert "in all_reduce" in ended.stderr, "stacks"
