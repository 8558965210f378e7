"""Baselines: other few-step models that an evaluation scores beside student and teacher, as `evaluate.baselines` names them.

Importing this imports no torch.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from dmd2.errors import Refused

BASELINE = "baseline"
"""The recipe of a set of images that a baseline has drawn."""
SPEC = re.compile(
    r"(?P<name>\w{1,40})=(?P<source>.+?)(:(?P<steps>\d{1,4})(:(?P<guidance>\d{1,3}(\.\d+)?))?)?"
)
TAKEN = re.compile(r"(student|teacher)(_\w+)?|real|reference|previous")
"""Names of other sets of images."""


@dataclass(frozen=True)
class Baseline:
    """A model and how it is sampled."""

    name: str
    source: str
    """Folder of a run, package or teacher, or a pipeline of diffusers: a folder, local or gs://, or a name on the hub."""
    steps: int
    """Steps of its sampler; 0 = all that a student was made for."""
    guidance: float
    """Scale of the guidance; 1 = none. A student has none."""

    @property
    def calls(self) -> int:
        """Network calls per image, at most: a guided step of a network without guidance of its own has two."""
        return self.steps * (2 if self.guidance > 1 else 1)


def parse_baselines(specs: Sequence[str]) -> list[Baseline]:
    """Read `NAME=SOURCE`, `NAME=SOURCE:STEPS` and `NAME=SOURCE:STEPS:GUIDANCE`."""
    found: dict[str, Baseline] = {}
    for spec in specs:
        parts = SPEC.fullmatch(spec)
        if not parts:
            raise Refused(
                f"evaluate.baselines has {spec!r:.200}, which is no baseline; write NAME=SOURCE:STEPS or NAME=SOURCE:STEPS:GUIDANCE, with letters, digits and _ in the name"
            )
        name = parts["name"]
        if TAKEN.fullmatch(name) or name in found:
            raise Refused(
                f"evaluate.baselines has a baseline called {name!r}, which another set of images is called; choose another name"
            )
        found[name] = Baseline(name, parts["source"], int(parts["steps"] or 0), float(parts["guidance"] or 1))
    return list(found.values())
