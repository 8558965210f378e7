"""The plan counts what a real step of the real trainer does, and its arithmetic is that of the published run."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dmd2 import plan, recipes
from dmd2.batch import Batch, Conditioning
from dmd2.config import Config, DistillConfig
from dmd2.models.family import ModelFamily, make_family
from dmd2.plan import evaluation, passes, prediction, published_scheme, step_costs, table
from dmd2.plan.hardware import GPUS, USABLE
from dmd2.plan.meter import CPU_ATTENTION, Meter, norms_as_on_cuda
from dmd2.plan.passes import PassCost
from dmd2.plan.traffic import MeshShape
from dmd2.training import build
from dmd2.training.trainer import DMD2Trainer
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
    small = ["family.resolution=32", "family.vae_stride=2", "distill.batch=4", "engine.micro_batch=4"]
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
    fake = passes.fake_trainer(config, fam)
    with passes.activation_checkpointing(fake, config.engine.activation_checkpointing):
        costs = passes.measure_passes(fake, 1)
    sampler, updates = build.sample_student(config, fake.student), config.distill.critic_updates
    calls = [
        passes.calls_per_step(fake, step % updates == 0, sampler.stop(step)) for step in range(updates + 1)
    ]
    found, is_merged = [], False
    for each in calls:
        merges = fake.merging is not None and each[passes.ROLLOUT] > 0 and not is_merged
        found.append(sum(step_costs.flops(costs, each, config.distill.batch).values()))
        found[-1] += fake.merging.flops if merges and fake.merging else 0
        is_merged = (is_merged or merges) and passes.STUDENT not in each
    return found


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
        ("distill.student_timesteps=999,600,200", "distill.inputs=noised-real", "distill.fake_prompts=batch"),
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
    config = emoji(recipe, "distill.critic_updates=2", *changes)
    fam: Any = make_family(config.family, pipeline)
    shown = fam.condition(["a red square", "a blue", "a green square", ""])
    real = Batch(torch.randn(4, *fam.shape), *shown)
    assert predicted(config, make_family(config.family, pipeline)) == counted(
        config, fam, fam.network(), real
    )


def test_an_average_step_is_the_mean_over_turns_and_stops() -> None:
    config = digits("distill.student_timesteps=999,600,200")
    fake = passes.fake_trainer(config, make_family(config.family))
    assert passes.mean_calls(fake) == pytest.approx(
        {
            # (3 - 1) / 2 before the last call, which only the student's turn makes with a graph
            passes.ROLLOUT: 1 + 4 / 5,
            passes.STUDENT: 1 / 5,
            "student loss dmd": 1 / 5,
            "student loss gan": 1 / 5,
            "critic loss gan": 1,
            "critic loss dmd": 1,
        }
    )


def test_work_is_in_proportion_and_memory_on_a_line() -> None:
    one, two = PassCost(1, 10, kept=7, peak=9), PassCost(2, 20, kept=12, peak=16)
    assert one.at(4, two) == PassCost(4, 40, kept=22, peak=30)
    assert two.at(4) == PassCost(4, 40, kept=24, peak=32)


def test_memory_of_a_pass_is_on_a_line_through_two_sizes() -> None:
    config = digits()
    fake = passes.fake_trainer(config, make_family(config.family))
    one, two, five = (passes.measure_passes(fake, rows)[passes.STUDENT] for rows in (1, 2, 5))
    line = one.at(5, two)
    assert line.kept == five.kept
    assert line.peak == pytest.approx(five.peak, rel=0.02)
    assert line.flops == five.flops


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
    assert meter.reached == {layer.weight}
    assert meter.live == meter.gradients
    meter.release()
    assert layer.weight.grad is None


def test_the_meter_counts_what_casts_read_and_write() -> None:
    with Meter() as meter:
        x = torch.ones(10)
        x.to(torch.bfloat16).to(torch.bfloat16)  # the second one changes nothing
        torch.zeros(10, dtype=torch.float64).copy_(x)
        x.clone()
    assert meter.cast_bytes == 10 * (4 + 2) + 10 * (4 + 8)


def test_norms_are_kept_in_float32_as_on_cuda() -> None:
    norm, x = nn.GroupNorm(2, 4), torch.ones(1, 4, 3, 3, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert norm.bfloat16()(x).dtype == torch.bfloat16
        norms_as_on_cuda(norm)
        assert norm(x).dtype == torch.float32


def test_a_gpu_alone_sends_nothing_and_a_plan_adds_up() -> None:
    config = digits()
    made = prediction.make_plan(
        config, make_family(config.family), "h100-80gb", MeshShape(1, 1, 1), price=2.0
    )
    assert made.traffic == {}
    assert made.facts["gpu_hours"] == pytest.approx(made.seconds_per_step * 10 / 3600)
    assert made.facts["cost"] == pytest.approx(2 * made.gpu_hours)
    assert made.facts["gpu_hours_low"] < made.gpu_hours < made.facts["gpu_hours_high"]
    assert made.largest_micro_batch == config.distill.batch
    assert made.weights["learn"] == made.weights["student"] + made.weights["critic"] + made.weights["head"]
    # Masters and two moments of all that learns, and the student's average.
    assert made.checkpoint == 4 * (3 * made.weights["learn"] + made.weights["student"])


def test_the_evaluation_is_its_network_calls_by_the_set() -> None:
    config = recipes.get("sdxl-4step")
    call = PassCost(rows=1, flops=1_000_000_000_000)
    spent = evaluation.evaluation_seconds(config, make_family(config.family), call, GPUS["h100-80gb"])
    second_of = 989e12 * 0.25 / 1e12  # calls in a second
    # 4 and 1; 50, 4 and 1 guided steps of two calls
    assert spent["student"] == pytest.approx(10_000 * 5 / second_of)
    assert spent["teacher"] == pytest.approx(10_000 * 110 / second_of)
    # The decoder of Stable Diffusion has 1.27e12 multiplications and additions of pairs at 512 pixels.
    assert evaluation.decoder_flops(recipes.get("sd15-1step")) == pytest.approx(2 * 1.27e12, rel=0.05)
    assert evaluation.decoder_flops(recipes.get("edm-digits")) == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"gpu": "h100-80g"}, "unknown GPU 'h100-80g'; did you mean 'h100-80gb'?"),
        ({"gpu": "l4-24gb", "gpus_per_node": 3}, "cannot be divided among 3 GPUs"),
        ({"gpu": "l4-24gb", "nodes": 0}, "give at least one"),
        ({"gpu": "l4-24gb", "price": -1.0}, "price is -1; give what a GPU costs for an hour"),
        ({"gpu": "l4-24gb", "gpus_per_node": 1, "teacher": "/nowhere"}, "/nowhere is not a folder"),
    ],
)
def test_what_cannot_be_planned_is_refused(arguments: dict[str, Any], said: str, refusal: Refusal) -> None:
    assert said in refusal(lambda: plan.plan(digits(), **arguments))


def test_the_tables_are_printed_and_the_progress_is_not_among_them(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dmd2.progress.RECORD_EVERY_S", 0.0)
    with caplog.at_level(logging.INFO, "dmd2.progress"):
        made = plan.plan(digits("distill.batch=8"), "l4-24gb", gpus_per_node=2, price=0.7)
    printed = capsys.readouterr().out
    said = [record.getMessage() for record in caplog.records]
    assert re.fullmatch(r"plan: 1/24 passes, \d+ s left", said[0])
    assert said[-1] == "plan: 24/24 passes, done"
    assert len(said) == 24
    assert "passes," not in printed
    assert made.facts["fits"]
    for word in (
        "critic loss dmd",
        "gathered weights",
        "all-gather",
        "GPU-hours",
        "cost at 0.7",
        "selective",
        "assumed",
    ):
        assert word in printed


@pytest.mark.parametrize("compiling", ["auto", "on"])
def test_selective_checkpointing_is_said_to_take_the_host_longer_without_compiling(compiling: str) -> None:
    config = digits("engine.activation_checkpointing=selective", f"engine.compile={compiling}")
    made = prediction.make_plan(
        config, make_family(config.family), "l4-24gb", MeshShape(1, 1, 1), compared=()
    )
    said = any("each operator of a unit through Python" in line for line in table.limitations(made))
    assert said == (compiling == "auto")


def test_a_warm_up_is_its_student_alone(pipeline: Path) -> None:
    config = emoji("sdxl-1step-warmup-emoji")
    made = prediction.make_plan(config, make_family(config.family, pipeline), "l4-24gb", MeshShape(2, 2, 2))
    assert list(made.flops) == [passes.STUDENT]
    assert "critic" not in made.weights
    assert any("decoder" in line for line in table.limitations(made))


def test_the_published_run_is_slow_by_its_units_and_ours_is_not() -> None:
    """SDXL at its real shape on 64 A100: 10.8 s a step were published (README of the reference)."""
    config = recipes.get("sdxl-4step")
    fake = passes.fake_trainer(config, make_family(config.family))
    costs = passes.measure_passes(fake, 2)
    assert round(costs[passes.ROLLOUT].at(1).flops / 1e12, 2) == 6.76
    scheme = published_scheme.compare_with_published(fake, costs)
    assert scheme.units == pytest.approx(880, rel=0.01)
    assert scheme.unit_calls == pytest.approx(8000, rel=0.1)
    assert scheme.computing_s < 1.5
    assert scheme.seconds == pytest.approx(scheme.published_s, rel=0.1)
    assert scheme.ours_s < 1.5


@pytest.mark.parametrize(("shards", "copies"), [(1, 4), (4, 1), (8, 0.5)])
def test_a_machine_holds_a_checkpoint_and_the_offloaded_teacher_once_per_copy_of_the_weights(
    shards: int, copies: float
) -> None:
    config = digits("distill.batch=8", "engine.offload_teacher=True")
    mesh = MeshShape(8, 4, shards)
    made = prediction.make_plan(config, make_family(config.family), "l4-24gb", mesh, compared=())
    teacher = 4 * made.weights["teacher"]
    assert 1e9 * made.host_memory_gb == pytest.approx(copies * (made.checkpoint + teacher))


@pytest.mark.parametrize("gb", [0.8, 0.7])
def test_a_plan_that_does_not_fit_says_with_which_settings_it_does(
    gb: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of them, planned by itself, fits and takes what was said; none is part of another."""
    changes = ("family.network.channels=64", "engine.micro_batch=4")
    fam = make_family(digits(*changes).family)

    def planned(*more: str, compared: tuple[str, ...] = ()) -> prediction.Plan:
        config = digits(*changes, *more)
        return prediction.make_plan(config, fam, "small", MeshShape(1, 1, 1), compared=compared)

    large = GPUS["l4-24gb"]
    monkeypatch.setitem(GPUS, "small", large)
    needed = planned().memory_gb
    monkeypatch.setitem(GPUS, "small", replace(large, gb=gb * needed / USABLE))
    made = planned(compared=("none", "full"))
    assert not made.fits
    assert made.remedies
    assert any("distill.critic.moments=8bit" in one.settings for one in made.remedies)
    for one in made.remedies:
        alone = planned(*one.settings)
        assert alone.fits
        assert alone.memory_gb == pytest.approx(one.gb, rel=0.02)
        assert not any(set(other.settings) < set(one.settings) for other in made.remedies)
    assert made.facts["fits_with"] == " ".join(made.remedies[0].settings)
