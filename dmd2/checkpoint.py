"""Checkpoints: named objects <-> a folder of safetensors files.

What is saved is a dictionary of objects that have `state_dict` and `load_state_dict`. A checkpoint is complete if
its folder has its final name; nothing in it is ever unpickled. What can be derived from the step (learning rates,
random numbers, position in the data) is not in it.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from dmd2.storage import flush
from dmd2.tensors import load_tensors, save_tensors


class Stateful(Protocol):
    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Any) -> object: ...


def save(root: Path, step: int, objects: Mapping[str, Stateful], keep: int) -> None:
    """Write `root/<step>`, the state after `step` steps, and delete all but the newest `keep`."""
    draft = root / f".{step:08d}.partial"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        for name, thing in objects.items():
            save_tensors(_tensors(thing), draft / f"{name}.safetensors")
            flush(draft / f"{name}.safetensors")
    except BaseException:
        shutil.rmtree(draft)
        raise
    target = root / f"{step:08d}"
    shutil.rmtree(target, ignore_errors=True)
    draft.replace(target)
    for old in steps(root)[:-keep]:
        shutil.rmtree(root / f"{old:08d}")


def steps(root: Path) -> list[int]:
    """The steps with a complete checkpoint, oldest first."""
    return sorted(int(p.name) for p in root.glob("[0-9]*") if p.is_dir()) if root.is_dir() else []


def load(root: Path, step: int, objects: Mapping[str, Stateful]) -> None:
    """Bring the objects to the state they had after `step` steps."""
    for name, thing in objects.items():
        tensors = load_tensors(root / f"{step:08d}" / f"{name}.safetensors")
        if isinstance(thing, torch.optim.Optimizer):
            thing.load_state_dict(
                {"state": _unflat(tensors), "param_groups": thing.state_dict()["param_groups"]}
            )
        else:
            thing.load_state_dict(tensors)


def _tensors(thing: Stateful) -> dict[str, Tensor]:
    """The state as tensors; an optimizer's groups are left out, for the Config says them."""
    state = thing.state_dict()
    if not isinstance(thing, torch.optim.Optimizer):
        return state
    return {
        f"{index}.{key}": value for index, slots in state["state"].items() for key, value in slots.items()
    }


def _unflat(tensors: dict[str, Tensor]) -> dict[int, dict[str, Tensor]]:
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = value
    return state
