"""Low-rank updates, and several networks on one copy of the weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from dmd2 import build
from dmd2.config import LoraConfig, StableConfig
from dmd2.models.lora import merged, tied, updated
from dmd2.models.stable import published
from dmd2.sample import Conditioning

SMALL = LoraConfig(rank=4, alpha=2)


def test_the_update_of_sdxl_has_the_published_layers_and_size() -> None:
    family = build.family(StableConfig(kind="sdxl", resolution=1024), published("sdxl"))
    with torch.device("meta"):
        network = updated(family.network(), LoraConfig())
    learned = {name: p.numel() for name, p in network.named_parameters() if p.requires_grad}
    assert sum(".lora_A." in name for name in learned) == 788
    assert round(sum(learned.values()) / 1e6, 2) == 196.75


def tiny(pipeline: Path) -> tuple[Any, nn.Module, tuple[Any, ...]]:
    family = build.family(StableConfig(kind="sdxl", resolution=32, latent=2), pipeline)
    network = family.network()
    network.load_state_dict(family.weights(pipeline))
    cond: Conditioning = family.condition(["a red square"]).cond
    torch.manual_seed(0)
    return family, network, (torch.randn(1, 4, 16, 16), torch.tensor([300.0]), cond)


def test_tied_networks_have_the_same_tensors_and_their_own_modules(pipeline: Path) -> None:
    _, base, _ = tiny(pipeline)
    other = tied(base)
    pairs = list(zip(base.parameters(), other.parameters(), strict=True))
    assert all(a is b for a, b in pairs)
    assert not {id(m) for m in base.modules()} & {id(m) for m in other.modules()}


@torch.no_grad()
def test_an_update_starts_as_nothing_and_touches_neither_base_nor_neighbour(pipeline: Path) -> None:
    _, base, inputs = tiny(pipeline)
    before = base(*inputs)
    student, critic = updated(base, SMALL), updated(base, SMALL)
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
    student = updated(base, SMALL)
    for name, p in student.named_parameters():
        if ".lora_B." in name:
            p.normal_(std=0.1)
    plain = family.network()
    update = {name: p for name, p in student.named_parameters() if p.requires_grad}
    plain.load_state_dict(merged(weights, update, SMALL))
    torch.testing.assert_close(plain(*inputs), student(*inputs), atol=1e-5, rtol=1e-4)


def test_what_learns_is_float32_on_a_base_of_bfloat16(pipeline: Path) -> None:
    _, base, _ = tiny(pipeline)
    student = updated(base.to(torch.bfloat16), SMALL)
    kinds = {p.requires_grad: p.dtype for p in student.parameters()}
    assert kinds == {True: torch.float32, False: torch.bfloat16}
