"""One step of the trainer against the formulas of the paper, written out plainly.

Fixed weights, noises and timesteps; the formulas below use a network, sigmas and autograd, and nothing of the library's
terms, losses or trainer. Everything that reaches a trainable must agree to 1e-5: losses, and gradients of all weights.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dmd2.batch import Batch, Conditioning
from dmd2.config import Config, DistillConfig, GanConfig
from dmd2.models.family import make_family
from tests.conftest import make_trainer

SIGMA_DATA = 0.5


def karras(timestep: Tensor) -> Tensor:
    ramp = timestep.double() / 999
    return ((0.002 ** (1 / 7) + ramp * (80 ** (1 / 7) - 0.002 ** (1 / 7))) ** 7).float().reshape(-1, 1, 1, 1)


def raw(network: nn.Module, x: Tensor, sigma: Tensor, label: Tensor, features: bool = False) -> Tensor:
    """F(c_in x; ln(sigma) / 4)."""
    c_in = (sigma**2 + SIGMA_DATA**2).rsqrt()
    return network(c_in * x, sigma.flatten().log() / 4, Conditioning(label=label), features_only=features)


def denoised(network: nn.Module, x: Tensor, sigma: Tensor, label: Tensor) -> Tensor:
    """D(x; sigma) of Karras et al. 2022, eq. 7."""
    total = sigma**2 + SIGMA_DATA**2
    return SIGMA_DATA**2 / total * x + sigma * SIGMA_DATA / total.sqrt() * raw(network, x, sigma, label)


@pytest.fixture(params=[True, False], ids=["gan", "no-gan"])
def config(request: pytest.FixtureRequest, micro: Config) -> Config:
    changes = {} if request.param else {"gan": None}
    return micro.model_copy(
        update={"distill": DistillConfig.model_validate({**dict(micro.distill), **changes})}
    )


def test_one_step_equals_the_formulas(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    family, gan = make_family(config.family), config.distill.gan
    teacher = family.network()
    for parameter in teacher.parameters():
        nn.init.normal_(parameter, std=0.15)
    trainer = make_trainer(config, teacher)
    student, critic = trainer.student.module, trainer.critic.module["network"]  # type: ignore[index]
    head = trainer.critic.module["head"] if gan else None  # type: ignore[index]
    with torch.no_grad():
        for parameter in [*student.parameters(), *critic.parameters()]:
            parameter.add_(torch.randn_like(parameter) * 0.05)
    plain = {"student": copy.deepcopy(student), "critic": copy.deepcopy(critic), "head": copy.deepcopy(head)}
    real = Batch(
        torch.rand(4, *family.shape) * 2 - 1, Conditioning(label=torch.tensor([0, 1, 2, 0])), Conditioning()
    )
    kept: dict[str, dict[str, Tensor]] = {}
    for trainable in (trainer.student, trainer.critic):
        monkeypatch.setattr(
            trainable, "update", lambda step, p=trainable: kept.update({p.name: gradients(p.module)}) or {}
        )

    torch.manual_seed(7)
    metrics = trainer.step(real, step=0)

    torch.manual_seed(7)
    expected, formulas = by_formulas(plain, teacher, real, gan)
    for name, value in expected.items():
        torch.testing.assert_close(metrics[name], value, rtol=1e-5, atol=1e-6)
    assert kept["student"].keys() == formulas["student"].keys()
    for who, table in formulas.items():
        for name, gradient in table.items():
            torch.testing.assert_close(
                kept[who][name], gradient, rtol=1e-5, atol=1e-6, msg=partial("{}: {}".format, name)
            )


def by_formulas(
    nets: dict[str, Any], teacher: nn.Module, real: Batch, gan: GanConfig | None
) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """Losses and gradients of both trainables. Noise is drawn in the order of the trainer: one draw per look."""
    student, critic, head = nets["student"], nets["critic"], nets["head"]
    label, shape = real.cond["label"], real.x.shape

    def look(low: int, high: int) -> tuple[Tensor, Tensor]:
        return karras(torch.randint(low, high, (4,))), torch.randn(shape)

    x = denoised(student, 80 * torch.randn(shape), torch.full((4, 1, 1, 1), 80.0), label)

    sigma, eps = look(20, 981)
    with torch.no_grad():
        x_t = x + sigma * eps
        of_teacher, of_critic = denoised(teacher, x_t, sigma, label), denoised(critic, x_t, sigma, label)
        g = (of_critic - of_teacher) / (x - of_teacher).abs().mean(dim=(1, 2, 3), keepdim=True)
    loss_dm = 0.5 * ((x - (x - g).detach()) ** 2).mean()
    losses, total = {"student/dmd": loss_dm}, loss_dm
    if gan:
        sigma, eps = look(0, 1000)
        logits = head(raw(critic, x + sigma * eps, sigma, label, features=True))
        losses["student/gan"] = gan.student_weight * torch.log1p(torch.exp(-logits)).mean()
        total = total + losses["student/gan"]
    total.backward()
    tables = {"student": gradients(student)}
    both = nn.ModuleDict({"network": critic} | ({"head": head} if gan else {}))
    both.zero_grad(set_to_none=True)

    fake = x.detach()
    total = torch.zeros(())
    if gan:
        sigma, eps = look(0, 1000)
        real_logits = head(raw(critic, real.x + sigma * eps, sigma, label, features=True))
        sigma, eps = look(0, 1000)
        fake_logits = head(raw(critic, fake + sigma * eps, sigma, label, features=True))
        adversarial = torch.log1p(torch.exp(fake_logits)).mean() + torch.log1p(torch.exp(-real_logits)).mean()
        losses["critic/gan"] = gan.critic_weight * adversarial
        total = total + losses["critic/gan"]
    sigma, eps = look(0, 1000)
    error = denoised(critic, fake + sigma * eps, sigma, label) - fake
    losses["critic/dmd"] = ((sigma**-2 + SIGMA_DATA**-2) * error**2).mean()
    (total + losses["critic/dmd"]).backward()
    return {name: loss.detach() for name, loss in losses.items()}, tables | {"critic": gradients(both)}


def gradients(module: nn.Module) -> dict[str, Tensor]:
    table = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    for parameter in module.parameters():
        parameter.grad = None
    return table
