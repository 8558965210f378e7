"""From a Config to the objects that act on it. The only module where a technique is switched on or off."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from dmd2 import config as c
from dmd2.batch import Batch
from dmd2.denoiser import Denoiser, classifier_free_guidance
from dmd2.encoders.vae import load_vae
from dmd2.errors import Refused
from dmd2.models.family import CondPair, ModelFamily, make_family
from dmd2.parallel import ranks, sharding
from dmd2.parallel.ranks import World
from dmd2.rng import Rng, draw_shared, reseed
from dmd2.sampler import Rollouts, backward_simulation, denoise_real
from dmd2.training import losses, memory
from dmd2.training.activation import checkpointed, compiled
from dmd2.training.optim import HEAD, trainable
from dmd2.training.terms import (
    Adversarial,
    CriticPasses,
    DistributionMatching,
    LossTerm,
    TeacherPrediction,
    separate_passes,
    shared_noise_passes,
)
from dmd2.training.trainer import DiffusionTrainer, DMD2Trainer, RegressionTrainer

logger = logging.getLogger(__name__)


def diffusion_trainer(config: c.Config, world: World) -> DiffusionTrainer:
    """A network that learns to be a teacher."""
    reseed(config.seed)
    repeatable(config.engine.deterministic)
    fam, settings = make_family(config.family), config.teach
    network = fam.network().to(world.device)
    mesh = world.device_mesh(config.engine.shards)
    if mesh:
        sharding.shard(network, fam.blocks(network), mesh, torch.float32, resident=True)

    def timesteps(noise: Tensor) -> Tensor:
        return fam.diffusion.nearest_timestep(settings.p_mean + settings.p_std * noise)

    return DiffusionTrainer(
        trainable("teacher", network, settings.optimizer, settings.steps), fam.denoiser(network), timesteps
    )


@dataclass(frozen=True)
class Start:
    """Where student and critic start, if not at the teacher: weights of an earlier run."""

    student: Mapping[str, Tensor]
    critic: Mapping[str, Tensor] | None = None


Prompts = Callable[[Rng], CondPair]
"""Draws what fakes show, a prompt for each row."""


def trainer(
    config: c.Config,
    fam: ModelFamily,
    teacher: Mapping[str, Tensor],
    world: World,
    start: Start | None = None,
    prompts: Prompts | None = None,
) -> DMD2Trainer | RegressionTrainer:
    """What the recipe plays: DMD2, or the regression that comes before it.

    `teacher` are its weights, and `start` those of an earlier run, on the main process; the others give none, and no
    process holds more than one whole float32 copy. `prompts` draws what fakes show; without it, they show what the real
    samples of the step do.
    """
    if prompts and (config.distill.regression or config.distill.inputs == "noised-real"):
        raise Refused(
            "prompts are given, but this recipe learns from samples with captions of their own; leave out --prompts"
        )
    reseed(config.seed)
    repeatable(config.engine.deterministic)
    if world.is_main and ranks.is_emulated(world.device, getattr(torch, config.distill.dtype)):
        logger.warning(
            "%s is emulated on this device, many times slower than float32: --distill.dtype float32",
            config.distill.dtype,
        )
    mesh = world.device_mesh(config.engine.shards)
    networks = _networks(config, fam, teacher, world, mesh, start)
    if config.engine.activation_checkpointing != "none":
        for network in networks[1:]:
            checkpointed(fam, network, config.engine.activation_checkpointing)
    for network in networks if config.engine.compile else ():
        compiled(fam, network)
    if config.distill.regression:
        return _regression_trainer(config, fam, networks[1], world.device)
    return _dmd2_trainer(config, fam, *networks, world, mesh, prompts)


def _networks(
    config: c.Config,
    fam: ModelFamily,
    weights: Mapping[str, Tensor],
    world: World,
    mesh: DeviceMesh | None,
    start: Start | None,
) -> tuple[nn.Module, nn.Module, nn.Module]:
    """Teacher, student and critic, on the device and divided as the mesh says. The teacher keeps its weights in the type it
    computes in."""
    settings = config.distill
    lora, dtype = settings.lora, getattr(torch, settings.dtype)
    if lora and start:
        raise Refused("a low-rank student starts as its teacher; leave out --start, or set lora to None")
    resident = mesh is None or is_resident(config, fam, mesh.shape[-1], world)
    shared = bool(lora and lora.shared_base) or settings.regression is not None

    def placed(weights: Mapping[str, Tensor], dtype: torch.dtype, learns: bool, divided: bool) -> nn.Module:
        with torch.device("meta"):
            network = fam.network().to(dtype).requires_grad_(learns)
        if mesh and divided:
            sharding.shard(network, fam.blocks(network), mesh, computed, resident=resident)
        network = network.to_empty(device=world.device)
        sharding.broadcast_state_dict(network, weights, world)
        return network

    computed = dtype
    teacher = placed(weights, dtype, learns=False, divided=not resident and not lora)
    if lora:
        student = updated(teacher, fam, lora, mesh, dtype)
    else:
        student = placed(start.student if start else weights, torch.float32, learns=True, divided=True)
    if shared:
        critic = updated(teacher, fam, lora, mesh, dtype) if lora and not settings.regression else teacher
    else:
        its = start.critic if start and start.critic else weights
        critic = placed(its, torch.float32, learns=True, divided=True)
    return teacher, student, critic


def updated(
    base: nn.Module, fam: ModelFamily, lora: c.LoraConfig, mesh: DeviceMesh | None, dtype: torch.dtype
) -> nn.Module:
    """A network with a low-rank update of its own, on a base that stays whole on every process."""
    from dmd2.models import lora as low_rank

    network = low_rank.add_low_rank_update(base, fam.lora_targets, lora)
    if mesh:
        frozen = [p for p in network.parameters() if not p.requires_grad]
        sharding.shard(network, fam.blocks(network), mesh, dtype, resident=True, ignored=frozen)
    return network


def is_resident(config: c.Config, fam: ModelFamily, shards: int, world: World) -> bool:
    """Whether every process keeps the networks whole, and why."""
    if config.engine.weights != "auto":
        return config.engine.weights == "resident"
    needed, there = memory.static_gb(config, fam, (1, shards), resident=True), memory.device_gb(world.device)
    # Devices may differ, and all processes must do alike.
    resident = bool(world.broadcast_int(int(needed <= memory.ROOM * there)))
    if world.is_main:
        logger.info(
            f"weights {'resident' if resident else 'sharded'}: whole networks would take {needed:.1f} GB of the {there:.1f} GB "
            f"of a device, {'at most' if resident else 'more than'} {memory.ROOM:.0%} (--engine.weights chooses)",
        )
    return resident


def _regression_trainer(
    config: c.Config, fam: ModelFamily, student: nn.Module, device: torch.device
) -> RegressionTrainer:
    settings = config.distill
    assert settings.regression is not None
    return RegressionTrainer(
        trainable("student", student, settings.student, settings.steps),
        Denoiser(student, fam.diffusion, getattr(torch, settings.dtype)),
        settings.student_timesteps[0],
        _distance(settings.regression, fam, device),
        config.engine.micro_batch,
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
    pixels = load_vae(settings.decoder).to_pixels if settings.decoder else fam.to_pixels
    return lambda x, answer: compare(pixels(x), pixels(answer))


def _dmd2_trainer(
    config: c.Config,
    fam: ModelFamily,
    teacher: nn.Module,
    student_network: nn.Module,
    critic_network: nn.Module,
    world: World,
    mesh: DeviceMesh | None,
    prompts: Prompts | None,
) -> DMD2Trainer:
    settings, dtype = config.distill, getattr(torch, config.distill.dtype)
    student, critic = (Denoiser(n, fam.diffusion, dtype) for n in (student_network, critic_network))
    critics = nn.ModuleDict({"network": critic.network})
    terms: list[LossTerm] = []
    if settings.dmd:
        guide = _teacher(Denoiser(teacher, fam.diffusion, dtype), settings.guidance)
        terms.append(DistributionMatching(guide, critic, _timestep_range(settings.dmd, len(fam.diffusion))))
    if settings.gan:
        critics[HEAD] = _head(fam, world, mesh)
        max_timestep = max(1, round(settings.gan.max_timestep_fraction * len(fam.diffusion)))
        terms.append(
            Adversarial(
                critic, critics[HEAD], max_timestep, settings.gan.student_weight, settings.gan.critic_weight
            )
        )
    return DMD2Trainer(
        trainable("student", student.network, settings.student, settings.steps),
        trainable("critic", critics, settings.critic, settings.steps),
        terms,
        _generate(config, student, prompts),
        settings.critic_updates,
        config.engine.micro_batch,
        _passes(settings, terms),
        continues_rollouts=settings.continue_rollouts,
    )


def _head(fam: ModelFamily, world: World, mesh: DeviceMesh | None) -> nn.Module:
    """In float32, and the same on every process at the start."""
    head = fam.head().to(world.device)
    if mesh:
        sharding.shard(head, [], mesh, torch.float32, resident=True)
    return head


def _passes(settings: c.DistillConfig, terms: Sequence[LossTerm]) -> CriticPasses:
    match terms:
        case [DistributionMatching() as dmd, Adversarial() as gan] if (
            settings.gan and settings.gan.reuse_denoising_pass
        ):
            return shared_noise_passes(dmd, gan)
        case _:
            return separate_passes(terms)


def _generate(config: c.Config, student: Denoiser, prompts: Prompts | None) -> Callable[[Batch, int], Batch]:
    settings = config.distill
    if settings.continue_rollouts:
        return Rollouts(student, settings.student_timesteps, settings.critic_updates, config.seed, prompts)

    def generate(real: Batch, step: int) -> Batch:
        shown = real if prompts is None else replace(real, **prompts(real.rng)._asdict())
        if settings.inputs == "noised-real":
            return replace(shown, x=denoise_real(student, shown, settings.student_timesteps))
        stop = draw_shared(config.seed, step, len(settings.student_timesteps))
        noise = real.rng.normal_like
        x = backward_simulation(student, noise(real.x), shown.cond, settings.student_timesteps, stop, noise)
        return replace(shown, x=x)

    return generate


def repeatable(on: bool) -> None:
    """Whether this process uses only what gives the same bits every time, and refuses to compute what nothing of that kind
    exists for."""
    if on:  # read by cuBLAS when it starts, and by torch at every product
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(on)
    torch.backends.cudnn.benchmark = not on  # shapes stay, so that the fastest kernels are looked for once


def _teacher(denoiser: Denoiser, scale: float) -> TeacherPrediction:
    return (
        classifier_free_guidance(denoiser, scale)
        if scale != 1
        else lambda x_t, timestep, sample: denoiser(x_t, timestep, sample.cond)
    )


def _timestep_range(settings: c.DmdConfig, count: int) -> tuple[int, int]:
    """[low, high) from shares of the table whose upper end is included."""
    return int(settings.min_timestep_fraction * count), min(
        count, int(settings.max_timestep_fraction * count) + 1
    )
