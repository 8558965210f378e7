"""The plan counts the messages that a real step of the real trainer sends over a mesh of several GPUs."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from packaging.version import Version
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.debug import CommDebugMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from dmd2.batch import Batch, Conditioning
from dmd2.config import Config
from dmd2.models.family import make_family
from dmd2.parallel import sharding
from dmd2.parallel.ranks import World
from dmd2.plan import passes, traffic
from dmd2.plan.traffic import MeshShape
from dmd2.training import build, memory
from tests.conftest import ALONE
from tests.plan.test_plan import digits

NEEDS_COUNTER = pytest.mark.skipif(
    Version(torch.__version__) < Version("2.14"),
    reason="CommDebugMode of torch 2.11 fails on any module, even one Linear",
)


def test_collectives_of_resident_networks_are_one_gather_and_one_reduction_per_unit_and_update(
    micro: Config,
) -> None:
    config, fam = digits("distill.batch=8"), make_family(micro.family)
    fake = passes.fake_trainer(config, fam)
    sent = traffic.traffic(fake, MeshShape(8, 4, 4), True, passes.measure_passes(fake, 1), 1)
    student = fake.nets.student
    units = len(passes.shard_units(sharding.outermost(fam.blocks(student)), student))
    calls = units / 5 + units + 1  # student, critic, head
    weights = memory.num_weights(student) * 6 / 5 + memory.num_weights(fam.head())
    assert sent[traffic.GATHER] == pytest.approx((calls, 4 * weights * 3 / 4))
    assert sent[traffic.SCATTER] == pytest.approx((calls, 4 * weights * 3 / 4))
    # Between two replicas a shard is sent there and back; and there are two gradient norms.
    assert sent[traffic.REDUCE] == pytest.approx((calls + 6 / 5, 4 * weights / 4 + 4 * 6 / 5))


@NEEDS_COUNTER
@pytest.mark.parametrize("weights", ["resident", "sharded"])
@pytest.mark.parametrize(
    "changes",
    [
        ("-gan",),
        (),
        ("distill.gan.reuse_denoising_pass=True",),
        ("engine.micro_batch=1", "engine.activation_checkpointing=full"),
        ("engine.offload_teacher=True",),
    ],
)
@pytest.mark.parametrize(("gpus", "per_node"), [(8, 4), (4, 1)])
def test_calls_of_a_turn_are_those_of_the_real_trainer(
    weights: str, changes: tuple[str, ...], gpus: int, per_node: int
) -> None:
    """In a process group that sends nothing."""
    config = digits(
        f"engine.weights={weights}", f"distill.batch={2 * gpus}", "distill.critic_updates=2", *changes
    )
    calls = collectives_of_a_turn(config, gpus, per_node)
    fake, rows = passes.fake_trainer(config, make_family(config.family)), config.engine.micro_batch or 2
    with passes.activation_checkpointing(fake, config.engine.activation_checkpointing):
        costs = passes.measure_passes(fake, rows)
    sent = traffic.traffic(fake, MeshShape(gpus, per_node, per_node), weights == "resident", costs, rows)
    turn = config.distill.critic_updates
    found = {
        kind: turn * sent.get(kind, (0, 0))[0] for kind in (traffic.GATHER, traffic.SCATTER, traffic.REDUCE)
    }
    assert found == pytest.approx(calls)


@NEEDS_COUNTER
def test_a_unit_is_gathered_while_the_one_before_it_computes_and_none_beyond_the_bottleneck_for_nothing() -> (
    None
):
    config = digits("engine.weights=sharded", "distill.batch=8")
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    try:
        fam = make_family(config.family)
        network, mesh = fam.network(), init_device_mesh("cpu", (4,))
        units: Any = fam.blocks(network)
        sharding.shard(network, units, mesh, torch.float32, resident=False)
        sharding.prefetch_next_unit(network, units, cast(Any, network).decoder_start)
        inputs = (
            torch.zeros(2, *fam.shape),
            torch.zeros(2),
            Conditioning(label=torch.zeros(2, dtype=torch.int64)),
        )
        started: list[int] = []
        counters: list[CommDebugMode] = []
        for unit in units:
            unit.register_forward_hook(
                lambda *_: started.append(sum(counters[-1].get_comm_counts().values())), prepend=True
            )
        calls = []
        for features_only in (True, False, False, True):
            counters.append(CommDebugMode())
            with torch.no_grad(), counters[-1]:
                network(*inputs, features_only=features_only)
            calls.append(started.copy())
            started.clear()
    finally:
        dist.destroy_process_group()
    # The network's own weights are gathered first, then a unit each. A unit with weights has the next one's gathered too.
    without, prefetched, early = calls[1], calls[2], calls[3]
    last = len(calls[0]) - 1
    assert without == list(range(2, len(units) + 2))
    assert prefetched[-1] == without[-1]
    assert early == prefetched[: last + 1] == [*range(3, last + 3), last + 2]
    assert prefetched[last + 1 : -1] == [one + 1 for one in without[last + 1 : -1]]


def collectives_of_a_turn(config: Config, gpus: int, per_node: int) -> dict[str, int]:
    calls = dict.fromkeys((traffic.GATHER, traffic.SCATTER, traffic.REDUCE), 0)
    kinds = {"allgather": traffic.GATHER, "reduce_scatter": traffic.SCATTER, "reduce": traffic.REDUCE}
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=gpus)
    try:
        world = World(ALONE.device, 0, gpus, 0, per_node, dist.group.WORLD)
        fam = make_family(config.family)
        trainer = build.trainer(config, fam, fam.network().state_dict(), world)
        rows = config.distill.batch // gpus
        cond = Conditioning(label=torch.zeros(rows, dtype=torch.int64))
        real = Batch(torch.zeros(rows, *fam.shape), cond, Conditioning())
        trainer.step(real, 0)
        for step in range(1, 1 + config.distill.critic_updates):
            with CommDebugMode() as counter:
                trainer.step(real, step)
            for name, count in counter.get_comm_counts().items():
                calls[next(kind for part, kind in kinds.items() if part in str(name))] += count
    finally:
        dist.destroy_process_group()
    return calls
