"""Imports point downwards only: a module may import from its own layer and from those listed before it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "dmd2"
LAYERS = [
    {"c_compiler", "config", "errors", "progress", "log", "image_grid", "overrides", "processors"},
    {"io", "batch", "rng", "diffusion"},
    {"denoiser", "parallel"},
    {"encoders", "data", "models", "sampler"},
    {"evaluation"},
    {"training"},
    {"plan", "licence", "model", "model_card", "provenance", "report", "sbom", "signature"},
    {"recipes", "stages", "cli", "serve", "__main__"},
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}


def imported(source: str, package: str = "dmd2") -> set[str]:
    """The top modules of dmd2 that a file of `package` imports, at its top or anywhere inside, in whatever way."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                found |= {alias.name for alias in names}
            case ast.ImportFrom(module=module, names=names, level=level):
                above = package.split(".")[: len(package.split(".")) - level + 1] if level else []
                base = ".".join([*above, *([module] if module else [])])
                found |= {f"{base}.{alias.name}" for alias in names}
            case ast.Call(
                func=ast.Name(id=called) | ast.Attribute(attr=called), args=[ast.Constant(str(name)), *_]
            ):
                found |= {name} if called in ("import_module", "__import__") else set()
    return {name.split(".")[1] for name in found if name.startswith("dmd2.")}


@pytest.mark.parametrize(
    "line",
    [
        "import dmd2.io.storage",
        "import dmd2.io.storage as s",
        "from dmd2.io import storage",
        "from dmd2 import io",
        "from ..io import storage",
        "from .. import io",
        "def f():\n    from dmd2.io.storage import open_store",
        "class A:\n    def f(self):\n        import dmd2.io",
        "importlib.import_module('dmd2.io.storage')",
        "__import__('dmd2.io')",
    ],
)
def test_every_kind_of_import_is_seen(line: str) -> None:
    assert imported(line, "dmd2.data") == {"io"}


def test_library_knows_no_kubeflow() -> None:
    text = "".join(path.read_text() for path in PACKAGE.rglob("*.py"))
    assert "import kfp" not in text
    assert "from kfp" not in text
    assert "kubernetes" not in text


def test_imports_point_downwards() -> None:
    wrong = []
    for path in sorted(PACKAGE.rglob("*.py")):
        place = path.relative_to(PACKAGE).with_suffix("").parts
        if place[0] == "__init__":
            continue
        package = ".".join(("dmd2", *place[:-1]))
        names = imported(path.read_text(), package)
        wrong += [
            f"{'.'.join(place)} imports {name}" for name in sorted(names) if RANK[name] > RANK[place[0]]
        ]
    assert not wrong, "\n".join(wrong)
