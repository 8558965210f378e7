"""Compares the memory that `dmd2 plan` predicts with the memory that steps take on this machine: `python -m tests.bench.plan`.

An EDM network in float32 on the CPU, in a fresh process. Predicted is the plan's memory of one device. Measured is the peak
of the resident memory during the steps, minus the resident memory before the trainer was built and after a smaller trainer
had made a step. By default the allocator returns free blocks to the system at once; with `--no-returned`, blocks that it
keeps are measured too. Prints both, writes runs/bench/plan.json, and fails if they differ by more than a tenth.
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
"""Constant of malloc.h: blocks of at least this size are mapped from the system."""
SIZE = (
    "family.network.channels=64", "family.network.multipliers=1,2,4", "family.network.blocks=1",
    "family.network.attention=8", "family.network.image_channels=3", "family.network.patch=1",
)  # fmt: skip
"""A network of 12.6 M weights on 32x32 pixels in colour."""


def main(
    batch: int = 16, checkpointing: str = "none", steps: int = 1, gan: bool = True, returned: bool = True
) -> None:
    """Measure steps; the first updates both student and critic.

    Args:
        batch: Images per step.
        checkpointing: none, selective or full.
        steps: Number of steps.
        gan: Whether there is a GAN term.
        returned: Let the allocator return free blocks to the system at once.
    """
    if returned:
        ctypes.CDLL("libc.so.6").mallopt(M_MMAP_THRESHOLD, 2**16)
    config = mid_size(batch, checkpointing, gan)
    parts = predicted(config)
    warm(config)
    before = resident_gb("VmRSS")
    measured = peak_of_steps(config, steps) - before
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
    """Predicted memory by part, in 1e9 bytes."""
    fam = make_family(config.family)
    made = prediction.make_plan(config, fam, "l40s-48gb", MeshShape(1, 1, 1))
    return {name: size / hardware.GB for name, size in made.memory.items()}


def warm(config: Config) -> None:
    """Let libraries load what they load at their first use, by a step of the recipe's own small network."""
    narrow = recipes.resolve(config.recipe, ["distill.batch=2"])
    peak_of_steps(narrow, 1)


def peak_of_steps(config: Config, steps: int) -> float:
    """Peak of the resident memory during the steps, in 1e9 bytes."""
    fam = make_family(config.family)
    trainer = build.trainer(config, fam, fam.network().state_dict(), ranks.World(torch.device("cpu")))
    free_memory()
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    batch = config.distill.batch
    cond = Conditioning(label=torch.zeros(batch, dtype=torch.int64))
    real = Batch(torch.randn(batch, *fam.shape), cond, Conditioning())
    for step in range(steps):
        trainer.step(real, step)
    most = resident_gb("VmHWM")
    del trainer, real
    free_memory()
    return most


def free_memory() -> None:
    """Return free memory to the system."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)


def resident_gb(field: str) -> float:
    """Resident memory of this process in 1e9 bytes: VmRSS is the current, VmHWM the peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    kilobytes = next(line.split()[1] for line in lines if line.startswith(f"{field}:"))
    return int(kilobytes) * 1024 / 1e9


if __name__ == "__main__":
    tyro.cli(main)
