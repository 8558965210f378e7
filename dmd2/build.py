"""From a Config to the objects that act on it. The only module where a technique is switched on or off."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dmd2 import config as c
from dmd2 import losses, parallel
from dmd2.data.encoders import load_vae
from dmd2.denoiser import Denoiser, guided
from dmd2.ema import Average
from dmd2.errors import Refused
from dmd2.models.edm import Edm
from dmd2.models.family import ModelFamily, Shown
from dmd2.sample import Sample
from dmd2.sampler import denoise_real, simulate
from dmd2.terms import Adversarial, DistributionMatching, Teacher, Term
from dmd2.trainer import Player, Regression, Teaching, Trainer


def family(config: c.FamilyConfig, frozen: Path | None = None, vae: str = "") -> ModelFamily:
    """`frozen` is a folder with what does not learn: VAE, text encoders, configs; without it only what needs none. `vae`
    is another one to make images with."""
    if isinstance(config, c.EdmConfig):
        return Edm(config, frozen)
    from dmd2.models.sd15 import Sd15  # diffusers takes seconds to import
    from dmd2.models.sdxl import Sdxl
    from dmd2.models.stable import published

    kinds = {"sd15": Sd15, "sdxl": Sdxl}
    return kinds[config.kind](config, frozen or published(config.kind), vae)


def teaching(config: c.Config, device: torch.device) -> Teaching:
    """A network that learns to be a teacher."""
    parallel.reseed(config.seed, 0, 0)
    fam, settings = family(config.family), config.teach
    network = fam.network().to(device)

    def levels(count: int) -> Tensor:
        return fam.diffusion.nearest(settings.p_mean + settings.p_std * torch.randn(count))

    return Teaching(
        player("teacher", network, settings.player, settings.steps), fam.denoiser(network), levels
    )


@dataclass(frozen=True)
class Start:
    """Where student and critic start, if not at the teacher: weights of an earlier run."""

    student: Mapping[str, Tensor]
    critic: Mapping[str, Tensor] | None = None


def game(
    config: c.Config,
    fam: ModelFamily,
    teacher: nn.Module,
    device: torch.device,
    start: Start | None = None,
    prompts: Callable[[int], Shown] | None = None,
) -> Trainer | Regression:
    """What the recipe plays: DMD2, or the regression that comes before it.

    `prompts` draws what so many fakes show; without it, they show what the real samples of the step do.
    """
    if prompts and (config.distill.regression or config.distill.inputs == "noised-real"):
        raise Refused(
            "prompts are given, but this recipe learns from samples with captions of their own; leave out --prompts"
        )
    parallel.reseed(config.seed, 0, 0)
    teacher = teacher.to(device).requires_grad_(False)
    networks = _networks(config.distill, teacher, start)
    if config.distill.checkpointing:
        for network in networks:
            checkpointed(fam, network)
    if config.distill.regression:
        return _regression(config, fam, networks[0], device)
    return _trainer(config, fam, teacher, *networks, device, prompts)


def _networks(
    settings: c.DistillConfig, teacher: nn.Module, start: Start | None
) -> tuple[nn.Module, nn.Module]:
    """Student and critic. The teacher keeps its weights in the type it computes in."""
    lora, dtype = settings.lora, getattr(torch, settings.dtype)
    if lora and start:
        raise Refused("a low-rank student starts as its teacher; leave out --start, or set lora to None")
    alone = settings.regression is not None  # nobody to play against
    critic = teacher if alone or (lora and lora.shared_base) else copy.deepcopy(teacher).requires_grad_(True)
    student = teacher if lora else copy.deepcopy(teacher).requires_grad_(True)
    teacher.to(dtype)
    if start:
        student.load_state_dict(start.student)
        if start.critic:
            critic.load_state_dict(start.critic)
    if lora:
        from dmd2.models.lora import updated

        student = updated(teacher, lora)
        critic = updated(teacher, lora) if lora.shared_base and not alone else critic
    return student, critic


def _regression(config: c.Config, fam: ModelFamily, student: nn.Module, device: torch.device) -> Regression:
    settings = config.distill
    assert settings.regression is not None
    return Regression(
        player("student", student, settings.student, settings.steps),
        Denoiser(student, fam.diffusion, getattr(torch, settings.dtype)),
        settings.student_levels[0],
        _distance(settings.regression, fam, device),
        settings.micro_batch,
    )


def _distance(
    settings: c.RegressionConfig, fam: ModelFamily, device: torch.device
) -> Callable[[Tensor, Tensor], Tensor]:
    """Of two samples, as pictures."""
    if settings.metric == "lpips":
        from dmd2.evaluation.perceptual import lpips

        compare = lpips(settings.vgg, device)
    else:
        compare = losses.denoising
    pixels = load_vae(settings.decoder).pixels if settings.decoder else fam.pixels
    return lambda x, answer: compare(pixels(x), pixels(answer))


def _trainer(
    config: c.Config,
    fam: ModelFamily,
    teacher: nn.Module,
    student_network: nn.Module,
    critic_network: nn.Module,
    device: torch.device,
    prompts: Callable[[int], Shown] | None,
) -> Trainer:
    settings, dtype = config.distill, getattr(torch, config.distill.dtype)
    student, critic = (Denoiser(n, fam.diffusion, dtype) for n in (student_network, critic_network))
    critics = nn.ModuleDict({"network": critic.network})
    terms: list[Term] = []
    if settings.dmd:
        guide = _teacher(Denoiser(teacher, fam.diffusion, dtype), settings.guidance)
        terms.append(DistributionMatching(guide, critic, _levels(settings.dmd, len(fam.diffusion))))
    if settings.gan:
        critics["head"] = fam.head().to(device)
        max_level = max(1, round(settings.gan.max_level * len(fam.diffusion)))
        terms.append(
            Adversarial(
                critic, critics["head"], max_level, settings.gan.student_weight, settings.gan.critic_weight
            )
        )

    def draw(shown: Sample, step: int) -> Tensor:
        if settings.inputs == "noised-real":
            return denoise_real(student, shown, settings.student_levels)
        stop = parallel.draw_shared(config.seed, step, len(settings.student_levels))
        return simulate(student, torch.randn_like(shown.x), shown.cond, settings.student_levels, stop)

    def generate(real: Sample, step: int) -> Sample:
        shown = real if prompts is None else Sample(real.x, *prompts(len(real.x)))
        return replace(shown, x=draw(shown, step))

    return Trainer(
        player("student", student.network, settings.student, settings.steps),
        player("critic", critics, settings.critic, settings.steps),
        terms,
        generate,
        settings.critic_updates,
        settings.micro_batch,
    )


def checkpointed(fam: ModelFamily, network: nn.Module) -> None:
    """Let each of the family's units, but those that hold others, compute its activations again when they are needed."""
    units = list(fam.blocks(network))
    for unit in units:
        if not any(other is not unit and other in units for other in unit.modules()):
            unit.forward = partial(checkpoint, unit.forward, use_reentrant=False)


def player(name: str, module: nn.Module, settings: c.Player, steps: int) -> Player:
    optimizer = torch.optim.AdamW(
        [p for p in module.parameters() if p.requires_grad],
        lr=settings.lr,
        betas=settings.betas,
        weight_decay=settings.weight_decay,
        fused=True,
    )

    def lr(step: int) -> float:
        if step < settings.warmup:
            return settings.lr * (step + 1) / settings.warmup
        gone = (step - settings.warmup) / max(1, steps - settings.warmup)
        return settings.lr * (1 - gone * (1 - settings.final))

    averages = [Average(module, decay) for decay in settings.ema]
    return Player(name, module, optimizer, lr, settings.max_grad_norm, averages)


def _teacher(denoiser: Denoiser, scale: float) -> Teacher:
    return (
        guided(denoiser, scale)
        if scale != 1
        else lambda x_t, level, sample: denoiser(x_t, level, sample.cond)
    )


def _levels(settings: c.DmdConfig, count: int) -> tuple[int, int]:
    """[low, high) from shares of the table whose upper end is included."""
    return int(settings.min_level * count), min(count, int(settings.max_level * count) + 1)
