"""FLOPs, memory and seconds of an average step, as sums over its passes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from dmd2.config import Config
from dmd2.plan.hardware import (
    CALL_S,
    GB,
    LIKELY,
    LINK_EFFICIENCY,
    MERGE_BYTES,
    TERA,
    UPDATE_BYTES,
    UPDATE_BYTES_8BIT,
    USABLE,
    Assumption,
    Gpu,
)
from dmd2.plan.passes import STUDENT, FakeTrainer, PassCost, PassCosts, mean_calls, student_pass
from dmd2.plan.traffic import GATHER, REDUCE, SCATTER, MeshShape, Traffic, copied_from_host, update_rates
from dmd2.training import memory, moments, networks
from dmd2.training.optim import NETWORK


def flops(costs: PassCosts, calls: Mapping[str, float], rows: int) -> dict[str, float]:
    """FLOPs by pass, of a batch of `rows`."""
    return {name: count * costs[name].at(rows).flops for name, count in calls.items() if count}


@dataclass(frozen=True)
class MeasuredCosts:
    """The costs of all passes at one number of rows, and at another one if the line through both is known."""

    costs: PassCosts
    others: PassCosts | None = None

    def at(self, rows: int) -> PassCosts:
        return {
            name: one.at(rows, self.others[name] if self.others else None) for name, one in self.costs.items()
        }


def activations(fake: FakeTrainer, costs: PassCosts, with_gradients: bool = False) -> float:
    """Most bytes that are alive during a step, without weights and, by default, without their gradients.

    The student's graph is alive while the terms compute their gradients at its samples. Critic passes follow each other, and
    `with_gradients` those of earlier passes are alive in the later ones.
    """

    def peak(name: str) -> int:
        return costs[name].peak_with_gradients if with_gradients else costs[name].peak

    terms = max((costs[student_pass(term)].peak for term in fake.terms), default=0)
    alive = [costs[STUDENT].kept + terms, peak(STUDENT)]
    earlier: frozenset[nn.Parameter] = frozenset()
    for one in fake.critic_passes:
        alive.append(peak(one.name))
        if with_gradients:
            alive.append(memory.FLOAT32 * sum(p.numel() for p in earlier) + costs[one.name].peak)
        earlier |= costs[one.name].reached
    return max(alive)


def early_weights(fake: FakeTrainer, costs: PassCosts) -> int:
    """The number of the critic network's weights that get a gradient before the last critic pass of a step."""
    mine = set(fake.critic_modules[NETWORK].parameters())
    reached = frozenset().union(*(costs[one.name].reached for one in fake.critic_passes[:-1]))
    return sum(p.numel() for p in mine & reached)


