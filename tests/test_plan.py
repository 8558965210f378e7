"""The plan counts what a real step of the real trainer does, and its arithmetic is that of the published run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor.debug import CommDebugMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.flop_counter import FlopCounterMode

from dmd2 import plan, recipes
from dmd2.batch import Batch, Conditioning
from dmd2.config import Config, DistillConfig
from dmd2.models.family import ModelFamily, make_family
from dmd2.parallel.ranks import World
from dmd2.plan import counts, prediction, rehearsal, table
from dmd2.plan.counts import Layout
from dmd2.plan.meter import CPU_ATTENTION, Meter, norms_as_on_cuda
from dmd2.plan.rehearsal import Pass
from dmd2.training import build, memory
from dmd2.training.trainer import DMD2Trainer
from tests.bench import collectives
from tests.conftest import ALONE, MICRO

Refusal = Callable[[Callable[[], object]], str]


def digits(*changes: str) -> Config:
    """`-gan` and `-dmd` leave a term out."""
    out = {change[1:]: None for change in changes if change.startswith("-")}
    kept = [change for change in changes if not change.startswith("-")]
    config = recipes.resolve("edm-digits", [*MICRO, "distill.batch=4", *kept])
    distill = DistillConfig.model_validate({**dict(config.distill), **out})
    return config.model_copy(update={"distill": distill})


def emoji(name: str, *changes: str) -> Config:
    small = ["family.resolution=32", "family.vae_stride=2", "distill.batch=4", "engine.micro_batch=2"]
    return recipes.resolve(name, [*small, *changes])


def counted(config: Config, fam: ModelFamily, teacher: nn.Module, real: Batch) -> list[int]:
    """FLOPs of each step of a turn of the real trainer and the first of the next."""
    trainer = build.trainer(config, fam, teacher.state_dict(), ALONE)
    assert isinstance(trainer, DMD2Trainer)
    found = []
    for step in range(config.distill.critic_updates + 1):
        with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
            trainer.step(real, step)
        found.append(counter.get_total_flops())
    return found


def predicted(config: Config, fam: ModelFamily) -> list[float]:
    nets = rehearsal.networks(config, fam)
    with rehearsal.checkpointing(fam, nets, config.engine.activation_checkpointing):
        passes = rehearsal.Rehearsal(config, fam, nets, 1).run()
    steps = range(config.distill.critic_updates + 1)
    batch = config.distill.batch
    return [sum(counts.flops(passes, counts.calls_at(config, step), batch).values()) for step in steps]


@pytest.mark.parametrize(
    "changes",
    [
        (),
        ("-gan",),
        ("-dmd",),
        ("distill.gan.reuse_denoising_pass=True",),
        ("engine.micro_batch=2", "engine.activation_checkpointing=full", "distill.critic_updates=2"),
        ("engine.activation_checkpointing=selective",),
        ("distill.student_timesteps=999,600,200",),
        (
            "distill.student_timesteps=999,600,200",
            "distill.continue_rollouts=True",
            "distill.critic_updates=7",
        ),
        ("distill.student_timesteps=999,600,200", "distill.inputs=noised-real"),
    ],
)
def test_flops_of_every_step_of_a_turn_are_those_of_the_real_trainer(changes: tuple[str, ...]) -> None:
    config = digits(*changes)
    fam = make_family(config.family)
    cond = Conditioning(label=torch.zeros(4, dtype=torch.int64))
    real = Batch(torch.randn(4, *fam.shape), cond, Conditioning())
    assert predicted(config, make_family(config.family)) == counted(config, fam, fam.network(), real)


@pytest.mark.parametrize(
    ("recipe", "changes"),
    [
        ("sdxl-4step-emoji", ()),
        ("sdxl-4step-emoji", ("engine.activation_checkpointing=full", "distill.continue_rollouts=True")),
        ("sdxl-4step-lora-emoji", ()),
        ("sdxl-4step-shared-emoji", ("distill.gan.reuse_denoising_pass=True",)),
        ("sdxl-1step-emoji", ("engine.activation_checkpointing=selective",)),
    ],
)
def test_flops_of_a_turn_of_a_small_sdxl_are_those_of_the_real_trainer(
    recipe: str, changes: tuple[str, ...], pipeline: Path
) -> None:
    config = emoji(recipe, *changes)
    fam: Any = make_family(config.family, pipeline)
    shown = fam.condition(["a red square", "a blue", "a green square", ""])
    real = Batch(torch.randn(4, *fam.shape), *shown)
    assert predicted(config, make_family(config.family, pipeline)) == counted(
        config, fam, fam.network(), real
    )


def test_an_average_step_is_the_mean_over_turns_and_stops() -> None:
    config = digits("distill.student_timesteps=999,600,200")
    assert counts.mean_calls(config) == pytest.approx(
        {
            rehearsal.ROLLOUT: 1
            + 4 / 5,  # (3 - 1) / 2 before the last, which only the student's turn takes with its graph
            rehearsal.STUDENT: 1 / 5,
            rehearsal.TEACHER: 1 / 5,
            rehearsal.SCORE: 1 / 5,
            rehearsal.STUDENT_GAN: 1 / 5,
            rehearsal.CRITIC_GAN: 1,
            rehearsal.CRITIC: 1,
        }
    )


def test_work_is_in_proportion_and_memory_on_a_line() -> None:
    one, two = Pass(1, 10, kept=7, peak=9), Pass(2, 20, kept=12, peak=16)
    assert one.at(4, two) == Pass(4, 40, kept=22, peak=30)
    assert two.at(4) == Pass(4, 40, kept=24, peak=32)


def test_memory_of_a_pass_is_on_a_line_through_two_sizes() -> None:
    config = digits()
    fam = make_family(config.family)
    nets = rehearsal.networks(config, fam)
    one, two, five = (rehearsal.Rehearsal(config, fam, nets, rows).run() for rows in (1, 2, 5))
    line = one[rehearsal.STUDENT].at(5, two[rehearsal.STUDENT])
    assert line.kept == five[rehearsal.STUDENT].kept
    assert line.peak == pytest.approx(five[rehearsal.STUDENT].peak, rel=0.02)
    assert line.flops == five[rehearsal.STUDENT].flops


def test_the_meter_sees_what_lives_and_lets_go_of_what_died() -> None:
    layer = nn.Linear(4, 4, bias=False)
    with Meter(layer) as meter:
        x = torch.ones(2, 4)
        y = layer(x)
        assert meter.live == 2 * 32
        assert meter.flops == 2 * 2 * 4 * 4
        del x
        assert meter.live == 2 * 32  # the graph has it
        y.sum().backward()
        del y
    assert meter.gradients == 4 * 16
    assert list(meter.reached.values()) == [16]
    assert meter.live == meter.gradients
    meter.release()
    assert layer.weight.grad is None


def test_norms_are_kept_in_float32_as_on_cuda() -> None:
    norm, x = nn.GroupNorm(2, 4), torch.ones(1, 4, 3, 3, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert norm.bfloat16()(x).dtype == torch.bfloat16
        norms_as_on_cuda(norm)
        assert norm(x).dtype == torch.float32


def test_resident_messages_are_one_gather_and_one_reduction_per_unit_and_update(micro: Config) -> None:
    config, fam = digits("distill.batch=8"), make_family(micro.family)
    nets, mesh = rehearsal.networks(config, fam), Layout(8, 4, 4)
    passes = rehearsal.Rehearsal(config, fam, nets, 1).run()
    sent = counts.traffic(config, fam, nets, mesh, True, passes, 1)
    units = len(counts.owned(fam, nets.student, outermost=True))
    calls = units / 5 + units + 1  # student, critic, head
    weights = memory.count(nets.student) * 6 / 5 + memory.count(fam.head())
    assert sent[counts.GATHER] == pytest.approx((calls, 4 * weights * 3 / 4))
    assert sent[counts.SCATTER] == pytest.approx((calls, 4 * weights * 3 / 4))
    # Between two replicas, a shard there and back; and the two norms.
    assert sent[counts.REDUCE] == pytest.approx((calls + 6 / 5, 4 * weights / 4 + 4 * 6 / 5))


@pytest.mark.parametrize("weights", ["resident", "sharded"])
@pytest.mark.parametrize(
    "changes",
    [
        ("-gan",),
        (),
        ("distill.gan.reuse_denoising_pass=True",),
        ("engine.micro_batch=1", "engine.activation_checkpointing=full"),
    ],
)
@pytest.mark.parametrize(("gpus", "per_node"), [(8, 4), (4, 1)])
def test_calls_of_a_turn_are_those_of_the_real_trainer(
    weights: str, changes: tuple[str, ...], gpus: int, per_node: int
) -> None:
    """In a process group that sends nothing."""
    config = digits(f"engine.weights={weights}", f"distill.batch={2 * gpus}", *changes)
    calls = collectives_of_a_turn(config, gpus, per_node)
    fam = make_family(config.family)
    nets, rows = rehearsal.networks(config, fam), config.engine.micro_batch or 2
    with rehearsal.checkpointing(fam, nets, config.engine.activation_checkpointing):
        passes = rehearsal.Rehearsal(config, fam, nets, rows).run()
    sent = counts.traffic(
        config, fam, nets, Layout(gpus, per_node, per_node), weights == "resident", passes, rows
    )
    turn = config.distill.critic_updates
    found = {
        kind: turn * sent.get(kind, (0, 0))[0] for kind in (counts.GATHER, counts.SCATTER, counts.REDUCE)
    }
    assert found == pytest.approx(calls)


def collectives_of_a_turn(config: Config, gpus: int, per_node: int) -> dict[str, int]:
    calls = dict.fromkeys((counts.GATHER, counts.SCATTER, counts.REDUCE), 0)
    kinds = {"allgather": counts.GATHER, "reduce_scatter": counts.SCATTER, "reduce": counts.REDUCE}
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=gpus)
    try:
        world = collectives.Meshed(ALONE.device, 0, gpus, 0, per_node, dist.group.WORLD)
        mesh = World.device_mesh(world, per_node)
        assert mesh is not None
        collectives.MESH[:] = [mesh]
        fam = make_family(config.family)
        with collectives.without_data():
            trainer = build.trainer(config, fam, {}, world)
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


def test_a_gpu_alone_sends_nothing_and_a_plan_adds_up() -> None:
    config = digits()
    made = prediction.planned(config, make_family(config.family), "h100-80gb", Layout(1, 1, 1), price=2.0)
    assert made.traffic == {}
    assert made.facts["gpu_hours"] == pytest.approx(made.seconds_per_step * 10 / 3600)
    assert made.facts["cost"] == pytest.approx(2 * made.gpu_hours)
    assert made.largest == config.distill.batch
    assert made.weights["learn"] == made.weights["student"] + made.weights["critic"] + made.weights["head"]
    # Masters and two moments of all that learns, and the student's average.
    assert made.checkpoint == 4 * (3 * made.weights["learn"] + made.weights["student"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"gpu": "h100-80g"}, "unknown GPU 'h100-80g'; did you mean 'h100-80gb'?"),
        ({"gpu": "l4-24gb", "gpus_per_node": 3}, "cannot be divided among 3 GPUs"),
        ({"gpu": "l4-24gb", "nodes": 0}, "give at least one"),
        ({"gpu": "l4-24gb", "price": -1.0}, "price is -1; give what a GPU costs for an hour"),
        ({"gpu": "l4-24gb", "teacher": "/nowhere"}, "/nowhere is not a folder"),
    ],
)
def test_what_cannot_be_planned_is_refused(arguments: dict[str, Any], said: str, refusal: Refusal) -> None:
    assert said in refusal(lambda: plan.plan(digits(), **arguments))


def test_the_tables_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    made = plan.plan(digits("distill.batch=8"), "l4-24gb", gpus_per_node=2, price=0.7)
    told = capsys.readouterr().out
    assert made.facts["fits"]
    for word in (
        "critic denoising",
        "gathered weights",
        "all-gather",
        "GPU-hours",
        "cost at 0.7",
        "selective",
        "assumption",
    ):
        assert word in told


def test_a_warm_up_is_its_student_alone(pipeline: Path) -> None:
    config = emoji("sdxl-1step-warmup-emoji")
    made = prediction.planned(config, make_family(config.family, pipeline), "l4-24gb", Layout(2, 2, 2))
    assert list(made.flops) == [rehearsal.STUDENT]
    assert "critic" not in made.weights
    assert any("decoder" in line for line in table.unknown(made))


def test_the_published_run_is_slow_by_its_units_and_ours_is_not() -> None:
    """SDXL at its real shape on 64 A100: 10.8 s a step were published (README of the reference)."""
    config = recipes.get("sdxl-4step")
    fam = make_family(config.family)
    nets = rehearsal.networks(config, fam)
    rehearsed = rehearsal.Rehearsal(config, fam, nets, 2)
    passes = rehearsed.run()
    one = passes[rehearsal.ROLLOUT].at(1).flops
    assert round(one / 1e12, 2) == 6.76
    told = prediction._compared(config, fam, nets, {"none": counts.Measured(passes)}, rehearsed.reached)
    assert told.units == pytest.approx(880, rel=0.01)
    assert told.unit_calls == pytest.approx(8000, rel=0.1)
    assert told.computing_s < 1.5
    assert told.seconds == pytest.approx(told.published_s, rel=0.1)
    assert told.ours_s < 1.5
