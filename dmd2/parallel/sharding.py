"""Sharding of networks over a mesh of (replicas, shards) by FSDP2's `fully_shard`.

(1, 1) is one device, (W, 1) is DDP, (1, W) is FSDP and (R, S) is HSDP. Trainable weights are float32 and sharded, with
their gradients and optimizer state; an all-gather makes full copies for the forward pass, in the compute dtype.
*Resident* networks are all-gathered as a whole and once per optimizer step: they stay gathered through rollouts, passes
and micro-batches, and their gradients are reduced once. Frozen weights of resident networks are replicated.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_api import ReduceScatter
from torch.distributed.tensor import DTensor

from dmd2.parallel.ranks import World

RESIDENT: weakref.WeakSet[nn.Module] = weakref.WeakSet()
"""Networks that stay all-gathered, and whose full gradients accumulate until the last pass reduces them."""
ON_RESHARD: weakref.WeakKeyDictionary[nn.Module, Callable[[], None]] = weakref.WeakKeyDictionary()
"""What else to do when a network is resharded: whatever was computed from its gathered weights is out of date then."""


def shard(
    network: nn.Module,
    units: Sequence[nn.Module],
    mesh: DeviceMesh,
    dtype: torch.dtype,
    *,
    resident: bool,
    ignored: Iterable[nn.Parameter] = (),
    offload: bool = False,
) -> None:
    """Shard the parameters of `network` over the mesh, in place.

    Args:
        units: Modules that are gathered as one: each gets its own FSDP group, and the rest of the network another. A
            resident network uses only the outermost ones, for fewer and larger messages.
        dtype: Of the gathered weights; gradients are reduced in float32.
        resident: Keep the gathered weights after forward and backward, until `reshard`.
        ignored: Parameters that stay replicated.
        offload: Keep the shards in the host's memory, pinned where the mesh is of GPUs. Not for resident networks.
    """
    policy = MixedPrecisionPolicy(
        None if dtype == torch.float32 else dtype,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,  # in bfloat16 the timestep 999 is 1000 and 749 is 748
    )
    settings: dict[str, Any] = {
        "mesh": mesh,
        "mp_policy": policy,
        "reshard_after_forward": not resident,
        "ignored_params": set(ignored),
    }
    if offload:
        settings["offload_policy"] = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda")
    for unit in outermost(units) if resident else units:
        fully_shard(unit, **settings)
    fully_shard(network, **settings)
    if resident:
        RESIDENT.add(network)
    for module in _fsdp_modules(network):
        if resident:
            module.set_reshard_after_backward(False, recurse=False)
        if dtype == torch.bfloat16 and mesh.shape[-1] > 1:
            module.set_custom_reduce_scatter(Float32ReduceScatter())


def prefetch_next_unit(network: nn.Module, units: Sequence[nn.Module], decoder_start: nn.Module) -> None:
    """Gather each unit of a network that is not resident while the unit before it computes, from the second whole call on.

    The first one shows in which order the units are called. No gather crosses the bottleneck, where some passes stop: those of
    `decoder_start`, the first module after it, would be for nothing. In the backward pass FSDP2 does the same by itself.
    """
    order: list[nn.Module] = []
    decoder = set(decoder_start.modules())
    hooks = [unit.register_forward_pre_hook(lambda module, _: order.append(module)) for unit in units]

    def connect(*_: object) -> None:
        if len(order) < len(units):  # a pass that stopped at the bottleneck
            order.clear()
            return
        for hook in hooks:
            hook.remove()
        for unit, following in pairwise(order):
            if not (following in decoder and unit not in decoder):
                cast(FSDPModule, unit).set_modules_to_forward_prefetch([cast(FSDPModule, following)])

    hooks.append(network.register_forward_hook(connect))


def outermost(units: Sequence[nn.Module]) -> list[nn.Module]:
    """The units that are inside no other unit."""
    inner = {id(m) for unit in units for m in unit.modules() if m is not unit}
    return [unit for unit in units if id(unit) not in inner]


def innermost(units: Sequence[nn.Module]) -> list[nn.Module]:
    """The units that contain no other unit."""
    ids = {id(unit) for unit in units}
    return [unit for unit in units if not any(id(m) in ids for m in unit.modules() if m is not unit)]


class Float32ReduceScatter(ReduceScatter):
    """Reduce-scatter that sends bfloat16 and sums in float32: an all-to-all of the gradients as the backward pass made
    them, then a local sum. Half the bytes of a float32 reduce-scatter, without its loss of digits in bfloat16 sums."""

    def allocate(self, size: Sequence[Any], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> None:
        send = input_tensor.to(torch.bfloat16)
        receive = torch.empty_like(send)
        dist.all_to_all_single(receive, send, group=group)
        torch.sum(receive.view(group.size(), -1), dim=0, dtype=torch.float32, out=output_tensor)
        if op == dist.ReduceOp.AVG:
            output_tensor.div_(group.size())


def broadcast_state_dict(network: nn.Module, weights: Mapping[str, Tensor], world: World) -> None:
    """Load the main process's full state dict; every rank keeps its shards. Other ranks may pass an empty mapping."""
    if not (world.host_group or is_sharded(network.parameters())):
        network.load_state_dict(weights)
        return
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=bool(world.host_group))
    set_model_state_dict(network, dict(weights) if world.is_main else {}, options=options)


