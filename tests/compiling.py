"""A step in which rank 1 compiles for argv[1] seconds and rank 0 waits for it in a collective: `test_hang_watch.py` starts it.

At most argv[2] seconds may pass without compiling, and argv[3] with it.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from dmd2.parallel import ranks
from dmd2.training.hang_watch import hang_watch

logging.basicConfig(level=logging.INFO, format="%(message)s")
compiling_s, hang_s, compile_s = map(float, sys.argv[1:])
world = ranks.init_distributed()


def slow_on_rank_1(graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
    time.sleep(compiling_s if world.rank == 1 else 0)
    return graph.forward


step = torch.compile(lambda x: x + 1, backend=slow_on_rank_1)
spent: list[float] = []
with hang_watch(hang_s, compile_s, world, spent.append) as watch:
    x = step(torch.ones(1))
    dist.all_reduce(x)
    watch.reset()
assert x == 2 * world.size
if world.rank == 1:
    assert compiling_s <= spent[0] < compiling_s + 10
world.barrier()
print("made the step")
