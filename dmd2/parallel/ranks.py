"""The ranks of a run: start, rendezvous, device, mesh, and what the hosts agree on beside the devices.

Ranks exchange control values (stop signals, decisions, barriers) over gloo on the hosts, so that no rank waits for its
accelerator to learn them. Every decision about collectives must be the same on all ranks, or the run deadlocks.
"""

from __future__ import annotations

import atexit
import os
import re
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor
from torch.distributed import HashStore, Store, TCPStore  # type: ignore[attr-defined]
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from dmd2.errors import EXIT_RANK_LOST, Interrupted, Refused, brief

HOST_TIMEOUT = timedelta(days=1)
"""Timeout of operations between hosts: long, because the main process may be writing a result meanwhile."""
COLLECTIVE_TIMEOUT = timedelta(minutes=10)
"""Timeout of the collectives of a training step, and of the rendezvous."""
CONNECTION_LOST = re.compile(r"gloo|[Cc]onnection (closed|reset)|process group")
"""Matches the error messages of gloo and NCCL for a rank that has gone away."""
GLOO_EXIT_DELAY_S = 0.2
"""Seconds that a process sleeps at exit, so that gloo's threads release the tensors of their last operation. A thread that
needs the Python interpreter after its shutdown aborts the process, and the exit status is lost."""


def check_driver() -> None:
    """Raise Refused if there are GPUs that torch cannot use, instead of taking the CPU: the driver counts them even if it is too old."""
    if torch.cuda.device_count() and not torch.cuda.is_available():
        raise Refused(
            f"torch cannot use the GPUs of this machine, whose driver may be older than CUDA {torch.version.cuda} needs; update it, or "
            "set the environment variable CUDA_VISIBLE_DEVICES to nothing for the CPU"
        )


def device() -> torch.device:
    """The accelerator of this process, or the CPU. Raises Refused if the GPUs' driver does not fit torch."""
    check_driver()
    return torch.device(PartialState(cpu=not torch.accelerator.is_available(), timeout=HOST_TIMEOUT).device)


