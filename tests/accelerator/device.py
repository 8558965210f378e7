"""A simulated accelerator: a torch device named `simulated` that calculates with the CPU's kernels.

It shows where the library is not device-agnostic on machines without a GPU. Operators that mix tensors of the host with the
device's fail as on a GPU, so do collectives on tensors of the host, each wait of the host for the device is counted, and so is
the memory of its tensors. It says nothing about speed, kernels, streams or rounding.

`python -m tests.accelerator.device FOLDER` builds it. A process with PYTHONPATH=FOLDER:. then has it as its accelerator, and so have the
processes that it starts: torch loads what the folder names as its backend.
"""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch.utils import backend_registration

NAME = "simulated"
LIBRARY = "simulated_device"


class Module(ModuleType):
    """What torch expects of `torch.simulated`, as of `torch.cuda`."""

    Stream, Event = torch.Stream, torch.Event

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return True

    def _is_in_bad_fork(self) -> bool:
        return False

    def device_count(self) -> int:
        return 8

    def current_device(self) -> int:
        return int(_built().current_device())

    def set_device(self, device: int | str | torch.device) -> None:
        index = torch.device(device).index if not isinstance(device, int) else device
        _built().set_device(index or 0)

    def synchronize(self, device: object = None) -> None:
        torch.accelerator.synchronize()

    def current_stream(self, device: object = None) -> torch.Stream:
        return torch.accelerator.current_stream()

    @contextmanager
    def stream(self, stream: torch.Stream | None) -> Iterator[None]:
        yield

    def manual_seed_all(self, seed: int) -> None:
        for index in range(self.device_count()):
            _built().default_generator(index).manual_seed(seed)

    manual_seed = manual_seed_all

    def get_rng_state(self, device: int | str | torch.device = NAME) -> torch.Tensor:
        return _built().default_generator(torch.device(device).index or 0).get_state()

    def set_rng_state(self, state: torch.Tensor, device: int | str | torch.device = NAME) -> None:
        _built().default_generator(torch.device(device).index or 0).set_state(state)

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


def build(folder: Path) -> None:
    """Compile the device into the folder, and let torch load it in processes that have the folder on their path."""
    from torch.utils import cpp_extension  # it needs all of torch

    folder.mkdir(parents=True, exist_ok=True)
    source = str(Path(__file__).with_name("device.cpp"))
    cpp_extension.load(
        LIBRARY, [source], extra_cflags=["-O0"], build_directory=str(folder), is_python_module=False
    )
    entry = folder / f"{LIBRARY}-1.dist-info"
    entry.mkdir(exist_ok=True)
    (entry / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {LIBRARY}\nVersion: 1\n")
    (entry / "entry_points.txt").write_text(f"[torch.backends]\n{NAME} = tests.accelerator.device:start\n")


def start() -> None:
    """Make it torch's accelerator of this process. Torch calls it at the end of its own import."""
    _built()
    backend_registration.rename_privateuse1_backend(NAME)
    torch._register_device_module(NAME, Module(f"torch.{NAME}"))
    backend_registration.generate_methods_for_privateuse1_backend()
    dist.Backend.register_backend(NAME, _collectives, devices=[NAME])
    # As for CUDA, a group of gloo alone exists for the device too.
    dist.Backend.backend_capability["gloo"].append(NAME)
    os.environ["ACCELERATE_TORCH_DEVICE"] = f"{NAME}:{os.environ.get('LOCAL_RANK', 0)}"


def _collectives(store: Any, rank: int, size: int, timeout: Any) -> Any:
    return _built().collectives(dist.ProcessGroupGloo(store, rank, size, timeout))


@cache
def _built() -> Any:
    return importlib.import_module(LIBRARY)


@contextmanager
def count_waits() -> Iterator[Counter[str]]:
    """Count how often the host waits for the device, by reason and place in the library."""
    found: Counter[str] = Counter()
    _built().on_wait(lambda reason: found.update([f"{reason}, {_place()}"]))
    try:
        yield found
    finally:
        _built().on_wait(lambda reason: None)


def _place() -> str:
    """The innermost line of the library that is being executed."""
    for frame, line in traceback.walk_stack(sys._getframe(2)):
        file = Path(frame.f_code.co_filename)
        if "dmd2" in file.parts:
            return f"{file.name}:{line} {frame.f_code.co_name}"
    return "outside of the library"


if __name__ == "__main__":
    build(Path(sys.argv[1]))