def device_memory(
    fake: FakeTrainer,
    sizes: memory.Sizes,
    mesh: MeshShape,
    resident: bool,
    measured: MeasuredCosts,
    rows: int,
) -> dict[str, float]:
    """Bytes of a GPU by part, at the moment of a step when most are alive, with micro-batches of `rows`."""
    config, costs = fake.config, measured.at(rows)
    micro_batches = -(-config.distill.batch // mesh.gpus // rows)
    found = memory.static(config, sizes, mesh.shards, resident, micro_batches, early_weights(fake, costs))
    found |= frozen_memory(fake)
    if mesh.gpus == 1 and not networks.gathers_alone(config):
        found.pop("unreduced gradients", None)
        if memory.compute_width(config) == memory.FLOAT32 and micro_batches == 1:
            gradients = found.pop("gradients", 0.0)
            peak = activations(fake, costs, with_gradients=True)
            return found | {"activations and gradients": max(peak, gradients)}
    return found | {"activations": activations(fake, costs)}


VAE, TEXT = "VAE", "text encoders, unless embeddings are stored"
"""Parts of the memory beside the networks of the distillation."""
VAE_WEIGHTS = 84_000_000
TEXT_ENCODER_WEIGHTS = {768: 123_000_000, 1024: 340_000_000, 2048: 818_000_000}
"""Width of the hidden states -> weights of the published text encoders that make them: of Stable Diffusion 1.5, 2 and XL."""


def frozen_memory(fake: FakeTrainer) -> dict[str, float]:
    """Bytes of what encodes prompts and decodes previews, in float32; other text encoders than the published ones are not known."""
    text = fake.family.placeholder_condition(1).get("text")
    weights = {
        TEXT: 0 if text is None else TEXT_ENCODER_WEIGHTS.get(text.shape[-1], 0),
        VAE: VAE_WEIGHTS if fake.config.family.vae_stride else 0,
    }
    return {name: float(memory.FLOAT32 * count) for name, count in weights.items() if count}


def largest_micro_batch(
    fake: FakeTrainer, sizes: memory.Sizes, mesh: MeshShape, resident: bool, measured: MeasuredCosts, gpu: Gpu
) -> int:
    """The most rows at a time that fit on a GPU, up to its rows of the batch; 0 if none fit."""
    fit = (
        rows
        for rows in range(fake.config.distill.batch // mesh.gpus, 0, -1)
        if sum(device_memory(fake, sizes, mesh, resident, measured, rows).values()) <= USABLE * gpu.gb * GB
    )
    return next(fit, 0)


def seconds(
    fake: FakeTrainer,
    mesh: MeshShape,
    gpu: Gpu,
    costs: PassCosts,
    sent: Traffic,
    assumed: Assumption = LIKELY,
) -> dict[str, float]:
    """Predicted seconds of an average step by activity; nothing is assumed to overlap."""
    config = fake.config
    share = config.distill.batch // mesh.gpus
    rows = min(config.engine.micro_batch or share, share)
    computing = sum(
        often * share / rows * _computing(costs[name].at(rows), config, gpu, assumed)
        for name, often in mean_calls(fake).items()
    )
    inside = mesh.shards <= mesh.gpus_per_node
    link = {GATHER: inside, SCATTER: inside, REDUCE: mesh.gpus <= mesh.gpus_per_node}
    sending = sum(
        size / (LINK_EFFICIENCY * (gpu.inside_gb_s if link[kind] else gpu.between_gb_s) * GB) + calls * CALL_S
        for kind, (calls, size) in sent.items()
    )
    updating = _updating(fake, mesh, gpu) + _merging(fake, gpu, assumed)
    copying = copied_from_host(fake, mesh, costs, rows) / (LINK_EFFICIENCY * gpu.host_gb_s * GB)
    found = {"computing": computing, "communicating": sending, "updating": updating}
    return found | ({"copying the teacher from the host": copying} if copying else {})


def is_compiled(config: Config) -> bool:
    """Whether a training surely compiles its units. With `auto` it does where the image has a compiler, which is not known here."""
    return config.engine.compile == "on"


def _computing(cost: PassCost, config: Config, gpu: Gpu, assumed: Assumption) -> float:
    """Seconds of a pass on the device or, if it takes longer to launch its kernels, on the host. In float32, PyTorch uses TF32
    for convolutions and not for matrix products."""
    if config.distill.dtype == "bfloat16":
        rated = cost.flops / gpu.bf16
    else:
        rated = cost.convolution_flops / gpu.tf32 + (cost.flops - cost.convolution_flops) / gpu.fp32
    reached = assumed.efficiency * gpu.efficiency.reached(is_compiled(config))
    return max(rated / (reached * TERA), cost.kernels * assumed.kernel_s)


def _updating(fake: FakeTrainer, mesh: MeshShape, gpu: Gpu) -> float:
    """Seconds of the optimizers and EMAs, from the bytes that they move."""
    settings, trained = fake.config.distill, fake.trained
    emas = {"student": len(settings.student.ema), "critic": len(settings.critic.ema)}
    width = {
        name: UPDATE_BYTES_8BIT if one.moments == "8bit" else UPDATE_BYTES
        for name, one in (("student", settings.student), ("critic", settings.critic))
    }
    moved = sum(
        rate * trained[name] * (width[name] + 12 * emas[name])
        for name, rate in update_rates(fake.config).items()
    )
    return moved / mesh.shards / (gpu.memory_gb_s * GB)


def _merging(fake: FakeTrainer, gpu: Gpu, assumed: Assumption) -> float:
    """Seconds of merging a low-rank update into weights for calls without gradient."""
    if not (cost := fake.merging):
        return 0.0
    merged = sum(p.numel() for p in fake.nets.merged.weights()) if fake.nets.merged else 0
    device = MERGE_BYTES * merged / (gpu.memory_gb_s * GB) + cost.flops / (gpu.fp32 * TERA)
    return update_rates(fake.config)["student"] * max(device, cost.kernels * assumed.kernel_s)


def checkpoint_bytes(fake: FakeTrainer) -> int:
    """Bytes of float32 master weights and EMAs, and of moments."""
    settings, trained = fake.config.distill, fake.trained
    networks = (
        ("student", settings.student, fake.nets.student),
        ("critic", settings.critic, fake.critic_modules),
    )
    found = sum(
        memory.FLOAT32 * trained[name] * (1 + len(optimizer.ema))
        + moments.num_bytes(module, optimizer.moments)
        for name, optimizer, module in networks
    )
    return round(found)
