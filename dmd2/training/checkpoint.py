"""Checkpoints: {name: object} <-> a folder of safetensors files, one per rank, by torch.distributed.checkpoint.

An object is anything whose `state_dict` is tensors. The tensors are copied at once, the only copy in the host's memory, and written
one after the other in the background while training continues; each rank computes the digest of its file while it writes it. A checkpoint exists when its manifest does, which is written last. It can be loaded on any number
of ranks, and nothing in it is unpickled. What follows from the step alone (learning rate, random numbers, position in
the data) is not saved.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import warnings
from collections.abc import Generator, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.state_dict_loader import load as load_in_place
from torch.distributed.checkpoint.state_dict_saver import async_save
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future as TorchFuture

from dmd2.errors import Refused
from dmd2.io.artifact import MANIFEST
from dmd2.io.local import sha256, write_text
from dmd2.io.staging import Draft
from dmd2.io.tensors import stream_tensors
from dmd2.parallel.ranks import World

FILE_NAME = "shard-{:05d}-model-00001-of-00001.safetensors"
"""Name of the file of a rank, counted from 1, as torch.distributed.checkpoint names it."""
SHARDING, SAVED_OFFSETS = "DCP_SHARDING_INFO", "saved_offsets"
"""Where a file's metadata says at which indices of the whole tensor each shard begins."""
DIGESTS = ".digests.json"
"""End of the names of lists of digests, one of each rank, in a checkpoint that is being written."""


class Stateful(Protocol):
    def state_dict(self) -> dict[str, Tensor]: ...

    def load_state_dict(self, state: Any) -> object: ...


@dataclass
class Checkpoints:
    """Saves the checkpoints of a run and deletes old ones. All ranks must call its methods together."""

    root: Path
    """Folder with a subfolder per step."""
    world: World
    keep: int
    """Number of newest checkpoints to keep."""
    draft: Draft | None = None
    """The unfinished artifact that contains `root`, if each machine may have its own copy of it."""
    best: int | None = None
    """Step of a checkpoint to keep although it is old."""
    _saving: tuple[int, Future[Any], HashingFileSystem] | None = field(default=None, init=False)

    def save_async(self, step: int, objects: Mapping[str, Stateful]) -> None:
        """Start writing the state after `step` steps in the background. Waits for a save that is still running."""
        self.wait_for_save()
        partial = self._partial_folder(step)
        if self.world.is_main or self._uploads:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        self.world.barrier()
        writer = StreamingWriter(str(partial), save_distributed=True)
        writer.fs = files = HashingFileSystem()
        with warnings.catch_warnings(action="ignore"):
            future = async_save(
                _tensors(objects),
                storage_writer=writer,
                process_group=self.world.checkpoint_group,
                no_dist=not self.world.host_group,
            )
        self._saving = step, cast("Future[Any]", future), files

    @property
    def is_saving(self) -> bool:
        """Whether this rank is still writing."""
        return bool(self._saving and not self._saving[1].done())

    def wait_for_save(self) -> bool:
        """Wait until all ranks have written, then publish the checkpoint. False if no save was started.

        Raises:
            OSError: The disk could not be written.
        """
        if not self._saving:
            return False
        (step, future, files), self._saving = self._saving, None
        partial = self._partial_folder(step)
        try:
            with warnings.catch_warnings(action="ignore"):
                future.result()
        except CheckpointException as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise _first_failure(error) from None
        write_text(partial / f".{self.world.rank}{DIGESTS}", json.dumps(files.digests()))
        self.world.barrier()
        if self._uploads and self.draft:
            self.draft.exchange.upload_part(
                partial, self._name(step), self.world.rank, _take_digests(partial)
            )
            shutil.rmtree(partial)
        self.world.barrier()
        if self.world.is_main:
            self._publish(partial, step)
        self.world.barrier()
        return True

    @property
    def _uploads(self) -> bool:
        """Whether this rank uploads its machine's files, because the main process is on another machine."""
        return bool(self.draft and self.draft.exchange.on_other_machine and self.world.local_rank == 0)

    def _publish(self, partial: Path, step: int) -> None:
        """Write the manifest, rename the folder to its final name, and delete old checkpoints."""
        digests = _take_digests(partial)
        names = sorted(path.name for path in partial.glob("*.safetensors"))
        files = {name: digests[name] for name in names}
        if self.draft:
            self.draft.digests |= {f"{self._name(step)}/{name}": digest for name, digest in files.items()}
            uploaded = self.draft.exchange.collect_parts(self._name(step))
            files |= {Path(file.path).name: file.sha256 for file in uploaded}
        manifest = {"step": step, "processes": self.world.size, "files": files}
        write_text(partial / MANIFEST, json.dumps(manifest))
        target = folder_of(self.root, step)
        shutil.rmtree(target, ignore_errors=True)
        partial.replace(target)
        for old in saved_steps(self.root)[: -self.keep]:
            if old != self.best:
                shutil.rmtree(folder_of(self.root, old))

    def _name(self, step: int) -> str:
        return f"{self.root.name}/{step:08d}"

    def _partial_folder(self, step: int) -> Path:
        return self.root / f".{step:08d}.partial"


