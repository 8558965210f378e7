"""The processes of a run: how they find each other, wait for each other and agree."""

from __future__ import annotations

import atexit
import os
import re
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor
from torch.distributed import Store, TCPStore  # type: ignore[attr-defined]
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from dmd2.errors import AGAIN, Interrupted, Refused, brief

HOST_TIMEOUT = timedelta(days=1)
"""How long processes wait for each other where only one of them works, as when it writes a result."""
COLLECTIVE_TIMEOUT = timedelta(minutes=10)
"""How long a collective of a step may take."""
CONNECTION_LOST = re.compile(r"gloo|[Cc]onnection (closed|reset)|process group")
"""How the libraries say that the other end of a connection is gone."""
GLOO_EXIT_DELAY_S = 0.2
"""How long a process waits before it ends, so that gloo's threads can let go of the tensors of their last work. One that
still needs the interpreter for it when that is gone aborts the process, and its exit status is lost."""


def device() -> torch.device:
    """The accelerator of this process, or the CPU."""
    return torch.device(PartialState(cpu=not torch.accelerator.is_available(), timeout=HOST_TIMEOUT).device)


def is_emulated(device: torch.device, dtype: torch.dtype) -> bool:
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
    host_group: dist.ProcessGroup | None = None
    """For words between hosts, beside the work of the devices; none if there is only one process."""
    checkpoint_group: dist.ProcessGroup | None = None
    """The same for what is written in the background."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def local_rows(self, batch: int) -> range:
        """The rows of the whole batch that are this process's."""
        if batch % self.size:
            raise Refused(
                f"a batch of {batch} images cannot be divided among {self.size} processes; choose a multiple"
            )
        return range(self.rank, batch, self.size)

    def barrier(self) -> None:
        """For all the others."""
        if self.host_group:
            with self.interrupt_on_lost_rank():
                dist.barrier(self.host_group)

    def broadcast_int(self, number: int = 0) -> int:
        """The number that the main process tells all."""
        told = torch.tensor(number)
        if self.host_group:
            with self.interrupt_on_lost_rank():
                dist.broadcast(told, 0, self.host_group)
        return int(told)

    @contextmanager
    def interrupt_on_lost_rank(self) -> Iterator[None]:
        """What is done here needs the others: to be told that one is gone is to be interrupted."""
        try:
            yield
        except RuntimeError as error:
            if not self.host_group or not (
                isinstance(error, dist.DistError) or CONNECTION_LOST.search(str(error))
            ):
                raise
            self._abort_process_group()
            raise Interrupted(
                f"another process of this run was lost ({brief(error)}); started again, it goes on from its last checkpoint",
                AGAIN,
            ) from error

    def shutdown(self) -> None:
        """From the others, when all have come to the end: none is left waiting for one that is gone."""
        if self.host_group:
            dist.destroy_process_group()

    def _abort_process_group(self) -> None:
        """Give up what a lost process will never answer, so that this one can end; hosts give up by themselves."""
        if self.device.type != "cpu":
            dist.distributed_c10d._abort_process_group()

    @contextmanager
    def main_process_first(self) -> Iterator[None]:
        """The main process first, so that a mistake is told once; then the others."""
        if not self.is_main:
            self.barrier()
        yield
        if self.is_main:
            self.barrier()

    def all_reduce_sum(self, values: Tensor) -> Tensor:
        """Over the processes, of numbers on the host."""
        if self.host_group:
            dist.all_reduce(values, group=self.host_group)
        return values

    def all_reduce_mean(self, values: Tensor) -> Tensor:
        """The same, divided by their number."""
        return self.all_reduce_sum(values) / self.size

    def device_mesh(self, shards: int) -> DeviceMesh | None:
        """The mesh with so many shards (0 = a machine's processes); none where no process group is."""
        if not self.host_group:
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


def init_distributed() -> World:
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
        dist.init_process_group(
            backend,
            timeout=COLLECTIVE_TIMEOUT,
            store=_rendezvous_store(rank, size),
            rank=rank,
            world_size=size,
        )
        atexit.register(time.sleep, GLOO_EXIT_DELAY_S)
    if size == 1:
        return World(here)
    host_group, checkpoint_group = (dist.new_group(backend="gloo", timeout=HOST_TIMEOUT) for _ in range(2))
    assert isinstance(host_group, dist.ProcessGroup)
    assert isinstance(checkpoint_group, dist.ProcessGroup)
    return World(
        here, dist.get_rank(), dist.get_world_size(), local_rank, local_size, host_group, checkpoint_group
    )


def _rendezvous_store(rank: int, size: int) -> Store:
    """Where the processes find each other, new with every start. torchrun keeps its own store when it starts them again,
    and with it the addresses of those that died; so the first one opens another, and tells by torchrun's where. What is
    found there from an earlier start leads to a port that nobody serves any more."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return TCPStore(host, port, size, rank == 0, COLLECTIVE_TIMEOUT)
    agent = TCPStore(host, port, size, False, COLLECTIVE_TIMEOUT)
    if rank == 0:
        store = TCPStore(host, 0, size, True, COLLECTIVE_TIMEOUT, wait_for_workers=False)
        agent.set("dmd2", str(store.port))
        return store
    until = time.monotonic() + COLLECTIVE_TIMEOUT.total_seconds()
    while True:
        served = int(agent.get("dmd2"))
        try:
            socket.create_connection((host, served), timeout=5).close()
            return TCPStore(host, served, size, False, COLLECTIVE_TIMEOUT, wait_for_workers=False)
        except OSError:
            if time.monotonic() > until:
                raise
            time.sleep(0.1)
