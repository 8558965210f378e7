"""Teacher, student and critic: on the device with the teacher's weights, or on the meta device, where only shapes are known."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from dmd2.config import Config, LoraConfig
from dmd2.denoiser import Network
from dmd2.errors import Refused
from dmd2.models.family import ModelFamily
from dmd2.parallel import sharding
from dmd2.parallel.ranks import World

if TYPE_CHECKING:
    from dmd2.models.lora import MergedNetwork


@dataclass(frozen=True)
class DistillNetworks:
    """The diffusion networks of a distillation. Weights that learn have `requires_grad`."""

    teacher: nn.Module
    student: nn.Module
    critic: nn.Module
    """The teacher where the recipe has no critic (regression)."""
    autocast: torch.dtype = torch.float32
    """The type to which autocast casts at every call; float32 = none, because the weights have the compute type already."""
    merged: MergedNetwork | None = None
    """The student's calls without gradient, if it is a low-rank update."""

    def named(self) -> dict[str, nn.Module]:
        """Each network once, by its role."""
        critic = {} if self.critic is self.teacher else {"critic": self.critic}
        return {"teacher": self.teacher, "student": self.student} | critic

    def called(self) -> list[nn.Module]:
        """All networks that are called."""
        return [*self.named().values(), *([self.merged.network] if self.merged else [])]


@dataclass(frozen=True)
class Start:
    """Weights of an earlier run from which student and critic start, instead of the teacher's."""

    student: Mapping[str, Tensor]
    critic: Mapping[str, Tensor] | None = None


def gathers_alone(config: Config) -> bool:
    """Whether a process alone with an accelerator has a mesh: where an all-gather makes bfloat16 weights of float32 ones, or copies
    those of the teacher from the host."""
    casts = config.distill.dtype == "bfloat16" and gathers_in_compute_type(config)
    return casts or config.engine.offload_teacher


def gathers_in_compute_type(config: Config) -> bool:
    """Whether an all-gather makes the weights of student and critic what they compute with, so that autocast has nothing to do."""
    return config.distill.no_grad_dtype == "same"


def on_device(
    config: Config,
    fam: ModelFamily,
    weights: Mapping[str, Tensor],
    world: World,
    mesh: DeviceMesh | None,
    start: Start | None,
    resident: bool,
) -> DistillNetworks:
    """The networks on the device, sharded over the mesh. The teacher's weights have the type it computes in, weights that
    learn are float32.

    `weights` are the teacher's, on the main process; other processes give none. Raises Refused for a LoRA with a `start`.
    """
    settings, dtype = config.distill, getattr(torch, config.distill.dtype)
    offloads = config.engine.offload_teacher
    gathered = dtype if gathers_in_compute_type(config) else torch.float32
    if settings.lora and start:
        raise Refused("a low-rank student starts as its teacher; leave out --start, or set lora to None")
    sources = {
        "student": start.student if start else weights,
        "critic": start.critic if start and start.critic else weights,
    }

    def whole(role: str) -> nn.Module:
        learns = role != "teacher"
        with torch.device("meta"):
            network = fam.network().to(torch.float32 if learns else dtype).requires_grad_(learns)
        offloaded = offloads and not learns
        if mesh and (learns or offloaded or not (resident or settings.lora)):
            gathered_type = gathered if learns else dtype
            units, stays = fam.blocks(network), resident and not offloaded
            sharding.shard(network, units, mesh, gathered_type, resident=stays, offload=offloaded)
            if not stays:
                sharding.prefetch_next_unit(network, units, cast(Network, network).decoder_start)
        network = network.to_empty(device="cpu" if offloaded else world.device)
        sharding.broadcast_state_dict(network, sources.get(role, weights), world)
        for module in network.modules():
            for name, buffer in module.named_buffers(recurse=False):  # they are not offloaded
                setattr(module, name, buffer.to(world.device))
        return network

    def low_rank(teacher: nn.Module, lora: LoraConfig) -> nn.Module:
        network = with_lora(teacher, fam, lora)
        if mesh:
            frozen = [p for p in network.parameters() if not p.requires_grad]
            sharding.shard(network, fam.blocks(network), mesh, dtype, resident=True, ignored=frozen)
        return network

    return _networks(config, whole, low_rank, dtype if mesh is None or gathered != dtype else torch.float32)


def on_meta(config: Config, fam: ModelFamily) -> DistillNetworks:
    """The networks without memory, unsharded, in float32, with the autocast of gathered ones."""
    autocast = torch.float32 if gathers_in_compute_type(config) else getattr(torch, config.distill.dtype)

    def whole(role: str) -> nn.Module:
        return fam.network().requires_grad_(role != "teacher")

    with torch.device("meta"):
        return _networks(config, whole, lambda teacher, lora: with_lora(teacher, fam, lora), autocast)


def _networks(
    config: Config,
    whole: Callable[[str], nn.Module],
    low_rank: Callable[[nn.Module, LoraConfig], nn.Module],
    autocast: torch.dtype,
) -> DistillNetworks:
    """`whole` makes a network by its role, `low_rank` one with a LoRA of its own on the weights of the teacher."""
    settings, lora = config.distill, config.distill.lora
    teacher = whole("teacher")
    student = low_rank(teacher, lora) if lora else whole("student")
    if settings.regression:
        return DistillNetworks(teacher, student, teacher, autocast)
    critic = low_rank(teacher, lora) if lora and lora.shared_base else whole("critic")
    return DistillNetworks(
        teacher, student, critic, autocast, merged_network(teacher, student, lora) if lora else None
    )


def with_lora(teacher: nn.Module, fam: ModelFamily, lora: LoraConfig) -> nn.Module:
    from dmd2.models import lora as adapters  # peft takes seconds to import

    return adapters.add_low_rank_update(teacher, fam.lora_targets, lora)


def merged_network(teacher: nn.Module, student: nn.Module, lora: LoraConfig) -> MergedNetwork:
    from dmd2.models import lora as adapters

    return adapters.MergedNetwork(teacher, student, lora)
