"""What the project runs with: how OpenMP waits."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
WAITS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


@pytest.mark.parametrize(
    ("users", "there"),
    [
        ({}, [None, "1000"]),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, ["ACTIVE", None]),
        ({"GOMP_SPINCOUNT": "7"}, [None, "7"]),
    ],
)
@pytest.mark.parametrize("module", ["dmd2", "dmd2.cli", "components.distill.launch"])
def test_threads_do_not_spin_unless_the_user_says_how(
    module: str, users: dict[str, str], there: list[str | None]
) -> None:
    env = {name: value for name, value in os.environ.items() if name not in WAITS} | users
    code = f"import os, {module}; print([os.environ.get(name) for name in {WAITS}])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.stdout.strip() == str(there), done.stderr


def test_it_is_said_before_torch_loads_openmp() -> None:
    code = "import dmd2, sys; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr
