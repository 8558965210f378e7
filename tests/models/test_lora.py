"""Low-rank updates, and several networks on one copy of the weights."""

from __future__ import annotations

import copy
import math
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from torch import Tensor, nn

from dmd2 import recipes
from dmd2.batch import Batch, Conditioning
from dmd2.config import LoraConfig, StableConfig
from dmd2.io.tensors import save_tensors
from dmd2.models.family import make_family
from dmd2.models.lora import (
    MergedNetwork,
    add_low_rank_update,
    export_low_rank_update,
    extract_low_rank_update,
    merge_low_rank_update,
    round_stochastically,
    share_tensors,
)
from dmd2.models.stable import Stable, published_pipeline
from dmd2.models.unet import Unet
from dmd2.parallel import sharding
from dmd2.plan.meter import Meter
from dmd2.training import build
from dmd2.training.trainer import DMD2Trainer
from tests.conftest import ALONE, teacher_of
from tests.worker import played, resolved

SMALL = LoraConfig(rank=4, alpha=2)


def test_the_update_of_sdxl_has_the_published_layers_and_size() -> None:
    family = make_family(StableConfig(kind="sdxl", resolution=1024), published_pipeline("sdxl"))
    with torch.device("meta"):
        network = add_low_rank_update(family.network(), Stable.lora_targets, LoraConfig())
        plain = family.network()
    learned = {name: p.numel() for name, p in network.named_parameters() if p.requires_grad}
    assert sum(".lora_A." in name for name in learned) == 788
    assert round(sum(learned.values()) / 1e6, 2) == 196.75
    ends = tuple(f".{end}" for end in Stable.lora_targets)
    layers: list[Any] = [m for name, m in plain.named_modules() if name.endswith(ends)]
    shapes = [layer.weight.shape for layer in layers]
    assert sum(64 * (math.prod(shape[1:]) + shape[0]) for shape in shapes) == sum(learned.values())


def tiny(pipeline: Path) -> tuple[Any, nn.Module, tuple[Any, ...]]:
    family = make_family(StableConfig(kind="sdxl", resolution=32, vae_stride=2), pipeline)
    network = family.network()
    network.load_state_dict(family.weights(pipeline))
    cond: Conditioning = family.condition(["a red square"]).cond
    torch.manual_seed(0)
    return family, network, (torch.randn(1, 4, 16, 16), torch.tensor([300.0]), cond)


def test_networks_that_share_tensors_have_their_own_modules(pipeline: Path) -> None:
    _, base, _ = tiny(pipeline)
    other = share_tensors(base)
    pairs = list(zip(base.parameters(), other.parameters(), strict=True))
    assert all(a is b for a, b in pairs)
    assert not {id(m) for m in base.modules()} & {id(m) for m in other.modules()}


@torch.no_grad()
def test_an_update_is_zero_at_first_and_changes_neither_the_base_nor_another_update(pipeline: Path) -> None:
    _, base, inputs = tiny(pipeline)
    before = base(*inputs)
    student, critic = (
        add_low_rank_update(base, Stable.lora_targets, SMALL),
        add_low_rank_update(base, Stable.lora_targets, SMALL),
    )
    torch.testing.assert_close(student(*inputs), before)
    for name, p in student.named_parameters():
        if ".lora_B." in name:
            p.add_(0.05)
    assert (student(*inputs) - before).abs().max() > 1e-3
    assert torch.equal(base(*inputs), before)
    torch.testing.assert_close(critic(*inputs), before)


@torch.no_grad()
def test_merged_weights_are_the_network_with_its_update(pipeline: Path) -> None:
    family, base, inputs = tiny(pipeline)
    weights = {name: p.clone() for name, p in base.named_parameters()}
    student = add_low_rank_update(base, Stable.lora_targets, SMALL)
    for name, p in student.named_parameters():
        if ".lora_B." in name:
            p.normal_(std=0.1)
    plain = family.network()
    update = {name: p for name, p in student.named_parameters() if p.requires_grad}
    plain.load_state_dict(merge_low_rank_update(weights, update, SMALL))
    torch.testing.assert_close(plain(*inputs), student(*inputs), atol=1e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_calls_without_gradient_follow_the_update_and_cost_what_the_base_does(
    dtype: torch.dtype, pipeline: Path
) -> None:
    _, base, inputs = tiny(pipeline)
    exact = add_low_rank_update(share_tensors(base), Stable.lora_targets, SMALL)
    base = copy.deepcopy(base).to(dtype)
    student = add_low_rank_update(base, Stable.lora_targets, SMALL)
    merged = MergedNetwork(base, student, SMALL)
    assert torch.equal(merged.current()(*inputs), base(*inputs)), "an update that is zero"
    assert {id(p) for p in base.parameters()} & {id(p) for p in merged.network.parameters()}, (
        "some are shared"
    )
    torch.manual_seed(0)
    for (name, p), like in zip(student.named_parameters(), exact.parameters(), strict=True):
        if ".lora_" in name:
            like.copy_(p.normal_(std=0.1))
    assert torch.equal(merged.current()(*inputs), base(*inputs)), "not asked to change yet"
    sharding.reshard(student)
    wanted, found = exact(*inputs), merged.current()(*inputs).float()
    if dtype == torch.float32:
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=2e-6 * float(wanted.abs().max()))
    else:
        with torch.autocast("cpu", dtype):
            apart = (student(*inputs).float() - wanted).norm()
        assert (found - wanted).norm() < 2 * apart < 0.2 * (wanted - base(*inputs)).norm()
    first = [weight.clone() for weight in merged.weights()]
    sharding.reshard(student)
    merged.current()
    assert all(map(torch.equal, first, merged.weights())), "equal factors, equal weights"
    with Meter() as plain:
        base(*inputs)
    with Meter() as ours:
        merged.current()(*inputs)
    assert ours.kernels == plain.kernels


def test_updates_that_are_smaller_than_the_last_digit_of_bfloat16_are_there_on_average() -> None:
    base, last_digit = torch.full((100_000,), 1.5), 2.0**-7
    for share in (0.0, 0.1, 0.25, 0.9):
        rounded = round_stochastically(base + share * last_digit, torch.Generator().manual_seed(0))
        assert torch.equal(rounded, rounded.bfloat16().float())
        assert set(rounded.tolist()) <= {1.5, 1.5 + last_digit}
        assert float((rounded - base).mean() / last_digit) == pytest.approx(share, abs=0.01)


@pytest.mark.parametrize(
    "more",
    [
        (),
        pytest.param(
            (
                "engine.activation_checkpointing=full",
                "engine.micro_batch=1",
                "distill.continue_rollouts=True",
            ),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_student_that_samples_with_merged_weights_learns_what_it_learns_without(
    more: tuple[str, ...], pipeline: Path
) -> None:
    found = []
    for merges in (True, False):
        config, family, steps = resolved("shared-base", pipeline, "distill.student.ema=0.9", *more)

        def prepare(trainer: DMD2Trainer, merges: bool = merges) -> None:
            student = cast(Any, trainer.generate).student
            assert student.no_grad_network
            if not merges:
                student.no_grad_network = None

        found.append(played(config, family, steps, ALONE, prepare))
    for name, value in found[0].items():
        torch.testing.assert_close(
            value,
            found[1][name],
            rtol=1e-5,
            atol=1e-4 if ":" in name else 1e-6,
            msg=partial("{}: {}".format, name),
        )


def test_trainables_on_one_base_move_their_own_updates_and_nothing_else(pipeline: Path) -> None:
    family, base, inputs = tiny(pipeline)
    changes = {"lora": LoraConfig(rank=4, alpha=2, shared_base=True), "dtype": "bfloat16"}
    config = recipes._with(recipes.get("sdxl-4step-shared-emoji"), "shared", **changes)
    trainer = build.trainer(config, family, base.state_dict(), ALONE)
    assert isinstance(trainer, DMD2Trainer)
    trainables = {"student": trainer.student.module, "critic": trainer.critic.module}
    frozen = {id(p) for p in trainables["student"].parameters() if not p.requires_grad}
    base = teacher_of(trainer)
    assert frozen == {id(p) for p in base.parameters()}
    assert all(frozen < {id(p) for p in module.parameters()} for module in trainables.values())

    def state() -> dict[str, list[Tensor]]:
        learns = {n: [p for p in m.parameters() if p.requires_grad] for n, m in trainables.items()}
        assert not {id(p) for p in learns["student"]} & {id(p) for p in learns["critic"]}
        with torch.no_grad():
            known = {"base": list(base.parameters()), "teacher": [base(*inputs)], **learns}
        return {name: [t.detach().clone() for t in tensors] for name, tensors in known.items()}

    real = Batch(torch.randn(2, *family.shape), *family.condition(["a red square", "a blue square"]))
    states = [state()]
    for step in (1, 0):
        trainer.step(real, step)
        states.append(state())
    for (before, after), moves in zip(pairwise(states), ({"critic"}, {"critic", "student"}), strict=True):
        same = {n: all(torch.equal(a, b) for a, b in zip(before[n], after[n], strict=True)) for n in before}
        assert {name for name, still in same.items() if not still} == moves


def test_an_exported_update_is_read_by_diffusers_and_gives_the_same_output(
    pipeline: Path, tmp_path: Path
) -> None:
    _, base, inputs = tiny(pipeline)
    student = add_low_rank_update(base, Stable.lora_targets, SMALL)
    with torch.no_grad():
        for name, p in student.named_parameters():
            if ".lora_B." in name:
                p.normal_(std=0.1)
    update = {name: p.detach() for name, p in student.named_parameters() if p.requires_grad}
    save_tensors(export_low_rank_update(update, SMALL), tmp_path / "pytorch_lora_weights.safetensors")
    pipe: Any = StableDiffusionXLPipeline.from_pretrained(pipeline)
    pipe.load_lora_weights(tmp_path)
    with torch.no_grad():
        before, ours, theirs = base(*inputs), student(*inputs), Unet(pipe.unet)(*inputs)
    torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=1e-4)
    assert (ours - before).abs().max() > 1e-2


def test_the_update_is_float32_on_a_bfloat16_base(pipeline: Path) -> None:
    _, base, _ = tiny(pipeline)
    student = add_low_rank_update(base.to(torch.bfloat16), Stable.lora_targets, SMALL)
    kinds = {p.requires_grad: p.dtype for p in student.parameters()}
    assert kinds == {True: torch.float32, False: torch.bfloat16}


def test_an_update_that_is_low_rank_is_extracted_from_the_whole_network(pipeline: Path) -> None:
    _, base, _ = tiny(pipeline)
    weights = {name: p.clone() for name, p in base.named_parameters()}
    student = add_low_rank_update(base, Stable.lora_targets, SMALL)
    torch.manual_seed(1)
    update = {name: torch.randn_like(p) / 10 for name, p in student.named_parameters() if p.requires_grad}
    whole = merge_low_rank_update(weights, update, SMALL)
    found, share = extract_low_rank_update(weights, whole, Stable.lora_targets, SMALL.rank)
    assert share > 1 - 1e-6
    unscaled = {name.replace(".weight", ".default.weight"): tensor for name, tensor in found.items()}
    same_scale = LoraConfig(rank=4, alpha=4)
    torch.testing.assert_close(
        merge_low_rank_update(weights, unscaled, same_scale), whole, atol=1e-5, rtol=1e-4
    )
    assert extract_low_rank_update(weights, whole, Stable.lora_targets, SMALL.rank)[0].keys() == found.keys()


def test_the_share_that_an_extraction_holds_is_that_of_the_largest_singular_values() -> None:
    torch.manual_seed(0)
    base = {"a.to_q.weight": torch.randn(24, 20), "a.norm.weight": torch.zeros(4)}
    change = {"a.to_q.weight": torch.randn(24, 20), "a.norm.weight": torch.ones(4)}
    whole = {name: tensor + change[name] for name, tensor in base.items()}
    squares = torch.linalg.svdvals(change["a.to_q.weight"]).square()
    for rank in (1, 5, 20, 30):
        _, share = extract_low_rank_update(base, whole, ("to_q",), rank)
        wanted = squares[:rank].sum() / (squares.sum() + 4)
        torch.testing.assert_close(share, wanted.item(), atol=1e-4, rtol=0)
    assert extract_low_rank_update(base, base, ("to_q",), 2)[1] == 1
