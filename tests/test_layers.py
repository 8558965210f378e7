"""Imports point downwards only: a module may import the layers listed before its own."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "dmd2"
LAYERS = [
    {"config", "errors", "storage", "folders", "ledger", "progress", "pictures"},
    {"diffusion", "sample", "losses", "tensors", "rng"},
    {"denoiser", "parallel", "ema"},
    {"models", "data", "sampler"},
    {"terms", "checkpoint", "memory", "evaluation"},
    {"trainer", "run"},
    {"build", "package", "plan", "report"},
    {"recipes", "stages", "cli", "__main__"},
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}


def imported(path: Path) -> set[str]:
    """Names of the dmd2 modules that the file imports."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            head, *rest = node.module.split(".")
            if head == "dmd2":
                found |= {rest[0]} if rest else {alias.name for alias in node.names}
    return found


def test_library_knows_no_kubeflow() -> None:
    text = "".join(path.read_text() for path in PACKAGE.rglob("*.py"))
    assert "import kfp" not in text
    assert "from kfp" not in text
    assert "kubernetes" not in text


def test_imports_point_downwards() -> None:
    wrong = []
    for path in sorted(PACKAGE.rglob("*.py")):
        module = path.relative_to(PACKAGE).with_suffix("").parts[0]
        if module == "__init__":
            continue
        wrong += [f"{module} imports {name}" for name in imported(path) if RANK[name] > RANK[module]]
    assert not wrong, "\n".join(wrong)
