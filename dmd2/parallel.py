"""The processes of a run, and how they share the weights: a mesh of (replicas, shards).

(1, 1) is one device, (W, 1) is DDP, (1, W) is FSDP and (R, S) is HSDP, all by FSDP2's `fully_shard`. Weights that learn
are float32 and divided among the shards, with their gradients and moments; what is computed with is gathered from
them, in the type it is computed in. `resident` networks are gathered whole and once per update of theirs: they stay
gathered through rollouts, passes and parts of a batch, and their gradients travel once. Weights that are frozen are
whole on every device, and never travel.
"""

from __future__ import annotations

import atexit
import os
import re
import socket
import time
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor, nn
from torch.distributed import Store, TCPStore  # type: ignore[attr-defined]
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_api import ReduceScatter
from torch.distributed.tensor import DTensor

from dmd2.errors import AGAIN, Interrupted, Refused, brief

PATIENCE = timedelta(days=1)
"""How long processes wait for each other where only one of them works, as when it writes a result."""
LOST = timedelta(minutes=10)
"""How long a collective of a step may take."""
GONE = re.compile(r"gloo|[Cc]onnection (closed|reset)|process group")
"""How the libraries say that the other end of a connection is gone."""
LET_GO_S = 0.2
"""How long a process waits before it ends, so that gloo's threads can let go of the tensors of their last work. One that
still needs the interpreter for it when that is gone aborts the process, and its exit status is lost."""


def device() -> torch.device:
    """The accelerator of this process, or the CPU."""
    return torch.device(PartialState(cpu=not torch.accelerator.is_available(), timeout=PATIENCE).device)


