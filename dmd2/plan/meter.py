"""Counts FLOPs and bytes of what runs inside, real or under FakeTensorMode."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop, sdpa_flop


def _of_tensors(formula: Callable[..., int]) -> Callable[..., int]:
    """A formula of torch, marked as one that takes tensors and not their shapes."""
    marked: Any = partial(formula)
    marked._get_raw = True
    return marked


CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _of_tensors(sdpa_flop),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _of_tensors(sdpa_backward_flop),
}
"""The attention of the CPU, which FlopCounterMode counts as nothing, by its formulas for that of a GPU."""
FORMULAS: dict[Any, Callable[..., int]] = {**flop_registry, **CPU_ATTENTION}
"""FLOPs by operator: those of FlopCounterMode, completed."""


CONVOLUTIONS = {torch.ops.aten.convolution, torch.ops.aten.convolution_backward}


class Meter(TorchDispatchMode):
    """Counts what is computed inside: FLOPs by the formulas of FlopCounterMode, and bytes of the storages that are alive."""

    def __init__(self, *outside: nn.Module) -> None:
        """What belongs to the modules is not counted."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = 0
        self.live = self.peak = 0
        """Bytes now, and at most."""
        self.gradients = self.peak_apart = 0
        """Bytes of gradients of weights now; bytes of all else at most."""
        self.reached: dict[int, int] = {}
        """Sizes of the weights that got a gradient, by id."""
        self.convolutions = 0
        """Those of the FLOPs."""
        self.kernels = 0
        """Operators that made something new."""
        self._sizes: dict[int, int] = {}
        self._weights = {id(p): p for module in outside for p in module.parameters()}
        for tensor in (*self._weights.values(), *(b for module in outside for b in module.buffers())):
            self._note(tensor, 0)
        learn = [p for p in self._weights.values() if p.requires_grad]
        self._hooks = [p.register_post_accumulate_grad_hook(self._collect) for p in learn]

    def release(self) -> None:
        """Forget the gradients, and watch them no more."""
        for hook in self._hooks:
            hook.remove()
        for weight in self._weights.values():
            weight.grad = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if formula := FORMULAS.get(func._overloadpacket):
            done = formula(*args, **kwargs, out_val=out)
            self.flops += done
            self.convolutions += done if func._overloadpacket in CONVOLUTIONS else 0
        new = [self._note(tensor) for tensor in tree_leaves(out) if isinstance(tensor, Tensor)]
        self.kernels += any(new)
        return out

    def _note(self, tensor: Tensor, size: int | None = None) -> bool:
        """Whether its storage is a new one."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes:
            return False
        self._sizes[key] = storage.nbytes() if size is None else size
        weakref.finalize(storage, self._forget, key)
        self.live += self._sizes[key]
        self.peak = max(self.peak, self.live)
        self.peak_apart = max(self.peak_apart, self.live - self.gradients)
        return True

    def _forget(self, key: int) -> None:
        self.live -= self._sizes.pop(key)

    def _collect(self, weight: Tensor) -> None:
        assert weight.grad is not None
        self.reached[id(weight)] = weight.numel()
        self.gradients += self._sizes.get(weight.grad.untyped_storage()._cdata, 0)


def norms_as_on_cuda(*networks: nn.Module) -> None:
    """Let autocast on the CPU compute norms in float32, as it does on CUDA, whose results are then kept so."""
    for norm in (module for network in networks for module in network.modules()):
        if isinstance(norm, nn.GroupNorm | nn.LayerNorm):
            norm.forward = partial(_in_float32, norm)  # type: ignore[method-assign]


def _in_float32(norm: nn.GroupNorm | nn.LayerNorm, x: Tensor) -> Tensor:
    if not torch.is_autocast_enabled("cpu"):
        return type(norm).forward(norm, x)  # type: ignore[arg-type]
    x = x.float()
    weight, bias = (None if p is None else p.float() for p in (norm.weight, norm.bias))
    if isinstance(norm, nn.GroupNorm):
        return F.group_norm(x, norm.num_groups, weight, bias, norm.eps)
    return F.layer_norm(x, norm.normalized_shape, weight, bias, norm.eps)
