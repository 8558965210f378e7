"""Named tensors in safetensors files, which hold data only: nothing is unpickled. And tensors on their way to a device."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shutil
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from dmd2.errors import Refused

os.umask(UMASK := os.umask(0))
DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8",
}  # fmt: skip
"""Names of types in safetensors files."""


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file; OSError if it cannot be written."""
    try:
        save_file({k: v.detach().contiguous() for k, v in tensors.items()}, path, metadata)
        path.chmod(0o666 & ~UMASK)  # safetensors makes files that only their owner can read
    except SafetensorError as error:
        raise write_error(error, path) from error


def stream_tensors(
    stream: BinaryIO,
    shapes: Mapping[str, tuple[torch.dtype, Sequence[int]]],
    tensor: Callable[[str], Tensor],
    metadata: Mapping[str, str],
) -> None:
    """Write a safetensors file to a stream, one tensor of the CPU at a time: no other copy of them is made.

    `safetensors.torch.save` puts the whole file together in memory, twice.

    Args:
        shapes: {name: (type, shape)} of all tensors.
        tensor: (name) -> the tensor. Called once each, wider types first, so that all are aligned.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    start = 0
    names = sorted(shapes, key=lambda name: (-shapes[name][0].itemsize, name))
    for name in names:
        dtype, shape = shapes[name]
        end = start + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    stream.write(struct.pack("<Q", len(text)) + text)
    for name in names:
        stream.write(tensor(name).detach().contiguous().view(-1).view(torch.uint8).numpy().data)


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


def convert_file(path: Path, target: Path, dtype: torch.dtype) -> None:
    """Copy a safetensors file with its floating-point tensors in another precision. If they have it, the bytes are copied."""
    with safe_open(path, "pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    if all(t.dtype == dtype for t in tensors.values() if t.is_floating_point()):
        shutil.copyfile(path, target)
        return
    save_tensors(
        {n: t.to(dtype) if t.is_floating_point() else t for n, t in tensors.items()}, target, metadata
    )


def check_finite(tensors: Mapping[str, Tensor], what: str) -> None:
    """Refuse weights that are infinite or NaN. `what` names the file in the message."""
    for name, tensor in tensors.items():
        if count := num_not_finite(tensor):
            raise Refused(
                f"{what} has {count} infinite or NaN values of {tensor.numel()} in {name!r:.150}, and a network with them draws "
                "nothing; get it again, or save it anew from a copy in float32"
            )


def num_not_finite(tensor: Tensor) -> int:
    """Number of values that are infinite or NaN."""
    # torch has no `isfinite` for 8-bit floats.
    values = tensor.float() if tensor.element_size() == 1 else tensor
    return int(values.numel() - values.isfinite().sum())


def check_files_finite(folder: Path) -> None:
    """Apply `check_finite` to all safetensors files in a folder; one tensor at a time is in memory."""
    for path in sorted(folder.rglob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - it is no dict
                check_finite({name: file.get_tensor(name)}, str(path.relative_to(folder)))


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to a device. From the CPU to a GPU the copy is asynchronous, which needs pinned memory: the host does
    not wait for the work that is queued on the GPU."""
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
