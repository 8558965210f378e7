"""The processes of a run, and how they share the weights: a mesh of (replicas, shards).

(1, 1) is one device, (W, 1) is DDP, (1, W) is FSDP and (R, S) is HSDP, all by FSDP2's `fully_shard`. Weights that learn
are float32 and divided among the shards, with their gradients and moments; what is computed with is gathered from
them, in the type it is computed in. `resident` networks are gathered whole and once per update of theirs: they stay
gathered through rollouts, passes and parts of a batch, and their gradients travel once. Weights that are frozen are
whole on every device, and never travel.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_api import ReduceScatter
from torch.distributed.tensor import DTensor

from dmd2.parallel.ranks import World

RESIDENT: weakref.WeakSet[nn.Module] = weakref.WeakSet()
"""Networks that stay gathered, and whose gradients stay whole until they are complete."""


def shard(
    network: nn.Module,
    units: Sequence[nn.Module],
    mesh: DeviceMesh,
    dtype: torch.dtype,
    *,
    resident: bool,
    whole: Iterable[nn.Parameter] = (),
) -> None:
    """Divide the weights of `network` among the shards of the mesh, in place: each unit on its own, then what is left of
    it. What is `whole` stays so on every process. Resident, only the outermost units are used: fewer, larger messages."""
    policy = MixedPrecisionPolicy(
        None if dtype == torch.float32 else dtype,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,  # in bfloat16 the timestep 999 is 1000 and 749 is 748
    )
    settings: dict[str, Any] = {
        "mesh": mesh,
        "mp_policy": policy,
        "reshard_after_forward": not resident,
        "ignored_params": set(whole),
    }
    for unit in outermost(units) if resident else units:
        fully_shard(unit, **settings)
    fully_shard(network, **settings)
    if resident:
        RESIDENT.add(network)
    for gathered_apart in _sharded(network):
        if resident:
            gathered_apart.set_reshard_after_backward(False, recurse=False)
        if dtype == torch.bfloat16 and mesh.shape[-1] > 1:
            gathered_apart.set_custom_reduce_scatter(Float32ReduceScatter())


def outermost(units: Sequence[nn.Module]) -> list[nn.Module]:
    """Those that no other one holds."""
    inner = {id(m) for unit in units for m in unit.modules() if m is not unit}
    return [unit for unit in units if id(unit) not in inner]


def innermost(units: Sequence[nn.Module]) -> list[nn.Module]:
    """Those that hold no other one."""
    ids = {id(unit) for unit in units}
    return [unit for unit in units if not any(id(m) in ids for m in unit.modules() if m is not unit)]


class Float32ReduceScatter(ReduceScatter):
    """Gradients travel as the backward pass made them, in bfloat16, and are added up in float32: half the bytes of a
    float32 reduction, and its sums."""

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
        sent = input_tensor.to(torch.bfloat16)
        got = torch.empty_like(sent)
        dist.all_to_all_single(got, sent, group=group)
        torch.sum(got.view(group.size(), -1), dim=0, dtype=torch.float32, out=output_tensor)
        if op == dist.ReduceOp.AVG:
            output_tensor.div_(group.size())


def broadcast_state_dict(network: nn.Module, weights: Mapping[str, Tensor], world: World) -> None:
    """Give the network the weights that the main process has, each process what it keeps of them; the others give none."""
    if not world.host_group:
        network.load_state_dict(weights)
        return
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(network, dict(weights) if world.is_main else {}, options=options)


def gather_full_tensors(tensors: Mapping[str, Tensor], world: World) -> dict[str, Tensor]:
    """Whole tensors, on the host of the main process, one after the other; nothing on the others, which must take part."""
    found = {}
    for name, tensor in tensors.items():
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if world.is_main:
            found[name] = whole.cpu() if world.host_group else whole
    return found


def local_tensor(tensor: Tensor) -> Tensor:
    """What this process holds of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def reshard(module: nn.Module) -> None:
    """Let go of what was gathered: the parameters of the module are again the divided ones, those that learn."""
    for unit in _sharded(module):
        unit.reshard()


def set_gradient_sync(module: nn.Module, now: bool) -> None:
    """Whether the next backward pass of a resident network, whose forward pass is done, adds its gradients up over the
    processes, or keeps them for a later one to do so. Others always do, for they have no room to keep them whole."""
    if isinstance(module, FSDPModule) and module in RESIDENT:
        module.set_requires_gradient_sync(now)
        if not now:
            for unit in _sharded(module):
                unit.unshard()  # one that a short pass did not reach must be there to keep nothing


def global_norm(gradients: Sequence[Tensor]) -> Tensor:
    """Of all of them together, over the shards."""
    total = nn.utils.get_total_norm(gradients, foreach=True)
    return total.full_tensor() if isinstance(total, DTensor) else total


def _sharded(module: nn.Module) -> Iterator[FSDPModule]:
    return (unit for unit in module.modules() if isinstance(unit, FSDPModule))
