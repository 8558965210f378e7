"""The memory that `dmd2 plan` predicts, against what steps really take on this machine: `python -m tests.bench.plan`.

An EDM network in float32, a fresh process on the CPU. Predicted is what the plan says of one device. Measured is the most
memory that is resident during the steps, less what was before the trainer was made and after another, small one had been
played. By default the allocator is told to give back at once what is free, so that resident is what lives;
`--no-returned` leaves it as it is, and what it keeps is measured too. Prints both, writes runs/bench/plan.json, and fails
if they differ by more than a tenth.
"""

from __future__ import annotations

import ctypes
import gc
import json
from pathlib import Path

import torch
import tyro

from dmd2 import recipes
from dmd2.batch import Batch, Conditioning
from dmd2.config import Config
from dmd2.io.local import write_text
from dmd2.models.family import make_family
from dmd2.parallel import ranks
from dmd2.plan import hardware, prediction
from dmd2.plan.traffic import MeshShape
from dmd2.training import build

LIMIT = 0.10
M_MMAP_THRESHOLD = -3
"""Of malloc.h: from so many bytes on, a block is the system's own."""
SIZE = (
    "family.network.channels=64", "family.network.multipliers=1,2,4", "family.network.blocks=1",
    "family.network.attention=8", "family.network.image_channels=3", "family.network.patch=1",
)  # fmt: skip
"""Of 12.6 M weights, on 32x32 pixels in colour."""


def main(
    batch: int = 16, checkpointing: str = "none", steps: int = 1, gan: bool = True, returned: bool = True
) -> None:
    """Some steps, of both trainables at the first.

    Args:
        batch: Images.
        checkpointing: none, selective or full.
        steps: To play.
        gan: Whether there is a GAN term.
        returned: Tell the allocator to give back to the system at once what is free; else it keeps some, as it likes.
    """
    if returned:
        ctypes.CDLL("libc.so.6").mallopt(M_MMAP_THRESHOLD, 2**16)
    config = mid_size(batch, checkpointing, gan)
    parts = predicted(config)
    warm(config)
    before = resident_gb("VmRSS")
    measured = play(config, steps) - before
    total = sum(parts.values())
    figures = {
        "batch": batch,
        "checkpointing": checkpointing,
        "returned": returned,
        "predicted_gb": round(total, 3),
        "measured_gb": round(measured, 3),
        "ratio": round(total / measured, 3),
        "parts_gb": {name: round(size, 3) for name, size in parts.items()},
    }
    write_text(Path("runs/bench/plan.json"), json.dumps(figures, indent=1) + "\n")
    print(json.dumps(figures, indent=1))
    if abs(total / measured - 1) > LIMIT:
        raise SystemExit(f"the prediction is {total / measured:.2f} times what was measured")


def mid_size(batch: int, checkpointing: str, gan: bool) -> Config:
    name = "edm-digits" if gan else "edm-digits-no-gan"
    changes = [f"distill.batch={batch}", f"engine.activation_checkpointing={checkpointing}"]
    return recipes.resolve(name, [*SIZE, *changes])


def predicted(config: Config) -> dict[str, float]:
    """In 1e9 bytes, by part."""
    fam = make_family(config.family)
    made = prediction.make_plan(config, fam, "l40s-48gb", MeshShape(1, 1, 1))
    return {name: size / hardware.GB for name, size in made.memory.items()}


def warm(config: Config) -> None:
    """Load what libraries load when they are first used, by a step of the recipe's own small network."""
    narrow = recipes.resolve(config.recipe, ["distill.batch=2"])
    play(narrow, 1)


def play(config: Config, steps: int) -> float:
    """The most memory that was resident during the steps, in 1e9 bytes."""
    fam = make_family(config.family)
    trainer = build.trainer(config, fam, fam.network().state_dict(), ranks.World(torch.device("cpu")))
    tidy()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    batch = config.distill.batch
    cond = Conditioning(label=torch.zeros(batch, dtype=torch.int64))
    real = Batch(torch.randn(batch, *fam.shape), cond, Conditioning())
    for step in range(steps):
        trainer.step(real, step)
    most = resident_gb("VmHWM")
    del trainer, real
    tidy()
    return most


def tidy() -> None:
    """Give back to the system what is free."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)


def resident_gb(field: str) -> float:
    """Of this process, in 1e9 bytes; VmRSS is now, VmHWM at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    kilobytes = next(line.split()[1] for line in lines if line.startswith(f"{field}:"))
    return int(kilobytes) * 1024 / 1e9


if __name__ == "__main__":
    tyro.cli(main)
