"""Reading published files of tensors: safetensors, and pickles from which only tensors are read. No code in a file is run."""

from __future__ import annotations

import io
import pickle
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dmd2.errors import Refused, brief, near_miss


class TensorFile(NamedTuple):
    """The content of a file of tensors."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    """The metadata of a safetensors file."""


def read_tensor_file(path: Path) -> TensorFile:
    """Read a .safetensors, .bin, .pt or .pth file of tensors; pages are read from the disk when a tensor is used."""
    if require_file(path).suffix not in READERS:
        raise Refused(
            f"it is no file of weights by its suffix {path.suffix!r}: {near_miss(path.suffix, READERS)}"
        )
    with refuse_broken_file(f"file of tensors ({path.name})"):
        file = READERS[path.suffix](path)
    if not file.tensors:
        raise Refused("it holds no tensors; give a file of weights")
    for name, value in file.tensors.items():
        if not isinstance(value, Tensor):
            raise Refused(
                f"{name!r:.100} is a {type(value).__name__}, not a tensor; save the weights alone, by their names"
            )
    return file


def _safetensors(path: Path) -> TensorFile:
    with safe_open(path, "pt") as file:
        return TensorFile({name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {})  # noqa: SIM118


def _unpickle(path: Path) -> TensorFile:
    found = unpickle_tensors(path, mmap=zipfile.is_zipfile(path))
    if not isinstance(found, dict):
        raise Refused(
            f"it holds a {type(found).__name__}, not a dict of tensors; save the weights by their names"
        )
    return TensorFile({str(name): value for name, value in found.items()}, {})


def unpickle_tensors(source: Path | io.BytesIO, mmap: bool = False) -> Any:
    """Read a pickle of torch that contains nothing but tensors and plain containers."""
    try:
        return torch.load(source, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        name = re.search(r"GLOBAL (\S+)", str(error))
        raise Refused(
            f"it is a pickle that does more than hold tensors ({f'it names {name[1]:.100}' if name else 'or is broken'}), so nothing of it was run; convert it to safetensors where you trust it"
        ) from None


READERS = {".safetensors": _safetensors} | dict.fromkeys((".bin", ".pt", ".pth"), _unpickle)


def require_file(path: Path) -> Path:
    """The path, if it is a file."""
    if not path.is_file():
        raise Refused("it does not exist, or is no file; check the path")
    return path


@contextmanager
def name_file_in_errors(path: Path) -> Iterator[None]:
    """Begin the message of a Refused that is raised inside with the path."""
    try:
        yield
    except Refused as error:
        raise Refused(f"{path}: {error}") from None


@contextmanager
def refuse_broken_file(what: str) -> Iterator[None]:
    """Turn errors raised inside into a Refused that says the file is not a (complete) file of the kind `what`."""
    try:
        yield
    except (Refused, FileNotFoundError, PermissionError):
        raise
    except (Exception, SafetensorError) as error:  # a broken pickle raises anything
        raise Refused(f"it is no {what}, or not all of it ({brief(error)}); copy it again") from None
