"""The file in a package that samples a student of the EDM family without this library."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dmd2 import recipes, stages
from dmd2.config import Config, EdmConfig
from dmd2.model import Model, load_network, save_network
from dmd2.models.convert.edm_pickle import read_edm_pickle
from dmd2.models.edm import LOADER
from dmd2.models.edm_student import load
from dmd2.models.family import make_family
from dmd2.models.one_file import one_file
from tests import warm
from tests.conftest import with_adm
from tests.models.test_convert import edm, network

ALONE = "import sys\nfor name in ('dmd2', 'diffusers', 'transformers', 'pydantic', 'PIL'): sys.modules[name] = None\n"


def run_without_library(lines: str, folder: Path) -> str:
    words = [warm.python(), "-c", ALONE + lines]
    done = subprocess.run(words, capture_output=True, text=True, cwd=folder, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def save_package(config: Config, timesteps: tuple[int, ...], folder: Path) -> Model:
    """A student with random weights, in all of its forms."""
    torch.manual_seed(0)
    family = make_family(config.family)
    network = family.network()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    student = Model(config.family, family, network, timesteps)
    folder.mkdir()
    save_network(folder, student, network.state_dict())
    assert list(family.write_forms(folder, timesteps, "float16")) == [LOADER]
    return load_network(folder)


SIZES: dict[str, dict[str, Any]] = {
    "flat": {},
    "deep": {"multipliers": (1, 2), "attention": (4, 2), "resolution": 8, "patch": 2, "image_channels": 3, "head_channels": 4},
}  # fmt: skip


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("timesteps", [(999,), (999, 749, 499, 249)])
def test_it_draws_what_the_library_draws_bit_for_bit(
    size: str, timesteps: tuple[int, ...], micro: Config, tmp_path: Path
) -> None:
    """In a process that has no library, over more images than a network call has."""
    student = save_package(with_adm(micro, **SIZES[size]), timesteps, tmp_path / "package")
    classes = [index % 3 for index in range(70)]
    lines = f"""
sys.path.append("package")
from {Path(LOADER).stem} import load
from safetensors.torch import save_file
student = load("package")
save_file({{"x": student.samples({classes}, seed=5), "images": student.sample({classes}, seed=5)}}, "drawn.safetensors")
"""
    run_without_library(lines, tmp_path)
    drawn = load_file(tmp_path / "drawn.safetensors")
    assert torch.equal(drawn["images"], student.sample(classes, seed=5))
    assert torch.equal(drawn["x"], student.samples(classes, seed=5))
    assert drawn["images"].float().std() > 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_it_draws_what_the_library_draws_whatever_the_precision_of_the_teacher(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    """Of a teacher in a published pickle, which is resolved."""
    path = edm(tmp_path, network().to(dtype))
    family = EdmConfig(network=read_edm_pickle(path)[0])
    config = recipes.get("edm-digits-no-gan").model_copy(update={"family": family})
    stages.resolve(config, str(path), str(tmp_path / "teacher"))
    student = replace(load_network(tmp_path / "teacher"), timesteps=(999, 499))
    (package := tmp_path / "package").mkdir()
    save_network(package, student, student.network.state_dict())
    student.family.write_forms(package, student.timesteps, "float16")
    assert {tensor.dtype for tensor in load_file(package / "network.safetensors").values()} == {torch.float32}
    assert torch.equal(load(package).sample([0, 1], seed=3), student.sample([0, 1], seed=3))


def test_the_lines_of_the_model_card_run_as_printed_without_this_library(
    micro: Config, tmp_path: Path
) -> None:
    student = save_package(micro, (999, 499), tmp_path / "package")
    alone, with_library = re.findall(r"```python\n(.*?)```", student.family.usage((999, 499)), re.DOTALL)
    lines = alone.replace("path/of/this/folder", str(tmp_path / "package"))
    printed = run_without_library(f"{lines}\nprint(images.tolist())", tmp_path)
    assert json.loads(printed) == student.sample([0, 1, 2], seed=0).tolist()
    assert "dmd2.model" in with_library


def test_a_class_that_the_network_does_not_have_is_refused(micro: Config, tmp_path: Path) -> None:
    save_package(micro, (999,), tmp_path / "package")
    with pytest.raises(ValueError, match="class 3 is outside 0 to 2, the classes of the network"):
        load(tmp_path / "package").sample([0, 3])


def test_its_source_is_whole_and_imports_nothing_of_the_library(tmp_path: Path) -> None:
    text = one_file("dmd2.models.edm_student")
    imports = re.findall(r"^(?:from|import) (\w+)", text, re.MULTILINE)
    assert {name for name in imports if name not in sys.stdlib_module_names} == {"torch", "safetensors"}
    (tmp_path / "a.py").write_text(text)
    words = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F", str(tmp_path / "a.py")]
    assert subprocess.run(words, capture_output=True, text=True, check=False).stdout == "All checks passed!\n"


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"a": "from dmd2_b import helper\n\n\ndef helper_():\n    return helper, size\n\n\nsize = 1\n",
          "b": "size = 2\n\n\ndef helper():\n    return size\n"}, "size is defined in"),
        ({"a": "import dmd2_b\n\n\ndef f():\n    return dmd2_b.size\n", "b": "size = 2\n"}, "in another form"),
    ],
)  # fmt: skip
def test_what_cannot_be_put_into_one_file_is_said(
    files: dict[str, str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in files.items():
        (tmp_path / f"dmd2_{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("dmd2.models.one_file.is_ours", lambda name: name.startswith("dmd2"))
    with pytest.raises(ValueError, match=words):
        one_file("dmd2_a")


def test_the_package_of_a_run_has_it(made: Path, tmp_path: Path) -> None:
    package = tmp_path / "package"
    manifest = stages.package(str(made / "run"), str(made / "evaluation"), str(made / "gate"), str(package))
    assert LOADER in {file.path for file in manifest.files}
    assert f"| `{LOADER}` | " in (package / "README.md").read_text()
    assert torch.equal(load(package).sample([2, 0], seed=1), load_network(package).sample([2, 0], seed=1))
