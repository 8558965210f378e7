"""Checkpoints of optimizer state: by parameter name, and by position as version 0.1.0 wrote them."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dmd2.config import OptimizerConfig
from dmd2.io.local import sha256
from dmd2.training import checkpoint
from dmd2.training.checkpoint import Checkpoints, Stateful
from dmd2.training.optim import OptimizerState, Trainable, trainable
from tests import warm
from tests.conftest import ALONE


def trained(**sizes: int) -> Trainable:
    """A trainable with a parameter of each size, in this order, after an optimizer step."""
    module = nn.Module()
    for name, size in sizes.items():
        module.register_parameter(name, nn.Parameter(torch.randn(size)))
    student = trainable("student", module, OptimizerConfig(lr=0.1, ema=(0.5,)), 10)
    for p in module.parameters():
        p.grad = torch.randn_like(p)
    student.update(0)
    return student


def save(root: Path, objects: dict[str, Stateful]) -> None:
    checkpoints = Checkpoints(root, ALONE, keep=1)
    checkpoints.save_async(1, objects)
    checkpoints.wait_for_save()


def tensors(student: Trainable) -> dict[str, Tensor]:
    return {
        f"{o}/{k}": v.clone() for o, thing in student.state().items() for k, v in thing.state_dict().items()
    }


@dataclass
class Numbered:
    """An optimizer's state as version 0.1.0 saved it."""

    optimizer: torch.optim.Optimizer

    def state_dict(self) -> dict[str, Tensor]:
        slots = enumerate(self.optimizer.state.values())
        return {f"{i}.{key}": value for i, slot in slots for key, value in slot.items()}

    def load_state_dict(self, state: object) -> None:
        raise NotImplementedError


@pytest.mark.parametrize("order", ["ab", "ba"])
def test_optimizer_state_is_loaded_by_name_whatever_the_order_of_the_parameters(
    order: str, tmp_path: Path
) -> None:
    saved, loaded = trained(a=3, b=3), trained(**dict.fromkeys(order, 3))
    save(tmp_path, saved.state())
    before = tensors(loaded)
    checkpoint.load(tmp_path, 1, loaded.state())
    expected, found = tensors(saved), tensors(loaded)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[key], found[key]) for key in expected)
    assert not torch.equal(before["student.optimizer/a.exp_avg"], found["student.optimizer/a.exp_avg"])


def test_optimizer_state_saved_by_position_is_loaded_in_the_order_of_the_network(tmp_path: Path) -> None:
    saved, loaded = trained(b=3, a=3, c=2), trained(b=3, a=3, c=2)
    save(tmp_path, saved.state() | {"student.optimizer": Numbered(saved.optimizer)})
    checkpoint.load(tmp_path, 1, loaded.state())
    expected, found = tensors(saved), tensors(loaded)
    assert all(torch.equal(expected[key], found[key]) for key in expected)


def test_positions_of_another_order_are_refused_where_shapes_show_it(
    tmp_path: Path, refusal: Callable[..., str]
) -> None:
    saved, loaded = trained(a=3, b=2), trained(b=2, a=3)
    save(tmp_path, saved.state() | {"student.optimizer": Numbered(saved.optimizer)})
    said = refusal(lambda: checkpoint.load(tmp_path, 1, loaded.state()))
    assert "is of another network: student.optimizer/0.exp_avg is (3,) there and (2,) here" in said


def test_a_parameter_that_is_missing_is_named(tmp_path: Path, refusal: Callable[..., str]) -> None:
    save(tmp_path, trained(a=3).state())
    said = refusal(lambda: checkpoint.load(tmp_path, 1, trained(a=3, b=3).state()))
    assert "student.average0/shadow.b is on one side only; remove the run's folder and start anew" in said


def test_state_exists_before_the_first_step() -> None:
    student = trainable("student", nn.Linear(2, 1), OptimizerConfig(lr=0.1), 10)
    names = {f"{p}.{slot}" for p in ("weight", "bias") for slot in ("step", "exp_avg", "exp_avg_sq")}
    assert OptimizerState(student.optimizer).state_dict().keys() == names


def test_a_checkpoint_that_is_written_is_in_the_hosts_memory_once(tmp_path: Path) -> None:
    """And not once more as the bytes of its file. 64 tensors of a megabyte."""
    code = """
import sys, torch
from pathlib import Path
from tests.conftest import ALONE
from dmd2.training.checkpoint import Checkpoints
class Weights:
    def __init__(self, count): self.tensors = {str(i): torch.randn(2**18) for i in range(count)}
    def state_dict(self): return self.tensors
def resident(kind): return 1024 * int(Path("/proc/self/status").read_text().partition(kind + ":")[2].split()[0])
checkpoints = Checkpoints(Path(sys.argv[1]), ALONE, keep=1)
for step, count in ((1, 1), (2, 64)):  # the first imports what it takes
    weights = Weights(count)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = resident("VmRSS")
    checkpoints.save_async(step, {"weights": weights})
    checkpoints.wait_for_save()
print((resident("VmHWM") - before) / (64 * 2**20))
"""
    ended = subprocess.run(
        [warm.python(), "-c", code, str(tmp_path)],
        env=warm.environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    assert 0.9 < float(ended.stdout) < 1.3


def test_the_manifest_has_the_digests_of_the_files_without_reading_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "sha256", None)
    student = trained(a=3, b=1000)
    save(tmp_path, student.state())
    folder = tmp_path / "00000001"
    listed = json.loads((folder / "manifest.json").read_text())["files"]
    assert listed == {path.name: sha256(path) for path in folder.glob("*.safetensors")}
    assert {path.name for path in folder.iterdir()} == {*listed, "manifest.json"}
