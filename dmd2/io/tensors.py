"""Named tensors in safetensors files, which hold data only: nothing is unpickled. And tensors on their way to a device."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dmd2.errors import Refused

os.umask(UMASK := os.umask(0))


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write a safetensors file; OSError if it cannot be written."""
    try:
        save_file({k: v.detach().contiguous() for k, v in tensors.items()}, path)
        path.chmod(0o666 & ~UMASK)  # safetensors makes files that only their owner can read
    except SafetensorError as error:
        raise write_error(error, path) from error


def write_error(error: SafetensorError, path: Path) -> OSError:
    """The error of the disk that safetensors reports only as text."""
    number = re.search(r"os error (\d+)", str(error))
    return OSError(int(number[1]) if number else errno.EIO, f"cannot write ({error})", str(path))


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file onto the CPU; refused if it is missing or damaged."""
    try:
        return load_file(path)
    except (SafetensorError, FileNotFoundError) as error:
        raise Refused(
            f"{path} cannot be read as safetensors ({error}); remove it to use the one before, or start anew"
        ) from None


def check_finite(tensors: Mapping[str, Tensor], what: str) -> None:
    """Raise Refused if one of the tensors has a value that is infinite or NaN."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.is_meta and (count := _not_finite(tensor)):
            raise Refused(
                f"{what} has {count} infinite or NaN values of {tensor.numel()} in {name!r:.150}; with them nothing can be "
                "drawn, so get it again, or save it anew from a copy in float32"
            )


def _not_finite(tensor: Tensor) -> int:
    values = tensor if tensor.element_size() > 1 else tensor.float()  # float8 has no isfinite
    return values.numel() - int(values.isfinite().sum())


def check_files_finite(folder: Path) -> None:
    """`check_finite` for every safetensors file in a folder, one after the other."""
    for path in sorted(folder.rglob("*.safetensors")):
        check_finite(load_tensors(path), str(path.relative_to(folder)))


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to a device. From the CPU to a GPU the copy is asynchronous, which needs pinned memory: the host does
    not wait for the work that is queued on the GPU."""
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