class StreamingWriter(HuggingFaceStorageWriter):
    """Writes the staged tensors of this rank to its file one after the other, while the base class holds the file in memory
    twice. The files are the same."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> TorchFuture[list[WriteResult]]:
        items = {item.index.fqn: item for item in plan.items}
        chunks = {name: _chunk(item) for name, item in items.items()}
        done: TorchFuture[list[WriteResult]] = TorchFuture()
        if items:
            name = FILE_NAME.format(plan.storage_data["shard_index"])
            offsets = {name: {SAVED_OFFSETS: list(chunk.offsets)} for name, (_, chunk) in chunks.items()}
            with self.fs.create_stream(self.fs.concat_path(self.path, name), "wb") as stream:
                stream_tensors(
                    cast(BinaryIO, stream),
                    {key: (dtype, chunk.sizes) for key, (dtype, chunk) in chunks.items()},
                    lambda key: cast(Tensor, planner.resolve_data(items[key])),
                    {SHARDING: json.dumps(offsets), "DCP_VERSION": "1.0", "format": "pt"},
                )
                stream.flush()
                os.fsync(stream.fileno())
        done.set_result([])  # which only a checkpoint in one file would need
        return done


def _chunk(item: WriteItem) -> tuple[torch.dtype, ChunkStorageMetadata]:
    assert item.tensor_data, "objects of a checkpoint are tensors"
    return item.tensor_data.properties.dtype, item.tensor_data.chunk


class HashingFileSystem(FileSystem):
    """Computes the SHA-256 of files while they are written."""

    def __init__(self) -> None:
        self._hashes: dict[str, Any] = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Generator[io.IOBase, None, None]:
        with super().create_stream(path, mode) as stream:
            self._hashes[Path(path).name] = total = hashlib.sha256()
            yield cast(io.IOBase, _HashingStream(stream, total))

    def digests(self) -> dict[str, str]:
        """{name of the file: SHA-256}."""
        return {name: total.hexdigest() for name, total in self._hashes.items()}


class _HashingStream:
    """A stream that is written from its start to its end."""

    def __init__(self, stream: io.IOBase, total: Any) -> None:
        self._stream, self._total = stream, total

    def write(self, data: bytes) -> int:
        self._total.update(data)
        count: int = cast(Any, self._stream).write(data)
        return count

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _take_digests(partial: Path) -> dict[str, str]:
    """{name of a file: SHA-256} as the ranks of this machine have computed them; their lists are deleted."""
    found: dict[str, str] = {}
    for path in partial.glob(f".*{DIGESTS}"):
        found |= json.loads(path.read_text())
        path.unlink()
    return found


def folder_of(root: Path, step: int) -> Path:
    return root / f"{step:08d}"


def saved_steps(root: Path) -> list[int]:
    """Steps of the complete checkpoints, in ascending order."""
    return sorted(int(p.parent.name) for p in root.glob(f"[0-9]*/{MANIFEST}")) if root.is_dir() else []


def load(root: Path, step: int, objects: Mapping[str, Stateful], world: World | None = None) -> None:
    """Load the state after `step` steps into the objects. Other objects in the checkpoint are ignored.

    Raises:
        Refused: A file is missing or changed, or names or shapes of the tensors are not those of the objects.
    """
    folder = folder_of(root, step)
    if not world or world.local_rank == 0:
        _check_files(folder)
    tensors = _tensors(objects)
    saved = {key: shape for key, shape in _saved_shapes(folder).items() if key.partition("/")[0] in objects}
    saved_keys = _saved_keys(tensors, saved)
    _check_tensors(folder, {saved_keys[key]: value.shape for key, value in tensors.items()}, saved)
    with warnings.catch_warnings(action="ignore"):
        load_in_place(
            {saved_keys[key]: value for key, value in tensors.items()},
            storage_reader=_reader(folder),
            no_dist=not (world and world.host_group),
        )
    for name, thing in objects.items():
        prefix = f"{name}/"
        thing.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})


def load_object(folder: Path, name: str) -> dict[str, Tensor]:
    """The full tensors of one object of a checkpoint; an empty dict if it is not there."""
    found = _reader(folder).read_metadata().state_dict_metadata
    tensors: dict[str, Any] = {
        key: torch.empty(saved.size, dtype=saved.properties.dtype)
        for key, saved in found.items()
        if key.startswith(f"{name}/") and isinstance(saved, TensorStorageMetadata)
    }
    with warnings.catch_warnings(action="ignore"):
        load_in_place(tensors, storage_reader=_reader(folder), no_dist=True)
    return {key.removeprefix(f"{name}/"): value for key, value in tensors.items()}


def _saved_keys(keys: Iterable[str], saved: Iterable[str]) -> dict[str, str]:
    """{key: its key in the checkpoint}. They differ in checkpoints of version 0.1.0, which number the parameters of an
    optimizer, in the order of the network's, instead of naming them."""
    found, saved = {key: key for key in keys}, set(saved)
    positions: dict[str, dict[str, int]] = {}
    for key in found:
        name, _, slot = key.partition("/")
        parameter, _, kind = slot.rpartition(".")
        if f"{name}/0.exp_avg" in saved and f"{name}/0.exp_avg" not in found:
            position = positions.setdefault(name, {})
            found[key] = f"{name}/{position.setdefault(parameter, len(position))}.{kind}"
    return found


