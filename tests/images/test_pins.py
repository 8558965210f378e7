"""Digests come from a registry or not at all, and nothing is built on a base that has none."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from dmd2.errors import Refused
from images import pins
from images.__main__ import pin_others

KNOWN = "sha256:" + "0123456789abcdef" * 4
TEXT = f"# why\npython: docker.io/library/python:3.11-slim-bookworm\ndmd2: r/dmd2:1@{KNOWN}\ndmd2-launch: dmd2-launch:1\n"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "images.lock").write_text(TEXT)
    return tmp_path / "images.lock"


def test_the_committed_file_names_the_base_and_both_images() -> None:
    found = pins.pins()
    assert found.keys() == {"python", "dmd2", "dmd2-launch", "tcpx-daemon", "tcpx-installer", "gib", "pause"}
    assert re.fullmatch(rf"docker\.io/library/python:3\.11-slim-bookworm({pins.DIGEST})?", found["python"])


def test_a_pinned_image_is_its_reference_with_the_digest(path: Path) -> None:
    assert pins.pinned("dmd2", path) == f"r/dmd2:1@{KNOWN}"
    assert pins.reference("dmd2-launch", path) == "dmd2-launch:1"


def test_an_image_without_a_digest_is_refused_with_what_to_do(
    path: Path, refusal: Callable[..., str]
) -> None:
    said = refusal(lambda: pins.pinned("python", path))
    assert "'python' has no digest" in said
    assert "make images-lock" in said
    assert "BASE=" in said


def test_an_unknown_name_is_refused_with_the_nearest(path: Path, refusal: Callable[..., str]) -> None:
    assert "did you mean 'dmd2-launch'?" in refusal(lambda: pins.reference("dmd2-lunch", path))


@pytest.mark.parametrize(
    "line", ["python", "python:3.11", "python: a b", "python: a@sha256:1234", f"python: @{KNOWN}", "python: "]
)
def test_a_line_that_is_none_is_refused(path: Path, line: str, refusal: Callable[..., str]) -> None:
    path.write_text(line + "\n")
    assert repr(line) in refusal(lambda: pins.pins(path))


def test_pinning_changes_one_line(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pins, "digest", lambda tagged: KNOWN)
    assert pins.pin("dmd2", "other/dmd2:2", path) == f"other/dmd2:2@{KNOWN}"
    assert path.read_text() == TEXT.replace("r/dmd2:1", "other/dmd2:2")


def test_without_skopeo_no_digest_is_written(
    path: Path, monkeypatch: pytest.MonkeyPatch, refusal: Callable[..., str]
) -> None:
    monkeypatch.setenv("PATH", "")
    assert "skopeo is needed" in refusal(lambda: pins.pin("python", "python:3", path))
    assert path.read_text() == TEXT


needs_skopeo = pytest.mark.skipif(not shutil.which("skopeo"), reason="skopeo is not installed")


@needs_skopeo
def test_a_registry_that_is_not_there_gives_no_digest(path: Path, refusal: Callable[..., str]) -> None:
    said = refusal(lambda: pins.pin("python", "localhost:1/python:3", path))
    assert "localhost:1/python:3" in said
    assert "no digest was written" in said
    assert path.read_text() == TEXT


def test_every_image_of_others_is_asked_for_and_those_unknown_are_named_together(
    path: Path, monkeypatch: pytest.MonkeyPatch, refusal: Callable[..., str]
) -> None:
    path.write_text(f"{TEXT}gib: r/gib:1\npause: r/pause:2\n")
    asked: list[str] = []

    def digest(tagged: str) -> str:
        asked.append(tagged)
        if "pause" in tagged or "python" in tagged:
            raise Refused(f"no registry says what {tagged} is")
        return KNOWN

    monkeypatch.setattr(pins, "digest", digest)
    said = refusal(lambda: pin_others(path))
    assert asked == ["docker.io/library/python:3.11-slim-bookworm", "r/gib:1", "r/pause:2"]
    assert "python:3.11-slim-bookworm is; no registry says what r/pause:2 is" in said
    assert path.read_text() == f"{TEXT}gib: r/gib:1@{KNOWN}\npause: r/pause:2\n"


def python_m_images(*words: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "images", *words], cwd=pins.ROOT, env=os.environ | env, capture_output=True, text=True
    )  # fmt: skip


def one_line(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 64, done.stderr
    (line,) = done.stderr.splitlines()
    return line


@pytest.mark.skipif("@" in pins.pins()["python"], reason="the base is pinned")
def test_building_on_a_base_without_a_digest_is_refused_in_one_line() -> None:
    assert "'python' has no digest" in one_line(python_m_images("build", "--builder", "true"))


def test_building_without_a_builder_is_refused_in_one_line(tmp_path: Path) -> None:
    assert "no builder of images" in one_line(python_m_images("build", "--base", "b:1", PATH=str(tmp_path)))


def test_a_builder_that_is_not_installed_is_refused_in_one_line() -> None:
    said = one_line(python_m_images("build", "--base", "b:1", "--builder", "no-such-builder"))
    assert "no-such-builder" in said


def test_an_empty_folder_of_wheels_is_refused_in_one_line(tmp_path: Path) -> None:
    words = ("build", "--builder", "true", "--base", "b:1", "--wheels", str(tmp_path))
    assert f"{tmp_path} has no *.whl" in one_line(python_m_images(*words))


def test_pushing_to_nowhere_is_refused_in_one_line() -> None:
    assert "REGISTRY=" in one_line(python_m_images("push", "--builder", "true", "--registry", ""))
