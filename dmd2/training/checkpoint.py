"""Checkpoints: named objects <-> a folder of safetensors files, one per process, by torch.distributed.checkpoint.

What is saved is a dictionary of objects whose `state_dict` is tensors. They are copied at once and written while the
run goes on; a checkpoint is there when all processes have written theirs, which its manifest, the last file, says.
It can be loaded by any number of processes, and nothing in it is ever unpickled. What can be derived from the step
(learning rates, random numbers, position in the data) is not in it.
"""

from __future__ import annotations

import errno
import json
import re
import shutil
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load as load_together
from torch.distributed.checkpoint.state_dict_saver import async_save

from dmd2.errors import Refused
from dmd2.io.artifact import MANIFEST
from dmd2.io.local import fsync, sha256, write_text
from dmd2.io.staging import Draft
from dmd2.parallel.ranks import World


class Stateful(Protocol):
    def state_dict(self) -> dict[str, Tensor]: ...

    def load_state_dict(self, state: Any) -> object: ...


@dataclass
class Checkpoints:
    """The checkpoints of a run, as all its processes keep them together."""

    root: Path
    world: World
    keep: int
    """Newest ones that are kept."""
    place: Draft | None = None
    """The folder that `root` is in, if it may be another one on each machine."""
    best: int | None = None
    """The step of the one that is kept besides."""
    _writing: tuple[int, Future[Any]] | None = field(default=None, init=False)

    def save_async(self, step: int, objects: Mapping[str, Stateful]) -> None:
        """Write the state after `step` steps, in the background; wait for what is being written first."""
        self.wait_for_save()
        draft = self._draft(step)
        if self.world.is_main or self._gives:
            shutil.rmtree(draft, ignore_errors=True)
            draft.mkdir(parents=True)
        self.world.barrier()
        writer = HuggingFaceStorageWriter(str(draft), save_distributed=True)
        with warnings.catch_warnings(action="ignore"):
            future = async_save(
                _tensors(objects),
                storage_writer=writer,
                process_group=self.world.checkpoint_group,
                no_dist=not self.world.host_group,
            )
        self._writing = step, cast("Future[Any]", future)

    @property
    def written(self) -> bool:
        """Whether nothing is being written by this process."""
        return not self._writing or self._writing[1].done()

    def wait_for_save(self) -> bool:
        """Let what was begun be there, once all have written it; whether there was anything."""
        if not self._writing:
            return False
        (step, future), self._writing = self._writing, None
        draft = self._draft(step)
        try:
            with warnings.catch_warnings(action="ignore"):
                future.result()
        except CheckpointException as error:
            shutil.rmtree(draft, ignore_errors=True)
            raise _cause(error, draft) from None
        self.world.barrier()
        if self._gives and self.place:
            self.place.give(draft, self._name(step), self.world.rank)
            shutil.rmtree(draft)
        self.world.barrier()
        if self.world.is_main:
            self._publish(draft, step)
        self.world.barrier()
        return True

    @property
    def _gives(self) -> bool:
        """Whether this process brings what its machine has written to the bucket, where the main process is on another."""
        return bool(self.place and self.place.apart and self.world.local_rank == 0)

    def _name(self, step: int) -> str:
        return f"{self.root.name}/{step:08d}"

    def _publish(self, draft: Path, step: int) -> None:
        here = sorted(draft.glob("*.safetensors"))
        for path in here:
            fsync(path)
        files = {path.name: digest for path, digest in zip(here, _digests(here), strict=True)}
        given = self.place.receive(self._name(step)) if self.place else []
        files |= {Path(file.path).name: file.sha256 for file in given}
        write_text(draft / MANIFEST, json.dumps({"step": step, "processes": self.world.size, "files": files}))
        target = self.root / f"{step:08d}"
        shutil.rmtree(target, ignore_errors=True)
        draft.replace(target)
        for old in saved_steps(self.root)[: -self.keep]:
            if old != self.best:
                shutil.rmtree(self.root / f"{old:08d}")

    def _draft(self, step: int) -> Path:
        return self.root / f".{step:08d}.partial"


def saved_steps(root: Path) -> list[int]:
    """The steps with a complete checkpoint, oldest first."""
    return sorted(int(p.parent.name) for p in root.glob(f"[0-9]*/{MANIFEST}")) if root.is_dir() else []


def load(root: Path, step: int, objects: Mapping[str, Stateful], world: World | None = None) -> None:
    """Bring the objects, of all that are in the checkpoint, to the state they had after `step` steps."""
    folder = root / f"{step:08d}"
    if not world or world.local_rank == 0:
        _check(folder)
    tensors = _tensors(objects)
    there = {
        key for key in _reader(folder).read_metadata().state_dict_metadata if key.partition("/")[0] in objects
    }
    if odd := sorted(there ^ tensors.keys()):
        raise Refused(
            f"{folder} is of another network: {odd[0]} is on one side only; remove the run's folder and start anew"
        )
    alone = not (world and world.host_group)
    with warnings.catch_warnings(action="ignore"):
        load_together(tensors, storage_reader=_reader(folder), no_dist=alone)
    for name, thing in objects.items():
        prefix = f"{name}/"
        thing.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})


def load_object(folder: Path, name: str) -> dict[str, Tensor]:
    """The tensors of one object of a checkpoint; none if it has no such object."""
    found = _reader(folder).read_metadata().state_dict_metadata
    tensors: dict[str, Any] = {
        key: torch.empty(told.size, dtype=told.properties.dtype)  # type: ignore[union-attr]
        for key, told in found.items()
        if key.startswith(f"{name}/")
    }
    with warnings.catch_warnings(action="ignore"):
        load_together(tensors, storage_reader=_reader(folder), no_dist=True)
    return {key.removeprefix(f"{name}/"): value for key, value in tensors.items()}


def _cause(error: CheckpointException, draft: Path) -> BaseException:
    """What went wrong on one of the processes: the disk's own words, if it was the disk."""
    first = next(iter(error.failures.values()))[0]
    if isinstance(first, SafetensorError):
        number = re.search(r"os error (\d+)", str(first))
        return OSError(int(number[1]) if number else errno.EIO, f"cannot write ({first})", str(draft))
    return first


def _tensors(objects: Mapping[str, Stateful]) -> dict[str, Any]:
    return {
        f"{name}/{key}": value for name, thing in objects.items() for key, value in thing.state_dict().items()
    }


def _reader(folder: Path) -> HuggingFaceStorageReader:
    return HuggingFaceStorageReader(str(folder))


def _check(folder: Path) -> None:
    """Refuse what is not what was saved."""
    instead = f"remove {folder} to go on from the checkpoint before it"
    try:
        told: dict[str, str] = json.loads((folder / MANIFEST).read_text())["files"]
    except (ValueError, KeyError):
        raise Refused(f"{folder / MANIFEST} is damaged; {instead}") from None
    paths = [folder / name for name in told]
    if missing := [path for path in paths if not path.is_file()]:
        raise Refused(f"{missing[0]} is missing; {instead}")
    for path, digest in zip(paths, _digests(paths), strict=True):
        if digest != told[path.name]:
            raise Refused(f"{path} is not what was saved, it was truncated or changed; {instead}")


def _digests(paths: Sequence[Path]) -> list[str]:
    """SHA-256 of the files, several at a time."""
    with ThreadPoolExecutor() as pool:
        return list(pool.map(sha256, paths))
