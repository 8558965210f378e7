"""Steps of training on the simulated accelerator: `python -m tests.accelerator.steps NAME ...` prints what was seen as JSON.

NAME: an entry of tests.bench.gpu.TRAININGS, at tiny size.
"""

from __future__ import annotations

import gc
import json
import sys
from typing import Any

import torch

from dmd2.parallel.ranks import World
from dmd2.plan.hardware import GB
from dmd2.training import build
from tests.accelerator.device import NAME, count_waits
from tests.bench import gpu


def train(name: str, device: torch.device) -> dict[str, Any]:
    """Waits of the host in the second update of the student and its updates of the critic, and their memory beside the plan's."""
    case = gpu.TRAININGS[name]
    config, family = gpu.setting(case, tiny=True)
    gc.collect()  # of the training before
    before = torch.accelerator.memory_allocated(device)
    trainer = build.trainer(config, family, gpu.weights(family, device), World(device))
    cycle = config.distill.critic_updates
    reals = [gpu.batch(config, family, step, device) for step in range(2 * cycle)]
    for step in range(cycle):
        trainer.step(reals[step], step)
    torch.accelerator.reset_peak_memory_stats(device)
    with count_waits() as waits:
        losses = [trainer.step(reals[step], step) for step in range(cycle, 2 * cycle)]
    return {
        "finite": all(bool(value.isfinite()) for one in losses for value in one.values()),
        "waits": waits,
        "GB": (torch.accelerator.max_memory_allocated(device) - before) / GB,
        "plan GB": gpu.predicted(case, tiny=True, gpu="h100-80gb")["plan GB"],
    }


if __name__ == "__main__":
    here = torch.device(NAME, 0)
    seen: dict[str, Any] = {name: train(name, here) for name in sys.argv[1:]}
    print(json.dumps(seen | {"same-losses": gpu.same_losses(here)}))
