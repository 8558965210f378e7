"""The precision of a denoiser's calls, with and without gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dmd2 import recipes
from dmd2.batch import Batch, Conditioning
from dmd2.config import Config
from dmd2.denoiser import Denoiser, tf32_on_gpus
from dmd2.models.family import make_family
from dmd2.rng import Rng
from dmd2.training.terms import DistributionMatching
from tests.conftest import make_trainer


class Noting(nn.Module):
    """A linear layer that notes the type of its product, and the precision of products in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.seen: list[tuple[torch.dtype, str]] = []

    def forward(self, x: Tensor, time: Tensor, cond: Conditioning, features_only: bool = False) -> Tensor:
        out: Tensor = self.layer(x)
        self.seen.append((out.dtype, torch.get_float32_matmul_precision()))
        return out


@pytest.mark.parametrize("tf32", [False, True])
def test_calls_without_gradient_are_in_tf32_if_so_set(tf32: bool, micro: Config) -> None:
    network, process = Noting(), make_family(micro.family).diffusion
    denoiser = Denoiser(network, process, torch.bfloat16, no_grad_tf32=tf32)
    inputs: tuple[Any, ...] = torch.zeros(1, 1, 2, 2), torch.tensor([5]), Conditioning()
    denoiser(*inputs)
    with torch.no_grad():
        denoiser(*inputs)
    with_gradient, without = network.seen
    usual = (torch.bfloat16, torch.get_float32_matmul_precision())
    assert with_gradient == usual
    assert without == ((torch.float32, "high") if tf32 else usual)
    assert torch.get_float32_matmul_precision() == usual[1]


def test_a_step_calls_student_and_critic_so_and_the_teacher_as_ever(micro: Config) -> None:
    settings = micro.distill.model_copy(update={"dtype": "bfloat16", "no_grad_dtype": "tf32"})
    config = micro.model_copy(update={"distill": settings})
    family = make_family(config.family)
    trainer = make_trainer(config, family.network())
    types: dict[str, list[torch.dtype]] = {"student": [], "critic": [], "teacher": []}

    def note(role: str, network: Any) -> None:
        network.stem.register_forward_hook(lambda _, args, out: types[role].append(out.dtype))

    (matching,) = (term for term in trainer.terms if isinstance(term, DistributionMatching))
    note("student", trainer.student.module)
    note("critic", matching.critic.network)
    cond = family.condition([0, 1])
    real = Batch(torch.zeros(2, 1, 8, 8), *cond, Rng.at(0, 0, range(2), torch.device("cpu")))
    trainer.step(real, 0)
    assert types["student"] == [torch.bfloat16]
    assert types["critic"][0] == torch.float32  # its score
    assert set(types["critic"][1:]) == {torch.bfloat16}
    trainer.step(real, 1)
    assert types["student"][1:] == [torch.float32]


def test_a_lora_cannot_have_it(refusal: Callable[..., str]) -> None:
    assert "set it to same" in refusal(
        lambda: recipes.resolve("sdxl-4step-lora", ["distill.no_grad_dtype=tf32"])
    )


@pytest.mark.parametrize(("device", "during"), [("cuda", "high"), ("cpu", "highest")])
def test_float32_that_is_there_for_its_range_multiplies_in_tf32_on_gpus_only(
    device: str, during: str
) -> None:
    before = torch.get_float32_matmul_precision()
    with tf32_on_gpus(torch.device(device)):
        assert torch.get_float32_matmul_precision() == during
    assert torch.get_float32_matmul_precision() == before == "highest"
