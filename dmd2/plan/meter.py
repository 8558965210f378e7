"""Counts the FLOPs and bytes of operators, on real tensors or under FakeTensorMode."""

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
    """A FLOP formula of torch, marked as one that takes tensors instead of shapes."""
    marked: Any = partial(formula)
    marked._get_raw = True
    return marked


CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _of_tensors(sdpa_flop),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _of_tensors(sdpa_backward_flop),
}
"""FLOP formulas of the CPU's attention operators, which FlopCounterMode does not count: those of the GPU's operators."""
FORMULAS: dict[Any, Callable[..., int]] = {**flop_registry, **CPU_ATTENTION}
"""FLOP formulas by operator: those of FlopCounterMode and of the CPU's attention."""


CONVOLUTIONS = {torch.ops.aten.convolution, torch.ops.aten.convolution_backward}
DEVICE, META = torch.ops.prim.device.default, torch.device("meta")
"""The question where a fake tensor is: two of three operators that a Meter sees. It is answered at once, as FakeTensorMode would."""
CASTS: dict[Any, int] = {torch.ops.aten._to_copy: 0, torch.ops.aten.copy_: 1}
"""Operators that may change the type of a tensor -> the position of that tensor among their arguments."""


class Meter(TorchDispatchMode):
    """While active, counts FLOPs by the formulas of FlopCounterMode, and bytes of the storages that are alive."""

    def __init__(self, *outside: nn.Module) -> None:
        """Parameters and buffers of the modules `outside` are not counted."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = 0
        self.convolution_flops = 0
        self.kernels = 0
        """Operators that allocated an output."""
        self.cast_bytes = 0
        """Bytes read and written by operators that change the type of a tensor."""
        self.live = self.peak = 0
        """Bytes now, and at most."""
        self.gradients = self.peak_without_gradients = 0
        """Bytes of gradients of weights now; bytes of everything else at most."""
        self.reached: set[nn.Parameter] = set()
        """Weights that got a gradient."""
        self._sizes: dict[int, int] = {}
        self._weights = {id(p): p for module in outside for p in module.parameters()}
        for tensor in (*self._weights.values(), *(b for module in outside for b in module.buffers())):
            self._sizes[tensor.untyped_storage()._cdata] = 0
        trained = [p for p in self._weights.values() if p.requires_grad]
        self._hooks = [p.register_post_accumulate_grad_hook(partial(self._collect, p)) for p in trained]

    def release(self) -> None:
        """Delete the gradients, and stop watching them."""
        for hook in self._hooks:
            hook.remove()
        for weight in self._weights.values():
            weight.grad = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is DEVICE:
            (fake,) = args
            return META if fake.fake_mode.in_kernel_invocation else fake.fake_device
        kwargs, packet = kwargs or {}, func._overloadpacket
        out = func(*args, **kwargs)
        if formula := FORMULAS.get(packet):
            done = formula(*args, **kwargs, out_val=out)
            self.flops += done
            self.convolution_flops += done if packet in CONVOLUTIONS else 0
        if (position := CASTS.get(packet)) is not None and args[position].dtype != out.dtype:
            self.cast_bytes += args[position].nbytes + out.nbytes
        leaves = [out] if isinstance(out, Tensor) else tree_leaves(out)
        new = [self._note(tensor) for tensor in leaves if isinstance(tensor, Tensor)]
        self.kernels += any(new)
        return out

    def _note(self, tensor: Tensor) -> bool:
        """Count the tensor's storage; False if it is counted already."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes:
            return False
        self._sizes[key] = storage.nbytes()
        weakref.finalize(storage, self._forget, key)
        self.live += self._sizes[key]
        self.peak = max(self.peak, self.live)
        self.peak_without_gradients = max(self.peak_without_gradients, self.live - self.gradients)
        return True

    def _forget(self, key: int) -> None:
        self.live -= self._sizes.pop(key)

    def _collect(self, parameter: nn.Parameter, _: Tensor) -> None:
        assert parameter.grad is not None
        self.reached.add(parameter)
        self.gradients += self._sizes.get(parameter.grad.untyped_storage()._cdata, 0)


def norms_as_on_cuda(*networks: nn.Module) -> None:
    """Let autocast on the CPU compute norms in float32 and keep their float32 outputs, as it does on CUDA."""
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
