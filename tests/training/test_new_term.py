"""A loss term from outside the package: one class and one row of `build.TERMS`; the trainer, the plan and the memory follow.

The term is f-distill (Xu, Nie and Vahdat 2025, arXiv 2502.15681). It weights the difference of the scores in DMD's gradient by
h(r) = f''(r) r^2 of an f-divergence, where r is the density ratio of real to fake samples under noise, read from the GAN's
discriminator: r = exp(logit). The reverse KL divergence has h(r) = 1, which is DMD. Jensen-Shannon has h(r) = r / (1 + r).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from dmd2 import stages
from dmd2.batch import Batch, Conditioning
from dmd2.config import Config, DistillConfig, DmdConfig, GanConfig
from dmd2.data.loader import RawBatch
from dmd2.errors import Refused
from dmd2.io.artifact import read_manifest
from dmd2.models.family import make_family
from dmd2.plan import passes, step_costs
from dmd2.rng import Rng
from dmd2.training import build, losses, memory
from dmd2.training.metrics_log import read_metrics
from dmd2.training.terms import (
    HEAD,
    Adversarial,
    DistributionMatching,
    LossTerm,
    TermInputs,
    TermKind,
    noise_at_random_timestep,
)
from tests.conftest import make_trainer
from tests.plan.test_plan import counted, predicted

WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "reverse-kl": torch.ones_like,
    "jensen-shannon": torch.sigmoid,  # r / (1 + r) at r = exp(logit)
}


class FDistillConfig(DmdConfig):
    divergence: Literal["reverse-kl", "jensen-shannon"]


class FDistill(DistributionMatching):
    name = "f-distill"

    def __init__(self, inputs: TermInputs, settings: FDistillConfig) -> None:
        if HEAD not in inputs.critic_modules:
            raise Refused("f-distill reads the discriminator of the GAN; set distill.gan")
        timesteps = build.timestep_range(settings, inputs.num_timesteps)
        super().__init__(inputs.teacher, inputs.critic, timesteps, inputs.feature_losses)
        self.head = inputs.critic_modules[HEAD]
        self.weight = WEIGHTS[settings.divergence]

    def student_loss(self, fake: Batch) -> Tensor:
        diffusion = self.critic.diffusion
        with torch.no_grad():
            x_t, timestep = noise_at_random_timestep(fake, diffusion, *self.timesteps)
            x0_teacher = self.teacher(x_t, timestep, fake)
            out, features = self.critic.output_and_features(x_t, timestep, fake.cond)
            logits = self.head(features).reshape(len(fake.x), -1).mean(1)
            weight = self.weight(logits).reshape(-1, 1, 1, 1)
            difference = diffusion.to_x0(out, x_t, timestep) - x0_teacher
        return losses.distribution_matching(fake.x, x0_teacher, x0_teacher + weight * difference)


def second_discriminator(inputs: TermInputs, settings: GanConfig) -> LossTerm:
    """A second GAN with a head of its own."""
    head = inputs.critic_module("second head", inputs.family.head)
    weights = settings.student_weight, settings.critic_weight
    term = Adversarial(inputs.critic, head, inputs.num_timesteps, *weights)
    term.name = "second gan"
    return term


@pytest.fixture(autouse=True)
def rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(build.TERMS, "f-distill", TermKind(FDistillConfig, FDistill))
    monkeypatch.setitem(build.TERMS, "second gan", TermKind(GanConfig, second_discriminator))


def with_distill(config: Config, **changes: object) -> Config:
    distill = DistillConfig.model_validate({**dict(config.distill), **changes})
    return config.model_copy(update={"distill": distill})


def f_distill(micro: Config, divergence: str) -> Config:
    return with_distill(micro, dmd=None, extra_terms={"f-distill": {"divergence": divergence}})


def batch(config: Config, rows: int) -> Batch:
    x = torch.randn(rows, *make_family(config.family).shape)
    rng = Rng.at(0, 0, range(rows), torch.device("cpu"))
    return Batch(x, Conditioning(label=torch.arange(rows) % 3), Conditioning(), rng)


def test_a_run_trains_with_the_term(micro: Config, made: Path, tmp_path: Path) -> None:
    config = f_distill(micro, "jensen-shannon")
    run = stages.distill(config, str(made / "shards"), str(made / "teacher"), str(tmp_path / "run"))
    logged = {name for line in read_metrics(tmp_path / "run") for name in line}
    assert {"student/f-distill", "critic/f-distill", "student/gan", "critic/gan"} <= logged
    assert "student/dmd" not in logged
    assert read_manifest(tmp_path / "run", "run").config == config
    assert run.digest != read_manifest(made / "run", "run").digest


def test_with_the_reverse_kl_divergence_the_term_is_dmd(micro: Config) -> None:
    config = f_distill(micro, "reverse-kl")
    torch.manual_seed(0)
    teacher = make_family(config.family).network()
    for parameter in teacher.parameters():
        nn.init.normal_(parameter, std=0.1)
    _, term = make_trainer(config, teacher).terms
    assert isinstance(term, FDistill)
    nn.init.normal_(next(iter(term.critic.parameters())))  # away from the teacher, where the gradient is zero
    plain = DistributionMatching(term.teacher, term.critic, term.timesteps)

    def gradient(term: LossTerm) -> Tensor:
        fake = batch(config, 4)
        torch.manual_seed(1)
        leaf = Batch(torch.ones_like(fake.x).requires_grad_(), fake.cond, fake.uncond, fake.rng)
        return torch.autograd.grad(term.student_loss(leaf), leaf.x)[0]

    assert gradient(plain).abs().sum() > 0
    torch.testing.assert_close(gradient(term), gradient(plain))
    term.weight = WEIGHTS["jensen-shannon"]
    assert not torch.allclose(gradient(term), gradient(plain))


@pytest.mark.parametrize("divergence", ["reverse-kl", "jensen-shannon"])
def test_the_plan_counts_the_flops_of_the_real_steps(micro: Config, divergence: str) -> None:
    config = f_distill(micro, divergence)
    fam = make_family(config.family)
    real = batch(config, config.distill.batch)
    assert predicted(config, make_family(config.family)) == counted(config, fam, fam.network(), real)


def test_a_term_with_a_module_of_its_own_is_trained_and_is_in_plan_and_memory(micro: Config) -> None:
    weights = {"student_weight": 0.1, "critic_weight": 0.2}
    config = with_distill(micro, extra_terms={"second gan": weights})
    fam = make_family(config.family)
    head = memory.num_weights(fam.head())
    before, after = build.sizes(micro, fam), build.sizes(config, fam)
    assert (after.term_modules, after.critic_passes) == (before.term_modules + head, before.critic_passes + 1)

    small, large = (memory.static(config, of, 1, resident=True, micro_batches=1) for of in (before, after))
    assert large["head: weights"] == 2 * small["head: weights"]

    small_plan, large_plan = (passes.fake_trainer(one, fam) for one in (micro, config))
    extra = passes.mean_calls(large_plan).keys() - passes.mean_calls(small_plan).keys()
    assert extra == {"student loss second gan", "critic loss second gan"}
    added = step_costs.checkpoint_bytes(large_plan) - step_costs.checkpoint_bytes(small_plan)
    assert added == 3 * memory.FLOAT32 * head

    trainer = make_trainer(config, fam.network())
    module = trainer.critic.module["second head"]  # type: ignore[index]
    start = [p.detach().clone() for p in module.parameters()]
    trainer.step(batch(config, config.distill.batch), 1)
    assert not all(torch.equal(was, now) for was, now in zip(start, module.parameters(), strict=True))
    real = batch(config, config.distill.batch)
    assert predicted(config, make_family(config.family)) == counted(config, fam, fam.network(), real)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"extra_terms": {"f-distil": {}}}, "unknown loss term 'f-distil'; did you mean 'f-distill'?"),
        ({"extra_terms": {"f-distill": {"divergence": "x"}}}, "distill.extra_terms, f-distill: divergence: "),
        ({"extra_terms": {"f-distill": {"divergence": "reverse-kl"}}, "gan": None}, "set distill.gan"),
    ],
)
def test_a_term_that_cannot_be_built_is_refused(
    micro: Config, changes: dict[str, object], sentence: str, refusal: Callable[..., str]
) -> None:
    config = with_distill(micro, **changes)
    network = make_family(config.family).network()
    assert sentence in refusal(lambda: make_trainer(config, network))


def test_a_built_in_term_is_set_in_its_own_section(micro: Config) -> None:
    with pytest.raises(ValueError, match="extra_terms has gan, which has a section of its own"):
        with_distill(micro, extra_terms={"gan": {"student_weight": 1.0, "critic_weight": 1.0}})


@pytest.mark.parametrize("reuse", [False, True])
def test_with_the_gan_alone_the_critic_still_denoises(micro: Config, reuse: bool) -> None:
    assert micro.distill.gan
    gan = micro.distill.gan.model_copy(update={"reuse_denoising_pass": reuse})
    both, alone = with_distill(micro, gan=gan), with_distill(micro, gan=gan, dmd=None)
    teacher = make_family(micro.family).network()
    batch = make_family(micro.family).read(
        RawBatch(torch.zeros(4, 1, 8, 8, dtype=torch.uint8), torch.tensor([0, 1, 2, 0]), ("",) * 4),
        Rng.at(0, 0, range(4), torch.device("cpu")),
    )
    trainer = make_trainer(alone, teacher)
    passes = [[one.reaches_output for one in make_trainer(made, teacher).passes] for made in (both, alone)]
    assert passes[0] == passes[1]
    found = trainer.step(batch, 0)
    assert found["critic/denoising"] > 0
    assert found["student/denoising_grad_l1"] == 0
    assert found["student/gan_grad_l1"] > 0
    assert not any("dmd" in name for name in found)
