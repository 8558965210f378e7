"""Exponential moving averages (EMA) of weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dmd2.parallel.sharding import local_tensor, sharded_like


class Ema:
    """shadow <- decay * shadow + (1 - decay) * weights, for the trainable weights of a network.

    The decay of update n (from 0) is min(decay, (1 + n) / (10 + n)), so that the first weights are forgotten soon.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self.shadow = {
            name: sharded_like(p, local_tensor(p).detach().clone())
            for name, p in network.named_parameters()
            if p.requires_grad
        }

    @torch.no_grad()
    def update(self, network: nn.Module) -> None:
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        weights = [local_tensor(p).detach() for p in network.parameters() if p.requires_grad]
        torch._foreach_lerp_([local_tensor(value) for value in self.shadow.values()], weights, 1 - decay)
        self.updates += 1

    def state_dict(self) -> dict[str, Tensor]:
        return {"updates": torch.tensor(self.updates), **{f"shadow.{k}": v for k, v in self.shadow.items()}}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.updates = int(state["updates"])
        for name, value in self.shadow.items():
            local_tensor(value).copy_(local_tensor(state[f"shadow.{name}"]))
