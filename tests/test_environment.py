"""What the project runs with: the pins, and how OpenMP waits."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from dmd2.io.storage import cache

ROOT = Path(__file__).parents[1]
WAITS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


def test_the_lock_names_public_addresses_only() -> None:
    """Nobody else could install from those of a mirror."""
    found = re.findall(r"https?://[^/\"]+", (ROOT / "uv.lock").read_text())
    assert set(found) == {"https://pypi.org", "https://files.pythonhosted.org"}


def test_the_oldest_versions_that_are_tested_are_the_oldest_that_are_allowed() -> None:
    """A bound that nothing runs with is a guess."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = dict(
        re.findall(r"^(\S+)==(\S+)$", (ROOT / "tests" / "oldest.txt").read_text(), flags=re.MULTILINE)
    )
    for needed in map(Requirement, project["dependencies"]):
        assert needed.specifier.contains(pins[needed.name]), needed
        bounds = [spec.version for spec in needed.specifier if spec.operator == ">="]
        assert [Version(bound) for bound in bounds] in ([], [Version(pins[needed.name])]), needed


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


@pytest.mark.parametrize(
    ("users", "there"),
    [
        ({}, [None, "expandable_segments:True"]),
        ({"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}, ["backend:native", None]),
        ({"PYTORCH_ALLOC_CONF": "backend:native"}, [None, "backend:native"]),
    ],
)
def test_memory_of_gpus_grows_unless_the_user_says_how(
    users: dict[str, str], there: list[str | None]
) -> None:
    names = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
    env = {name: value for name, value in os.environ.items() if name not in names} | users
    code = f"import os, dmd2; print([os.environ.get(name) for name in {names}])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.stdout.strip() == str(there), done.stderr


def test_it_is_said_before_torch_loads_openmp() -> None:
    code = "import dmd2, sys; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr


@pytest.mark.parametrize(
    ("users", "there"),
    [
        ({}, "home/.cache/dmd2"),
        ({"XDG_CACHE_HOME": "xdg"}, "xdg/dmd2"),
        ({"XDG_CACHE_HOME": "xdg", "DMD2_CACHE": "named"}, "named"),
        ({"DMD2_CACHE": ""}, "home/.cache/dmd2"),
    ],
)
def test_copies_are_kept_where_the_user_or_the_system_says(
    users: dict[str, str], there: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("XDG_CACHE_HOME", "DMD2_CACHE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"HOME": "home", **users}.items():
        monkeypatch.setenv(name, str(tmp_path / value) if value else "")
    assert cache() == tmp_path / there
