"""From a Config to a trainer. The only module where a technique is switched on or off."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from dmd2 import config as c
from dmd2.denoiser import Denoiser, classifier_free_guidance
from dmd2.encoders.vae import load_vae
from dmd2.errors import Refused, near_miss
from dmd2.models.family import ModelFamily, make_family
from dmd2.parallel import ranks, sharding
from dmd2.parallel.ranks import World
from dmd2.rng import reseed
from dmd2.training import losses, memory, networks
from dmd2.training.activation import apply_activation_checkpointing, compile_units, missing_for_compiling
from dmd2.training.compile_cache import CompileCache
from dmd2.training.networks import DistillNetworks, Start
from dmd2.training.optim import NETWORK, trainable
from dmd2.training.rollout import BackwardSimulation, ContinuedRollouts, NoisedReal, SampleStudent
from dmd2.training.terms import (
    HEAD,
    Adversarial,
    CriticDenoising,
    DistributionMatching,
    LossTerm,
    TeacherPrediction,
    TermInputs,
    TermKind,
    critic_passes,
)
from dmd2.training.trainer import DiffusionTrainer, DMD2Trainer, RegressionTrainer

logger = logging.getLogger(__name__)


def diffusion_trainer(config: c.Config, world: World) -> DiffusionTrainer:
    """The trainer of a small teacher, for demos, tests and ablations."""
    reseed(config.seed)
    set_deterministic(config.engine.deterministic)
    fam, settings = make_family(config.family), config.teach
    network = fam.network().to(world.device)
    mesh = world.device_mesh(config.engine.shards)
    if mesh:
        sharding.shard(network, fam.blocks(network), mesh, torch.float32, resident=True)

    def timesteps(noise: Tensor) -> Tensor:
        return fam.diffusion.nearest_timestep(settings.p_mean + settings.p_std * noise)

    return DiffusionTrainer(
        trainable("teacher", network, settings.optimizer, settings.steps, config.seed),
        fam.denoiser(network),
        timesteps,
    )


def trainer(
    config: c.Config,
    fam: ModelFamily,
    teacher: Mapping[str, Tensor],
    world: World,
    start: Start | None = None,
) -> DMD2Trainer | RegressionTrainer:
    """The trainer of a distillation: DMD2, or the regression that warms up a one-step student.

    `teacher` are the teacher's weights, and `start` those of an earlier run, on the main process; other processes give none,
    and no process holds more than one whole float32 copy. Raises Refused for combinations that no trainer supports.
    """
    settings, engine = config.distill, config.engine
    reseed(config.seed)
    set_deterministic(engine.deterministic)
    _warn_if_emulated(settings.dtype, world)
    mesh = world.device_mesh(engine.shards) or _mesh_of_one(config, world)
    resident = mesh is None or is_resident(config, fam, mesh.shape[-1], world)
    nets = networks.on_device(config, fam, teacher, world, mesh, start, resident)
    if engine.activation_checkpointing != "none":
        for network in (nets.student, nets.critic):
            apply_activation_checkpointing(fam, network, engine.activation_checkpointing)
    if compiles(engine, world):
        # Longer than the watch of hang_watch.py, which can say who is slow.
        waits = timedelta(seconds=engine.compile_timeout_s + engine.hang_timeout_s)
        world.extend_collective_timeout(waits, mesh)
        CompileCache(engine.compile_cache, world).load()
        for network in nets.called():
            compile_units(fam, network)
    if settings.regression:
        return _regression_trainer(config, settings.regression, fam, nets, world.device)
    terms, critic_modules = loss_terms(config, fam, nets, lambda make: _on_device(make, world, mesh))
    return DMD2Trainer(
        trainable("student", nets.student, settings.student, settings.steps, config.seed),
        trainable("critic", critic_modules, settings.critic, settings.steps, config.seed),
        terms,
        sample_student(config, student_denoiser(config, fam, nets)),
        settings.critic_updates,
        engine.micro_batch,
        continues_rollouts=settings.continue_rollouts,
    )


def loss_terms(
    config: c.Config,
    fam: ModelFamily,
    nets: DistillNetworks,
    place: Callable[[Callable[[], nn.Module]], nn.Module],
) -> tuple[list[LossTerm], nn.ModuleDict]:
    """The loss terms that are switched on, and the modules that learn with the critic; see TermInputs for `place`.

    Raises Refused for terms that are not in TERMS, and for settings that a term does not accept.
    """
    critic = learning_denoiser(config, fam, nets, nets.critic)
    # Computed as the critic's score is, or rounding would show as a difference of the two.
    teacher = _teacher(Denoiser(nets.teacher, fam.diffusion, nets.autocast), config.distill.guidance)
    inputs = TermInputs(fam, teacher, critic, place, nn.ModuleDict({NETWORK: nets.critic}))
    settings = config.distill.term_settings()
    terms = [_kind(name).make(inputs, _checked(name, values)) for name, values in settings.items()]
    if config.distill.gan and not any(one.reaches_output for one in critic_passes(terms)):
        terms.append(
            CriticDenoising(critic, inputs.feature_losses)
        )  # the features of a critic that knows the fakes
    if inputs.feature_losses and not any(
        isinstance(term, DistributionMatching | CriticDenoising) for term in terms
    ):
        raise Refused(
            f"{', '.join(inputs.feature_losses)} reuses the denoising pass of the critic, and no term has one; turn "
            "distill.gan.reuse_denoising_pass off, or distill.dmd on"
        )
    return terms, inputs.critic_modules


def _kind(name: str) -> TermKind:
    if name not in TERMS:
        raise Refused(
            f"distill.extra_terms has an unknown loss term {name!r}; {near_miss(name, list(TERMS))}"
        )
    return TERMS[name]


def _checked(name: str, values: c.Section | Mapping[str, Any]) -> c.Section:
    if isinstance(values, c.Section):
        return values
    try:
        return _kind(name).settings(**values)
    except ValueError as error:
        raise Refused(f"distill.extra_terms, {name}: {error}") from None


def _distribution_matching(inputs: TermInputs, settings: c.DmdConfig) -> LossTerm:
    timesteps = timestep_range(settings, inputs.num_timesteps)
    return DistributionMatching(inputs.teacher, inputs.critic, timesteps, inputs.feature_losses)


def _adversarial(inputs: TermInputs, settings: c.GanConfig) -> LossTerm:
    head = inputs.critic_module(HEAD, inputs.family.head)
    max_timestep = max(1, round(settings.max_timestep_fraction * inputs.num_timesteps))
    weights, reuse = (settings.student_weight, settings.critic_weight), settings.reuse_denoising_pass
    term = Adversarial(inputs.critic, head, max_timestep, *weights, reuse)
    if reuse:
        inputs.feature_losses[term.name] = term.fake_loss
    return term


TERMS: dict[str, TermKind] = {
    "dmd": TermKind(c.DmdConfig, _distribution_matching),
    "gan": TermKind(c.GanConfig, _adversarial),
}
"""The kinds of loss term by name. `dmd` and `gan` are switched on by their own section of `distill`, any other row by
`distill.extra_terms`; code outside this package adds a row before it calls a stage."""


def sizes(config: c.Config, fam: ModelFamily) -> memory.Sizes:
    """Numbers of weights of a recipe."""
    nets = networks.on_meta(config, fam)
    terms, critic_modules = loss_terms(config, fam, nets, place_on_meta)
    return memory.sizes(config, nets, critic_modules, fam.blocks(nets.student), len(critic_passes(terms)))


def place_on_meta(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return make()


def _mesh_of_one(config: c.Config, world: World) -> DeviceMesh | None:
    """For a process alone with an accelerator, where float32 weights are gathered in bfloat16 as on many: autocast would
    launch half as many kernels again; or where the teacher's wait in the host's memory. Else, and on the CPU, there is no mesh."""
    here = world.device.type not in ("cpu", "meta")
    return world.mesh_of_one() if here and networks.gathers_alone(config) else None


def _on_device(make: Callable[[], nn.Module], world: World, mesh: DeviceMesh | None) -> nn.Module:
    """A float32 module whose initial weights are the same on all ranks, since all draw them from the same seed."""
    module = make().to(world.device)
    if mesh:
        sharding.shard(module, [], mesh, torch.float32, resident=True)
    return module


def is_resident(config: c.Config, fam: ModelFamily, shards: int, world: World) -> bool:
    """Whether every process keeps the gathered networks in memory; says on the main process how `auto` was decided."""
    if config.engine.weights != "auto":
        return config.engine.weights == "resident"
    parts = memory.micro_batches(config, shards)
    needed = memory.total_gb(memory.static(config, sizes(config, fam), shards, True, parts))
    available = memory.device_gb(world.device)
    # Devices may differ, and all ranks must decide alike.
    resident = bool(world.broadcast_int(int(needed <= memory.MAX_STATIC_FRACTION * available)))
    if world.is_main:
        logger.info(
            f"weights {'resident' if resident else 'sharded'}: whole networks would take {needed:.1f} GB of the {available:.1f} GB "
            f"of a device, {'at most' if resident else 'more than'} {memory.MAX_STATIC_FRACTION:.0%} (--engine.weights chooses)",
        )
    return resident


def compiles(engine: c.EngineConfig, world: World) -> bool:
    """Whether units are compiled; says on the main process how `auto` was decided. Raises Refused where it is on and cannot be."""
    missing = missing_for_compiling(world.device)
    if engine.compile == "on" and missing:
        raise Refused(
            f"engine.compile is on, and torch.compile needs {missing}, which this machine lacks; set it to auto or off, or install it"
        )
    if engine.compile != "auto":
        return engine.compile == "on"
    against = [
        *(["this is no GPU"] if world.device.type != "cuda" else []),
        *(["engine.deterministic is on"] if engine.deterministic else []),
        *([f"torch.compile needs {missing}, which is not here"] if missing else []),
    ]
    # Machines may differ, and all ranks must compute alike.
    off = bool(world.all_reduce_sum(torch.tensor(int(bool(against)), device="cpu")))
    if world.is_main:
        reason = (
            against[0]
            if against
            else "another machine cannot"
            if off
            else "GPUs, triton and a C compiler are here"
        )
        logger.info(f"compile {'off' if off else 'on'}: {reason} (--engine.compile chooses)")
    return not off


def _regression_trainer(
    config: c.Config,
    regression: c.RegressionConfig,
    fam: ModelFamily,
    nets: DistillNetworks,
    device: torch.device,
) -> RegressionTrainer:
    settings = config.distill
    return RegressionTrainer(
        trainable("student", nets.student, settings.student, settings.steps, config.seed),
        student_denoiser(config, fam, nets),
        settings.student_timesteps[0],
        _image_distance(regression, fam, device, _dtype(config)),
        config.engine.micro_batch,
    )


def _image_distance(
    settings: c.RegressionConfig, fam: ModelFamily, device: torch.device, dtype: torch.dtype
) -> Callable[[Tensor, Tensor], Tensor]:
    """(samples of the student, samples of the teacher), both (B, C, H, W) -> the distance of their decoded images, a scalar."""
    if settings.metric == "lpips":
        from dmd2.evaluation.perceptual import lpips

        compare = lpips(settings.vgg, device)
    else:
        compare = losses.denoising
    pixels = load_vae(settings.decoder).to_pixels if settings.decoder else fam.to_pixels

    def distance(x: Tensor, x_teacher: Tensor) -> Tensor:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            return compare(pixels(x), pixels(x_teacher)).float()

    return distance


def sample_student(config: c.Config, student: Denoiser) -> SampleStudent:
    """How the recipe makes fake samples."""
    settings, timesteps = config.distill, config.distill.student_timesteps
    if settings.inputs == "noised-real":
        return NoisedReal(student, timesteps)
    if settings.continue_rollouts:
        return ContinuedRollouts(student, timesteps, settings.critic_updates, config.seed)
    return BackwardSimulation(student, timesteps, config.seed)


def set_deterministic(on: bool) -> None:
    """Let torch use only operations that give the same bits in every run, and raise for those that have no such kernel."""
    if on:  # cuBLAS reads it when it starts, and torch at every matrix product
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(on)
    torch.backends.cudnn.benchmark = (
        not on
    )  # shapes are constant, so one search for the fastest kernels is enough


def _warn_if_emulated(dtype: str, world: World) -> None:
    if world.is_main and ranks.is_emulated(world.device, getattr(torch, dtype)):
        logger.warning(
            "%s is emulated on this device, many times slower than float32: --distill.dtype float32", dtype
        )


def learning_denoiser(
    config: c.Config, fam: ModelFamily, nets: DistillNetworks, network: nn.Module
) -> Denoiser:
    """The denoiser of student or critic."""
    return Denoiser(network, fam.diffusion, nets.autocast, config.distill.no_grad_dtype == "tf32")


def student_denoiser(config: c.Config, fam: ModelFamily, nets: DistillNetworks) -> Denoiser:
    """The denoiser of the student, which calls merged weights where no gradient is asked for."""
    denoiser = learning_denoiser(config, fam, nets, nets.student)
    denoiser.no_grad_network = nets.merged.current if nets.merged else None
    return denoiser


def _teacher(denoiser: Denoiser, guidance: float) -> TeacherPrediction:
    if guidance != 1:
        return classifier_free_guidance(denoiser, guidance)
    return lambda x_t, timestep, batch: denoiser(x_t, timestep, batch.cond)


def timestep_range(settings: c.DmdConfig, num_timesteps: int) -> tuple[int, int]:
    """[low, high) of the timesteps whose fraction of the noise table is in the closed interval of the settings."""
    low, high = settings.min_timestep_fraction, settings.max_timestep_fraction
    return int(low * num_timesteps), min(num_timesteps, int(high * num_timesteps) + 1)


def _dtype(config: c.Config) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, config.distill.dtype)
    return dtype
