"""Where a process runs, and the address of its randomness.

Nothing keeps a random state between steps: each step sets the seed again from (seed, rank, step), so a resumed
run draws what the uninterrupted one would have drawn. What decides how many network calls are made is drawn
from (seed, step) alone and is the same on all ranks, or sharded training would deadlock.
"""

from __future__ import annotations

import numpy as np
import torch
from accelerate import PartialState

from dmd2.errors import Refused


def device() -> torch.device:
    """The accelerator of this process, or the CPU."""
    state = PartialState()
    if state.num_processes > 1:
        raise Refused(
            f"started with {state.num_processes} processes; training runs in one process for now, start it without torchrun"
        )
    return torch.device(state.device)


def reseed(seed: int, rank: int, step: int) -> None:
    """Give this step of this rank its own random numbers."""
    torch.manual_seed(int(np.random.SeedSequence([seed, rank, step]).generate_state(1, np.uint64)[0]))


def draw_shared(seed: int, step: int, count: int) -> int:
    """A number in [0, count) that is the same on all ranks."""
    return int(np.random.default_rng([seed, step]).integers(count))