def emulates(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the device has no instructions for the type, so that float32 is the faster one."""
    if dtype != torch.bfloat16:
        return False
    if device.type == "cuda":
        return not torch.cuda.is_bf16_supported(including_emulation=False)
    can = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return can.get("architecture") == "x86_64" and not (can["avx512_bf16"] or can["amx_bf16"])


@dataclass(frozen=True)
class World:
    """The processes that torchrun started, or the only one."""

    device: torch.device
    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """Among those of this machine."""
    local_size: int = 1
    control: dist.ProcessGroup | None = None
    """For words between hosts, beside the work of the devices; none if there is only one process."""
    writers: dist.ProcessGroup | None = None
    """The same for what is written in the background."""

    @property
    def main(self) -> bool:
        return self.rank == 0

    def rows(self, batch: int) -> range:
        """The rows of the whole batch that are this process's."""
        if batch % self.size:
            raise Refused(
                f"a batch of {batch} images cannot be divided among {self.size} processes; choose a multiple"
            )
        return range(self.rank, batch, self.size)

    def wait(self) -> None:
        """For all the others."""
        if self.control:
            with self.interruptible():
                dist.barrier(self.control)

    def told(self, number: int = 0) -> int:
        """The number that the main process tells all."""
        told = torch.tensor(number)
        if self.control:
            with self.interruptible():
                dist.broadcast(told, 0, self.control)
        return int(told)

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """What is done here needs the others: to be told that one is gone is to be interrupted."""
        try:
            yield
        except RuntimeError as error:
            if not self.control or not (isinstance(error, dist.DistError) or GONE.search(str(error))):
                raise
            self._abandon()
            raise Interrupted(
                f"another process of this run was lost ({brief(error)}); started again, it goes on from its last checkpoint",
                AGAIN,
            ) from error

    def part(self) -> None:
        """From the others, when all have come to the end: none is left waiting for one that is gone."""
        if self.control:
            dist.destroy_process_group()

    def _abandon(self) -> None:
        """Give up what a lost process will never answer, so that this one can end; hosts give up by themselves."""
        if self.device.type != "cpu":
            dist.distributed_c10d._abort_process_group()

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """The main process first, so that a mistake is told once; then the others."""
        if not self.main:
            self.wait()
        yield
        if self.main:
            self.wait()

    def sum(self, values: Tensor) -> Tensor:
        """Over the processes, of numbers on the host."""
        if self.control:
            dist.all_reduce(values, group=self.control)
        return values

    def mean(self, values: Tensor) -> Tensor:
        """The same, divided by their number."""
        return self.sum(values) / self.size

    def meshed(self, shards: int) -> DeviceMesh | None:
        """The mesh with so many shards (0 = a machine's processes); none where no process group is."""
        if not self.control:
            return None
        shards = shards or self.local_size
        if self.size % shards:
            raise Refused(
                f"engine.shards is {shards}, which does not divide the {self.size} processes; choose a divisor"
            )
        if shards == self.size:  # no replicas to agree with
            return init_device_mesh(self.device.type, (shards,), mesh_dim_names=("shard",))
        shape = (self.size // shards, shards)
        return init_device_mesh(self.device.type, shape, mesh_dim_names=("replica", "shard"))


def join() -> World:
    """Meet the processes that torchrun started this one with; without any, be alone."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return World(device())
    local_rank, local_size = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    here = torch.device(accelerator.type, local_rank) if accelerator else torch.device("cpu")
    if accelerator:
        torch.accelerator.set_device_index(local_rank)
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if not dist.is_initialized():  # a single one too, or accelerate makes a group that knows no host
        backend = (
            f"cpu:gloo,{here.type}:{dist.get_default_backend_for_device(here)}" if accelerator else "gloo"
        )
        dist.init_process_group(backend, timeout=LOST, store=_meeting(rank, size), rank=rank, world_size=size)
        atexit.register(time.sleep, LET_GO_S)
    if size == 1:
        return World(here)
    control, writers = (dist.new_group(backend="gloo", timeout=PATIENCE) for _ in range(2))
    assert isinstance(control, dist.ProcessGroup)
    assert isinstance(writers, dist.ProcessGroup)
    return World(here, dist.get_rank(), dist.get_world_size(), local_rank, local_size, control, writers)


def _meeting(rank: int, size: int) -> Store:
    """Where the processes find each other, new with every start. torchrun keeps its own store when it starts them again,
    and with it the addresses of those that died; so the first one opens another, and tells by torchrun's where. What is
    found there from an earlier start leads to a port that nobody serves any more."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return TCPStore(host, port, size, rank == 0, LOST)
    agent = TCPStore(host, port, size, False, LOST)
    if rank == 0:
        store = TCPStore(host, 0, size, True, LOST, wait_for_workers=False)
        agent.set("dmd2", str(store.port))
        return store
    until = time.monotonic() + LOST.total_seconds()
    while True:
        served = int(agent.get("dmd2"))
        try:
            socket.create_connection((host, served), timeout=5).close()
            return TCPStore(host, served, size, False, LOST, wait_for_workers=False)
        except OSError:
            if time.monotonic() > until:
                raise
            time.sleep(0.1)


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
            gathered_apart.set_custom_reduce_scatter(AddedInFloat32())


def outermost(units: Sequence[nn.Module]) -> list[nn.Module]:
    """Those that no other one holds."""
    inner = {id(m) for unit in units for m in unit.modules() if m is not unit}
    return [unit for unit in units if id(unit) not in inner]


def innermost(units: Sequence[nn.Module]) -> list[nn.Module]:
    """Those that hold no other one."""
    ids = {id(unit) for unit in units}
    return [unit for unit in units if not any(id(m) in ids for m in unit.modules() if m is not unit)]


class AddedInFloat32(ReduceScatter):
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


def spread(network: nn.Module, weights: Mapping[str, Tensor], world: World) -> None:
    """Give the network the weights that the main process has, each process what it keeps of them; the others give none."""
    if not world.control:
        network.load_state_dict(weights)
        return
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(network, dict(weights) if world.main else {}, options=options)


def gathered(tensors: Mapping[str, Tensor], world: World) -> dict[str, Tensor]:
    """Whole tensors, on the host of the main process, one after the other; nothing on the others, which must take part."""
    found = {}
    for name, tensor in tensors.items():
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if world.main:
            found[name] = whole.cpu() if world.control else whole
    return found


def local(tensor: Tensor) -> Tensor:
    """What this process holds of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def reshard(module: nn.Module) -> None:
    """Let go of what was gathered: the parameters of the module are again the divided ones, those that learn."""
    for unit in _sharded(module):
        unit.reshard()


def reduces(module: nn.Module, now: bool) -> None:
    """Whether the next backward pass of a resident network, whose forward pass is done, adds its gradients up over the
    processes, or keeps them for a later one to do so. Others always do, for they have no room to keep them whole."""
    if isinstance(module, FSDPModule) and module in RESIDENT:
        module.set_requires_gradient_sync(now)
        if not now:
            for unit in _sharded(module):
                unit.unshard()  # one that a short pass did not reach must be there to keep nothing


def norm(gradients: Sequence[Tensor]) -> Tensor:
    """Of all of them together, over the shards."""
    total = nn.utils.get_total_norm(gradients, foreach=True)
    return total.full_tensor() if isinstance(total, DTensor) else total


def _sharded(module: nn.Module) -> Iterator[FSDPModule]:
    return (unit for unit in module.modules() if isinstance(unit, FSDPModule))
