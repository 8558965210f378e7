"""What is cheap to start: `--help`, gate, publish and the light components import no library that takes seconds."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from dmd2.config import Config
from dmd2.io.staging import draft_artifact
from tests.conftest import flags

ROOT = Path(__file__).parents[1]
SLOW = {
    "torch",
    "diffusers",
    "transformers",
    "accelerate",
    "matplotlib",
    "sklearn",
    "scipy",
    "pyarrow",
    "webdataset",
}
MODULES = ["dmd2.stages", "dmd2.cli", "dmd2.recipes", "dmd2.config", "pipelines.distill", "pipelines.retrain"]
MODULES += sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in (ROOT / "components").rglob("*.py")
    if path.name != "__init__.py"
)


def slow_imports(*arguments: str, status: int = 0) -> list[str]:
    """Run Python in a new process, which must end with `status` -> `module, imported by module` for each slow import."""
    process = subprocess.run(
        [sys.executable, "-X", "importtime", *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert process.returncode == status, process.stderr[-2000:]
    return [f"{name}, imported by {importer}" for name, importer in imports(process.stderr) if name in SLOW]


def imports(log: str) -> Iterator[tuple[str, str]]:
    """(module, the module that imported it) from the log of `-X importtime`: a module follows those it imports, which
    are indented by two spaces more."""
    waiting: dict[int, list[str]] = {}
    for line in log.splitlines():
        if line.startswith("import time:") and "imported package" not in line:
            text = line.split("|")[2][1:]
            name, depth = text.strip(), (len(text) - len(text.lstrip())) // 2
            yield from ((imported, name) for imported in waiting.pop(depth + 1, []))
            waiting.setdefault(depth, []).append(name)
    yield from ((name, "the program") for name in waiting.get(0, []))


def test_the_importer_of_a_module_is_found_in_the_log() -> None:
    lines = (
        "import time: self [us] | cumulative | imported package",
        *(f"import time: 1 | 1 | {name}" for name in ("    c", "  b", "a", "d")),
    )
    assert list(imports("\n".join(lines))) == [
        ("c", "b"),
        ("b", "a"),
        ("a", "the program"),
        ("d", "the program"),
    ]


@pytest.mark.skipif(not find_spec("kfp"), reason="needs KFP")
def test_stages_command_line_and_components_import_nothing_slow() -> None:
    assert slow_imports("-c", "import " + ", ".join(MODULES)) == []


def test_help_imports_nothing_slow() -> None:
    assert slow_imports("-m", "dmd2", "distill", "edm-digits", "--help") == []


def test_gate_imports_nothing_slow(made: Path, tmp_path: Path) -> None:
    gate = ["gate", "edm-digits", "--evaluation", str(made / "evaluation"), "--out", str(tmp_path / "gate")]
    assert slow_imports("-m", "dmd2", *gate, *flags()) == []


def test_publish_imports_nothing_slow(micro: Config, tmp_path: Path) -> None:
    with draft_artifact(str(tmp_path / "package"), "package", micro, {}) as draft:
        (draft.path / "README.md").write_text("a package")
    publish = ["publish", "--package", str(tmp_path / "package"), "--out", str(tmp_path / "models")]
    assert slow_imports("-m", "dmd2", *publish) == []


def test_a_mistake_is_found_before_anything_slow_is_imported() -> None:
    package = [
        "package",
        "--run",
        "/nowhere",
        "--evaluation",
        "/nowhere",
        "--gate",
        "/nowhere",
        "--out",
        "/nowhere",
    ]
    assert slow_imports("-m", "dmd2", *package, status=64) == []


def test_the_check_of_parameters_before_a_run_and_its_outcome_import_nothing_slow(tmp_path: Path) -> None:
    program = f"""
from components.finish_run.outcome import write_outcome
from components.prepare_run.parameters import RunParameters, check_parameters
from components.prepare_run.preflight import check_resources
given = RunParameters(overrides="distill.steps=3")
check_parameters(given, on_cluster=False)
check_resources(given, {str(tmp_path)!r})
write_outcome({str(tmp_path)!r}, "run", "FAILED", "stopped")
"""
    assert slow_imports("-c", program) == []