def gather_full_tensors(tensors: Mapping[str, Tensor], world: World) -> dict[str, Tensor]:
    """Full tensors on the CPU of the main process, gathered one at a time; an empty dict on the other ranks. All ranks
    must call it."""
    full_tensors = {}
    for name, tensor in tensors.items():
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if world.is_main:
            full_tensors[name] = full.cpu() if world.host_group else full
    return full_tensors


def local_tensor(tensor: Tensor) -> Tensor:
    """This rank's shard of a DTensor, or the tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def reshard(module: nn.Module) -> None:
    """Free the gathered weights: the module's parameters are again the sharded float32 ones that the optimizer updates."""
    for fsdp_module in _fsdp_modules(module):
        fsdp_module.reshard()
    for one in module.modules():
        if one in ON_RESHARD:
            ON_RESHARD[one]()


def unshard(module: nn.Module) -> None:
    """Gather the weights, as a forward pass does. All ranks must call it."""
    for fsdp_module in _fsdp_modules(module):
        fsdp_module.unshard()


def set_gradient_sync(module: nn.Module, enabled: bool) -> None:
    """Whether the next backward pass of a resident network reduces its gradients over the ranks, or accumulates full ones
    for a later pass to reduce. Call it after the forward pass. Networks that are not resident reduce in every pass,
    because they have no memory for full gradients."""
    if isinstance(module, FSDPModule) and module in RESIDENT:
        module.set_requires_gradient_sync(enabled)
        if not enabled:
            unshard(module)  # a module that the forward pass skipped must be gathered to accumulate nothing


def sharded_like(tensor: Tensor, shard: Tensor) -> Tensor:
    """`shard` as this rank's shard of a DTensor with the rows and layout of `tensor`; of a plain tensor, `shard` itself.

    `torch.zeros_like(tensor)` or `tensor.clone()` look up how a DTensor's operation is sharded, once per shape and process.
    """
    if not isinstance(tensor, DTensor):
        return shard
    layout, shape, stride = (tensor.device_mesh, tensor.placements), tensor.shape, tensor.stride()
    if shard.shape[1:] != shape[1:]:
        shape = torch.Size([*shape[:1], *shard.shape[1:]])
        stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(shard, *layout, run_check=False, shape=shape, stride=stride)


def is_sharded(parameters: Iterable[nn.Parameter]) -> bool:
    """Whether they are DTensors. Those of a module are so all or none."""
    return any(isinstance(p, DTensor) for p in parameters)


def local_leaf(parameter: nn.Parameter) -> Tensor:
    """This rank's shard of a parameter as a tensor of its own, on the same memory, with this rank's shard of the gradient."""
    leaf = local_tensor(parameter).detach()
    leaf.grad = None if parameter.grad is None else local_tensor(parameter.grad)
    return leaf


@torch.no_grad()
def global_norm(gradients: Sequence[Tensor]) -> Tensor:
    """L2 norm of all gradients together, over all shards; a scalar on the device."""
    sharded = [g for g in gradients if isinstance(g, DTensor)]
    if not sharded:
        return nn.utils.get_total_norm(gradients, foreach=True)
    square = nn.utils.get_total_norm([g.to_local() for g in sharded], foreach=True).square()
    for group in _shard_groups(sharded):
        dist.all_reduce(square, group=group)
    whole = [g for g in gradients if not isinstance(g, DTensor)]
    return (square + nn.utils.get_total_norm(whole, foreach=True).square()).sqrt() if whole else square.sqrt()


def _shard_groups(tensors: Sequence[DTensor]) -> list[dist.ProcessGroup]:
    """The process groups over whose ranks all of the tensors are sharded. They are sharded alike."""
    (layout,) = {(t.device_mesh, t.placements) for t in tensors}
    mesh, placements = layout
    return [mesh.get_group(i) for i, p in enumerate(placements) if p.is_shard() and mesh.size(i) > 1]


def _fsdp_modules(module: nn.Module) -> Iterator[FSDPModule]:
    return (m for m in module.modules() if isinstance(m, FSDPModule))
