"""Named tensors <-> a safetensors file: data, from which nothing is ever unpickled. And their way to a device."""

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
    try:
        save_file({k: v.detach().contiguous() for k, v in tensors.items()}, path)
        path.chmod(0o666 & ~UMASK)  # it is made for its owner only
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        raise OSError(
            int(number[1]) if number else errno.EIO, f"cannot write ({error})", str(path)
        ) from error


def load_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, FileNotFoundError) as error:
        raise Refused(
            f"{path} cannot be read as safetensors ({error}); remove it to use the one before, or start anew"
        ) from None


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """To a device. The host does not wait for what the device still has to do before, as it would for a copy of memory that
    the system may move."""
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
