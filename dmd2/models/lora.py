"""Low-rank updates of a frozen network (Hu et al. 2021), by peft; and several networks on one copy of the weights.

`tied` makes a second network that has the very tensors of the first: only the modules are new. With an update of its
own on each, student and critic share one frozen base, and the teacher is the base itself: nothing is switched on or
off between passes, so no pass depends on what was done before it.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from peft import LoraConfig as PeftConfig
from peft import inject_adapter_in_model
from torch import Tensor, nn

from dmd2.config import LoraConfig

ADAPTER = "default"


def share_tensors(network: nn.Module) -> nn.Module:
    """Another network with the same tensors."""
    shared = {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())}
    return copy.deepcopy(network, shared)


def add_low_rank_update(base: nn.Module, targets: Sequence[str], settings: LoraConfig) -> nn.Module:
    """A network tied to the frozen `base`, with an update that learns, in float32, and starts as nothing."""
    base.requires_grad_(False)
    make: Any = PeftConfig  # takes a fraction too
    config = make(r=settings.rank, lora_alpha=settings.alpha, target_modules=list(targets))
    network = inject_adapter_in_model(config, share_tensors(base), ADAPTER)
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return network


def merge_low_rank_update(
    base: Mapping[str, Tensor], update: Mapping[str, Tensor], settings: LoraConfig
) -> dict[str, Tensor]:
    """Weights of a plain network: weight + alpha / rank * up @ down, in float32.

    `update` is named as the parameters that learn: `<layer>.lora_A.default.weight` (down) and `lora_B` (up).
    """
    whole = {name: weight.float() for name, weight in base.items()}
    for name, down in update.items():
        if f".lora_A.{ADAPTER}." in name:
            up = update[name.replace(".lora_A.", ".lora_B.")].float()
            layer = name.split(".lora_A.")[0] + ".weight"
            difference = up.flatten(1) @ down.float().flatten(1) * (settings.alpha / settings.rank)
            whole[layer] = whole[layer] + difference.reshape(whole[layer].shape).to(whole[layer].device)
    return whole


def export_low_rank_update(update: Mapping[str, Tensor], settings: LoraConfig) -> dict[str, Tensor]:
    """The update as `load_lora_weights` of diffusers reads it: the strength is in `up`, so that an alpha is not needed."""
    return {
        name.replace(f".{ADAPTER}.", "."): value
        * (settings.alpha / settings.rank if ".lora_B." in name else 1)
        for name, value in update.items()
    }
