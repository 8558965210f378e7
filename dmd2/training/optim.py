"""One optimizer step of a trainable network: gradient clipping, AdamW, learning-rate schedule, EMA; and their state."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from dmd2 import rng
from dmd2.config import OptimizerConfig
from dmd2.parallel import sharding
from dmd2.training import moments
from dmd2.training.checkpoint import Stateful
from dmd2.training.ema import Ema

NETWORK = "network"
"""Name of the diffusion network among the children of the critic's module."""
SKIPPED = "skipped"
"""Metric: 1 if the optimizer step was skipped because the gradient was not finite, else 0."""
Metrics = dict[str, Tensor]
"""{name: detached scalar}, left on the device: only the metrics log reads them, when a line is due."""


@dataclass(frozen=True)
class TrainableWeights:
    """The trainable parameters of a module as an object of a checkpoint. Frozen ones are not saved."""

    module: nn.Module

    def state_dict(self) -> dict[str, Tensor]:
        sharding.reshard(self.module)
        return {
            name: sharding.sharded_like(p, sharding.local_tensor(p).detach())
            for name, p in self.module.named_parameters()
            if p.requires_grad
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        parameters = self.state_dict()
        if parameters.keys() != state.keys():
            different = min(parameters.keys() ^ state.keys())
            raise ValueError(f"the weights are of another network: {different} is on one side only")
        for name, value in parameters.items():
            sharding.local_tensor(value).copy_(sharding.local_tensor(state[name]))


@dataclass(frozen=True)
class OptimizerState:
    """AdamW's state as an object of a checkpoint: `<parameter>.exp_avg`, `<parameter>.exp_avg_sq` and `<parameter>.step`;
    of 8-bit moments also `<parameter>.exp_avg_scale` and `<parameter>.exp_avg_sq_scale`.

    The optimizer must have been given named parameters. Creating this object creates missing state, so that a checkpoint
    from before the first step holds the same tensors as a later one.
    """

    optimizer: torch.optim.Optimizer

    def __post_init__(self) -> None:
        for group in self.optimizer.param_groups:
            for p in group["params"]:
                if not self.optimizer.state[p]:
                    zeros = moments.zeros(p, group["moments"])
                    self.optimizer.state[p] = {"step": torch.zeros((), device=p.device)} | zeros

    def state_dict(self) -> dict[str, Tensor]:
        state = self.optimizer.state
        return {
            f"{name}.{key}": value for name, p in self._named_parameters() for key, value in state[p].items()
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name, value in self.state_dict().items():
            sharding.local_tensor(value).copy_(sharding.local_tensor(state[name]))

    def _named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        for group in self.optimizer.param_groups:
            yield from zip(group["param_names"], group["params"], strict=True)


@dataclass
class Trainable:
    """A network with everything that changes its weights."""

    name: str
    """Prefix of its metrics and of its objects in a checkpoint: student, critic or teacher."""
    module: nn.Module
    """The network, or a ModuleDict of several, such as the critic and its discriminator head."""
    optimizer: torch.optim.Optimizer
    lr: Callable[[int], float]
    """Learning rate at a step. A function of the step only, so that no scheduler state has to be saved."""
    max_grad_norm: float
    emas: list[Ema] = field(default_factory=list)
    """Updated after every optimizer step; the last one gives the inference weights."""
    seed: int = 0
    """Of the random rounding of 8-bit moments."""

    def set_gradient_sync(self, last_micro_batch: bool, last_pass: bool) -> None:
        """Reduce the gradients over the ranks in the next backward pass, or accumulate them locally until a later one.

        Gradients of a diffusion network are reduced in the last pass of the last micro-batch. Other modules, such as a
        discriminator head, may not take part in the last pass, so theirs are reduced in every pass of it.
        """
        for name, module in self._networks().items():
            sharding.set_gradient_sync(module, last_micro_batch and (last_pass or name != NETWORK))

    def update(self, step: int) -> Metrics:
        """Clip the gradients to `max_grad_norm` (0 = do not), make an optimizer step, update the EMAs, and clear the gradients.

        If the gradient norm is not finite, the optimizer skips the step on the device: the host does not wait to know.
        """
        sharding.reshard(self.module)
        norm = sharding.global_norm([p.grad for p in self.module.parameters() if p.grad is not None])
        skipped = (~norm.isfinite()).float()
        lr = self.lr(step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
            shards = {p: sharding.local_leaf(p) for p in group["params"] if p.grad is not None}
            if self.max_grad_norm:
                nn.utils.clip_grads_with_norm_(list(shards.values()), self.max_grad_norm, norm, foreach=True)
            states = [(shard, self.optimizer.state[p]) for p, shard in shards.items()]
            adamw_step(group, states, skipped, partial(rng.generator, self.seed, step, self.name))
        self.optimizer.zero_grad()
        for ema in self.emas:
            ema.update(self.module)
        return {
            f"{self.name}/grad_norm": norm,
            f"{self.name}/{SKIPPED}": skipped,
            f"{self.name}/lr": torch.tensor(lr),
        }

    def state(self) -> dict[str, Stateful]:
        """{name: object} to save in a checkpoint."""
        emas = {f"{self.name}.average{i}": ema for i, ema in enumerate(self.emas)}
        optimizer = OptimizerState(self.optimizer)
        return {self.name: TrainableWeights(self.module), f"{self.name}.optimizer": optimizer, **emas}

    def inference_weights(self) -> dict[str, Tensor]:
        """The trainable weights to use for inference: the last EMA, or the trained weights if there is none."""
        return self.emas[-1].shadow if self.emas else TrainableWeights(self.module).state_dict()

    def inference_state(self) -> dict[str, Stateful]:
        """The object of the checkpoint that holds the inference weights."""
        name = f"{self.name}.average{len(self.emas) - 1}" if self.emas else self.name
        return {name: self.state()[name]}

    @contextmanager
    def swap_in_inference_weights(self) -> Iterator[None]:
        """Inside the block, the module has the inference weights; afterwards the trained ones again."""
        if not self.emas:
            yield
            return
        weights = TrainableWeights(self.module)
        trained = {name: value.clone() for name, value in weights.state_dict().items()}
        weights.load_state_dict(self.inference_weights())
        try:
            yield
        finally:
            weights.load_state_dict(trained)

    def _networks(self) -> dict[str, nn.Module]:
        """The networks that are sharded apart from each other."""
        module = self.module
        return dict(module.named_children()) if isinstance(module, nn.ModuleDict) else {"": module}


Shards = Sequence[tuple[Tensor, dict[str, Tensor]]]
"""(this rank's shard of a parameter with its gradient, its state), as plain tensors or with DTensors as state."""


@torch.no_grad()
def adamw_step(
    group: dict[str, Any],
    shards: Shards,
    skipped: Tensor,
    generator: Callable[[torch.device], torch.Generator],
) -> None:
    """One AdamW step of this rank's shards of the parameters of a group.

    Args:
        group: An entry of `AdamW.param_groups`, whose settings are used.
        skipped: 1 to change nothing, else 0; a scalar on the device.
        generator: Of the random rounding of 8-bit moments. Ranks that hold the same shard must draw the same numbers.
    """
    coded = [one for one in shards if moments.NAMES[0] + moments.SCALE in one[1]]
    plain = [one for one in shards if moments.NAMES[0] + moments.SCALE not in one[1]]
    if plain:
        first, second = ([sharding.local_tensor(state[name]) for _, state in plain] for name in moments.NAMES)
        _fused_adamw(group, plain, first, second, skipped)
    if not coded:
        return
    numbers = generator(coded[0][0].device)
    for part in moments.chunks(coded):
        tensors, states = zip(*part, strict=True)
        decoded = [moments.decode(states, name) for name in moments.NAMES]
        first, second = (moments.views(one, tensors) for one in decoded)
        _fused_adamw(group, part, first, second, skipped)
        for name, one in zip(moments.NAMES, decoded, strict=True):
            moments.encode(one, states, name, skipped, numbers)


def _fused_adamw(
    group: dict[str, Any],
    shards: Shards,
    first: list[Tensor],
    second: list[Tensor],
    skipped: Tensor,
) -> None:
    """The kernel that `AdamW.step` calls, with both moments of the shards.

    AdamW's own step takes DTensors, and looks up how each operation is sharded: 3.5 s at the start of every process, and
    again on the host at every step.
    """
    beta1, beta2 = group["betas"]
    adamw(
        [shard for shard, _ in shards],
        [shard.grad for shard, _ in shards if shard.grad is not None],
        first,
        second,
        [],
        [sharding.local_tensor(state["step"]) for _, state in shards],
        fused=True,
        found_inf=skipped,
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )


def trainable(
    name: str, module: nn.Module, settings: OptimizerConfig, steps: int, seed: int = 0
) -> Trainable:
    """A Trainable with AdamW over the module's trainable parameters. `steps` is the length of the run."""
    parameters = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        [{"params": parameters, "moments": settings.moments}],
        lr=settings.lr,
        betas=settings.betas,
        weight_decay=settings.weight_decay,
        fused=True,
    )
    OptimizerState(optimizer)
    emas = [Ema(module, decay) for decay in settings.ema]
    lr = partial(learning_rate, settings, steps)
    return Trainable(name, module, optimizer, lr, settings.max_grad_norm, emas, seed)


def learning_rate(settings: OptimizerConfig, steps: int, step: int) -> float:
    """Linear warm-up to `lr` over `warmup_steps`, then linear decay to `final_lr_ratio * lr` at the end of the run."""
    if step < settings.warmup_steps:
        return settings.lr * (step + 1) / settings.warmup_steps
    progress = (step - settings.warmup_steps) / max(1, steps - settings.warmup_steps)
    return settings.lr * (1 - progress * (1 - settings.final_lr_ratio))