def is_emulated(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the device has no instructions for bfloat16, which is then slower than float32."""
    if dtype != torch.bfloat16:
        return False
    if device.type == "cuda":
        return not torch.cuda.is_bf16_supported(including_emulation=False)
    can = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return can.get("architecture") == "x86_64" and not (can["avx512_bf16"] or can["amx_bf16"])


@dataclass(frozen=True)
class World:
    """The ranks that torchrun started, seen from this one; or a single process without a process group."""

    device: torch.device
    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """Rank among the processes of this machine."""
    local_size: int = 1
    """Number of processes on this machine."""
    host_group: dist.ProcessGroup | None = None
    """gloo group of all ranks for control values on the hosts; None for a single process."""
    checkpoint_group: dist.ProcessGroup | None = None
    """A second gloo group, used by the background thread that writes checkpoints."""
    store: Store = field(default_factory=HashStore, compare=False, repr=False)
    """The store of the rendezvous, for what ranks tell each other while they are in a collective."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def local_rows(self, batch: int) -> range:
        """Indices of the rows of a global batch that this rank works on. Refuses a batch that ranks cannot share equally."""
        if batch % self.size:
            raise Refused(
                f"a batch of {batch} images cannot be divided among {self.size} processes; choose a multiple"
            )
        return range(self.rank, batch, self.size)

    def barrier(self) -> None:
        """Wait until all ranks are here."""
        if self.host_group:
            with self.interrupt_on_lost_rank():
                dist.barrier(self.host_group)

    def broadcast_int(self, number: int = 0) -> int:
        """Return the main process's number on every rank; the argument of the other ranks is ignored."""
        value = torch.tensor(number)
        if self.host_group:
            with self.interrupt_on_lost_rank():
                dist.broadcast(value, 0, self.host_group)
        return int(value)

    def publish(self, name: str, value: str) -> None:
        """Let the other ranks read a value of this one."""
        self.store.set(f"{name}/{self.rank}", value)

    def published(self, name: str) -> dict[int, str]:
        """The values that ranks have published last, by rank. No rank waits for another."""
        keys = {rank: f"{name}/{rank}" for rank in range(self.size)}
        return {rank: self.store.get(key).decode() for rank, key in keys.items() if self.store.check([key])}

    @contextmanager
    def interrupt_on_lost_rank(self) -> Iterator[None]:
        """Raise Interrupted, with an exit status of its own, if a collective inside fails because another
        rank has died."""
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
                EXIT_RANK_LOST,
            ) from error

    def shutdown(self) -> None:
        """Leave the process group, if there is one; that of a mesh of one too. Call it after a barrier, so that no rank waits for one
        that has left."""
        if dist.is_initialized():  # NCCL warns of a group that is left at the end of the process
            dist.destroy_process_group()

    def _abort_process_group(self) -> None:
        """Cancel device collectives that a lost rank will never answer, so that this process can end. gloo's fail by
        themselves."""
        if self.device.type != "cpu":
            dist.distributed_c10d._abort_process_group()

    @contextmanager
    def main_process_first(self) -> Iterator[None]:
        """Run the block on the main process, then on the other ranks: an input error is reported once."""
        if not self.is_main:
            self.barrier()
        yield
        if self.is_main:
            self.barrier()

    def all_reduce_sum(self, values: Tensor) -> Tensor:
        """Sum a CPU tensor over the ranks, in place."""
        if self.host_group:
            dist.all_reduce(values, group=self.host_group)
        return values

    def all_reduce_mean(self, values: Tensor) -> Tensor:
        """Mean of a CPU tensor over the ranks. Overwrites the argument."""
        return self.all_reduce_sum(values) / self.size

    def device_mesh(self, shards: int) -> DeviceMesh | None:
        """The mesh ("replica", "shard"), or ("shard",) if there is one replica; None for a single process.

        Args:
            shards: Ranks that share one copy of the weights; 0 = the processes of one machine.
        """
        if not self.host_group:
            return None
        shards = shards or self.local_size
        if self.size % shards:
            raise Refused(
                f"engine.shards is {shards}, which does not divide the {self.size} processes; choose a divisor"
            )
        if shards == self.size:
            return init_device_mesh(self.device.type, (shards,), mesh_dim_names=("shard",))
        shape = (self.size // shards, shards)
        return init_device_mesh(self.device.type, shape, mesh_dim_names=("replica", "shard"))

    def extend_collective_timeout(self, timeout: timedelta, mesh: DeviceMesh | None) -> None:
        """Let collectives of the mesh and of all ranks wait that long from now on."""
        groups = [*([dist.group.WORLD] if self.host_group else []), *(mesh.get_all_groups() if mesh else [])]
        # Before torch 2.13 it had a private name.
        set_timeout = getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout
        for group in groups:
            set_timeout(timeout, group)

    def mesh_of_one(self) -> DeviceMesh:
        """A mesh of this process alone. It opens a process group if there is none."""
        if not dist.is_initialized():
            dist.init_process_group(backends(self.device), store=HashStore(), rank=0, world_size=1)
        return init_device_mesh(self.device.type, (1,), mesh_dim_names=("shard",))


def backends(device: torch.device) -> str:
    """The backends of a process group: the device's for tensors there, and gloo for those of the hosts, which checkpoints need."""
    return (
        "gloo"
        if device.type == "cpu"
        else f"cpu:gloo,{device.type}:{dist.get_default_backend_for_device(device)}"
    )


def init_distributed() -> World:
    """Join the process group of the ranks that torchrun started; without torchrun, a world of one."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return World(device())
    check_driver()
    local_rank, local_size = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    here = torch.device(accelerator.type, local_rank) if accelerator else torch.device("cpu")
    if accelerator:
        torch.accelerator.set_device_index(local_rank)
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if not dist.is_initialized():  # also for one rank: accelerate would create a group without gloo
        store = _rendezvous_store(rank, size)
        dist.init_process_group(
            backends(here),
            timeout=COLLECTIVE_TIMEOUT,
            store=store,
            rank=rank,
            world_size=size,
            device_id=here if accelerator else None,  # NCCL then connects now, and guesses no device
        )
        atexit.register(time.sleep, GLOO_EXIT_DELAY_S)
    if size == 1:
        return World(here)
    store = dist.distributed_c10d._get_default_store()
    host_group, checkpoint_group = (dist.new_group(backend="gloo", timeout=HOST_TIMEOUT) for _ in range(2))
    assert isinstance(host_group, dist.ProcessGroup)
    assert isinstance(checkpoint_group, dist.ProcessGroup)
    return World(here, rank, size, local_rank, local_size, host_group, checkpoint_group, store)


def _rendezvous_store(rank: int, size: int) -> Store:
    """A store that is new with every start of the workers.

    torchrun keeps its own store when it restarts workers, and with it the addresses of the dead ones. So rank 0 opens
    another store and publishes its port in torchrun's. The other ranks retry until they can connect: a port left there
    by an earlier start refuses connections.
    """
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return TCPStore(host, port, size, rank == 0, COLLECTIVE_TIMEOUT)
    agent = TCPStore(host, port, size, False, COLLECTIVE_TIMEOUT)
    if rank == 0:
        store = TCPStore(host, 0, size, True, COLLECTIVE_TIMEOUT, wait_for_workers=False)
        agent.set("dmd2", str(store.port))
        return store
    deadline = time.monotonic() + COLLECTIVE_TIMEOUT.total_seconds()
    while True:
        published = int(agent.get("dmd2"))
        try:
            socket.create_connection((host, published), timeout=5).close()
            return TCPStore(host, published, size, False, COLLECTIVE_TIMEOUT, wait_for_workers=False)
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)