def _saved_shapes(folder: Path) -> dict[str, torch.Size]:
    metadata = _reader(folder).read_metadata().state_dict_metadata
    return {key: saved.size for key, saved in metadata.items() if isinstance(saved, TensorStorageMetadata)}


def _check_tensors(folder: Path, wanted: Mapping[str, torch.Size], saved: Mapping[str, torch.Size]) -> None:
    advice = "remove the run's folder and start anew"
    if one_sided := sorted(wanted.keys() ^ saved.keys()):
        raise Refused(f"{folder} is of another network: {one_sided[0]} is on one side only; {advice}")
    for key, shape in wanted.items():
        if shape != saved[key]:
            raise Refused(
                f"{folder} is of another network: {key} is {tuple(saved[key])} there and {tuple(shape)} here; {advice}"
            )


def _check_files(folder: Path) -> None:
    """Refuse a checkpoint whose files are not those that its manifest lists."""
    advice = f"remove {folder} to go on from the checkpoint before it"
    try:
        listed: dict[str, str] = json.loads((folder / MANIFEST).read_text())["files"]
    except (ValueError, KeyError):
        raise Refused(f"{folder / MANIFEST} is damaged; {advice}") from None
    paths = [folder / name for name in listed]
    if missing := [path for path in paths if not path.is_file()]:
        raise Refused(f"{missing[0]} is missing; {advice}")
    for path, digest in zip(paths, _digests(paths), strict=True):
        if digest != listed[path.name]:
            raise Refused(f"{path} is not what was saved, it was truncated or changed; {advice}")


def _first_failure(error: CheckpointException) -> BaseException:
    """The error of the first rank that failed; an OSError, if the disk was the reason."""
    return next(iter(error.failures.values()))[0]


def _tensors(objects: Mapping[str, Stateful]) -> dict[str, Any]:
    return {
        f"{name}/{key}": value for name, thing in objects.items() for key, value in thing.state_dict().items()
    }


def _reader(folder: Path) -> HuggingFaceStorageReader:
    return HuggingFaceStorageReader(str(folder))


def _digests(paths: Sequence[Path]) -> list[str]:
    """SHA-256 of files, several at a time."""
    with ThreadPoolExecutor() as pool:
        return list(pool.map(sha256, paths))
