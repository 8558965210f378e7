"""The bill of materials of the environment that made a package, in CycloneDX 1.5: every installed Python package with version and licence.

https://cyclonedx.org/docs/1.5/json/
"""

from __future__ import annotations

import platform
import re
from importlib.metadata import Distribution, distributions
from typing import Any

SBOM = "sbom.cdx.json"
"""Its name in a package."""


def bill_of_materials() -> dict[str, Any]:
    """The installed packages, by name. Without times and serial numbers, so that equal environments have equal bills."""
    found = {_normal(each.name): each for each in distributions() if each.name}
    ours = found.pop("dmd2")
    python = {"type": "platform", "name": "python", "version": platform.python_version()}
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "version": 1,
        "metadata": {"component": _component(ours) | {"type": "application"}},
        "components": [python, *(_component(found[name]) for name in sorted(found))],
    }


def _component(package: Distribution) -> dict[str, Any]:
    name = _normal(package.name)
    purl = f"pkg:pypi/{name}@{package.version.replace('+', '%2B')}"
    known = {"type": "library", "bom-ref": purl, "name": name, "version": package.version, "purl": purl}
    stated, field = package.metadata, "License-Expression"
    return known | ({"licenses": [{"expression": stated[field]}]} if field in stated else {})


def _normal(name: str) -> str:
    """The name as package indices spell it."""
    return re.sub(r"[-_.]+", "-", name).lower()
