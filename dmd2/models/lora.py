"""Low-rank updates (LoRA) of a frozen network (Hu et al. 2021), by peft; and several networks on one copy of the weights.

`share_tensors` makes a second network from the same tensors; only its modules are new. Student and critic can each have a
low-rank update on one shared base, which is also the teacher. No adapter is switched on or off between forward passes.
`MergedNetwork` is a plain network with the update in its weights, for calls without gradient.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import LoraConfig as PeftConfig
from peft import inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from dmd2.config import LoraConfig
from dmd2.parallel import sharding

ADAPTER = "default"
OVERSAMPLING = 16
"""Singular vectors that are computed beyond those that are kept, for accuracy."""


def share_tensors(network: nn.Module) -> nn.Module:
    """A second network whose parameters and buffers are the same tensors."""
    shared = {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())}
    return copy.deepcopy(network, shared)


def add_low_rank_update(base: nn.Module, targets: Sequence[str], settings: LoraConfig) -> nn.Module:
    """A network on the tensors of `base`, which is frozen, with a trainable low-rank update in float32.

    The update is 0 at first. `targets` are the ends of the names of the layers that get one.
    """
    base.requires_grad_(False)
    make: Any = PeftConfig  # takes a fraction too
    config = make(r=settings.rank, lora_alpha=settings.alpha, target_modules=list(targets))
    network = inject_adapter_in_model(config, share_tensors(base), ADAPTER)
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return network


class MergedNetwork:
    """A network without adapters whose weights are those of the base with a low-rank update merged, in the type of the base.

    For calls without gradient, which then launch the kernels of the plain network, half as many. Weights that the update does not
    change are the base's own tensors. The others are computed from the base and the gathered factors, when they are first asked for
    after `sharding.reshard`: once per optimizer step.
    """

    def __init__(self, base: nn.Module, low_rank: nn.Module, settings: LoraConfig) -> None:
        """`low_rank` is what `add_low_rank_update` made of `base`."""
        self.network = share_tensors(base)
        self.low_rank = low_rank
        self.scale = settings.alpha / settings.rank
        self.layers: list[tuple[Any, Any]] = []
        """(layer with a merged weight, layer with its base and its factors)."""
        for name, layer in low_rank.named_modules():
            if isinstance(layer, LoraLayer):
                plain: Any = self.network.get_submodule(name)
                plain.weight = nn.Parameter(torch.empty_like(plain.weight), requires_grad=False)
                self.layers.append((plain, layer))
        self.is_current = False
        sharding.ON_RESHARD[low_rank] = self._expire

    def weights(self) -> list[nn.Parameter]:
        """Those that are not the base's."""
        return [plain.weight for plain, _ in self.layers]

    def current(self) -> nn.Module:
        """The network with the update as it is now. All ranks must call it."""
        if not self.is_current:
            sharding.unshard(self.low_rank)
            self.merge()
            self.is_current = True
        return self.network

    @torch.no_grad()
    def merge(self) -> None:
        """weight = base + alpha / rank * up @ down, computed in float32."""
        # Always the same numbers, so that equal factors give equal weights on all ranks and after a restart.
        draw = torch.Generator(self.weights()[0].device).manual_seed(0)
        for plain, layer in self.layers:
            base, down, up = (
                one.weight.detach().flatten(1).float()
                for one in (layer.base_layer, layer.lora_A[ADAPTER], layer.lora_B[ADAPTER])
            )
            merged = torch.addmm(base, up, down, alpha=self.scale).view_as(plain.weight)
            rounds = plain.weight.dtype == torch.bfloat16
            plain.weight.copy_(round_stochastically(merged, draw) if rounds else merged)

    def _expire(self) -> None:
        self.is_current = False


def round_stochastically(x: Tensor, draw: torch.Generator) -> Tensor:
    """float32 -> float32 values that bfloat16 has, up or down with the probability that keeps the mean.

    The base is exact in bfloat16. To the nearest, updates of less than half its last digit would all be rounded to nothing, and the
    merged student would stay behind the one that learns.
    """
    bits = x.view(torch.int32)
    noise = torch.randint(0, 1 << 16, x.shape, generator=draw, dtype=torch.int32, device=x.device)
    return noise.add_(bits).bitwise_and_(-(1 << 16)).view(torch.float32)


def merge_low_rank_update(
    base: Mapping[str, Tensor], update: Mapping[str, Tensor], settings: LoraConfig
) -> dict[str, Tensor]:
    """The state dict of the plain network with the update merged: weight + alpha / rank * up @ down, in float32.

    `update` has the names of the trainable parameters: `<layer>.lora_A.default.weight` (down) and `lora_B` (up).
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
    """The update in the format of diffusers' `load_lora_weights`. alpha / rank is multiplied into `up`, so that no alpha is needed."""
    return {
        name.replace(f".{ADAPTER}.", "."): value
        * (settings.alpha / settings.rank if ".lora_B." in name else 1)
        for name, value in update.items()
    }


def extract_low_rank_update(
    base: Mapping[str, Tensor], whole: Mapping[str, Tensor], targets: Sequence[str], rank: int
) -> tuple[dict[str, Tensor], float]:
    """The low-rank update of `base` that comes closest to `whole`, another network of its form.

    By singular value decomposition of the change of each layer (Eckart and Young 1936), randomised (Halko et al. 2011).

    Args:
        targets: Ends of the names of the layers that get one, as for `add_low_rank_update`. Others stay those of `base`.

    Returns:
        The update as `export_low_rank_update` gives it, and the share of the squared change of all weights that it holds.
    """
    ends = tuple(f".{end}.weight" for end in targets)
    update: dict[str, Tensor] = {}
    changed = left = 0.0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for name, weight in whole.items():
            difference = weight.float() - base[name].float()
            changed += difference.square().sum().item()
            if name.endswith(ends):
                up, down = _factorize(difference.flatten(1), rank)
                layer, shape = name.removesuffix(".weight"), difference.shape
                update[f"{layer}.lora_A.weight"] = down.view(rank, *shape[1:])
                update[f"{layer}.lora_B.weight"] = up.view(len(up), rank, *(1 for _ in shape[2:]))
                difference = difference.flatten(1) - up @ down
            left += difference.square().sum().item()
    return update, 1 - left / changed if changed else 1.0


def _factorize(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(up (out, rank), down (rank, in)) whose product is the best approximation of a matrix (out, in); zeros beyond its own rank."""
    u, s, v = torch.svd_lowrank(matrix, q=min(rank + OVERSAMPLING, *matrix.shape), niter=4)
    root = s[:rank].sqrt()
    missing = max(0, rank - len(root))
    up, down = u[:, :rank] * root, (v[:, :rank] * root).T
    return nn.functional.pad(up, (0, missing)), nn.functional.pad(down, (0, 0, 0, missing))
