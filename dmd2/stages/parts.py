"""Parts of a stage, which separate machines make: `--part i/n`."""

from __future__ import annotations

from typing import Any

from dmd2.config import Config
from dmd2.errors import Refused
from dmd2.io.artifact import Manifest

Part = tuple[int, int]
"""(number counted from 0, number of parts)."""


def parse_part(text: str) -> Part:
    """`2/8` -> (2, 8); empty -> (0, 1), which is everything."""
    number, _, count = (text or "0/1").partition("/")
    if not (number.isdecimal() and count.isdecimal() and int(number) < int(count)):
        raise Refused(f"part is {text!r}; give i/n with i from 0 to n - 1, for example 0/4")
    return int(number), int(count)


def part_of_part(part: Part, inner: Part) -> Part:
    """The share of one of the processes that make a part together."""
    return part[0] + part[1] * inner[0], part[1] * inner[1]


def part_manifest(kind: str, config: Config, inputs: dict[str, str], facts: dict[str, Any]) -> Manifest:
    """The result of one part: a manifest that is returned and not written, since the folder is not published yet."""
    return Manifest(kind=kind, config=config, inputs=inputs, files=[], facts=facts, versions={}, seconds=0)
