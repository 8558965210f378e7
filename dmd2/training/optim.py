"""What learns, and how: a module with its optimizer, learning rate, running averages, and their state in a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from dmd2.config import OptimizerConfig
from dmd2.parallel import sharding
from dmd2.training.checkpoint import Stateful
from dmd2.training.ema import Ema

HEAD = "head"
"""The name of a GAN head among the networks of a critic."""
SKIPPED = "skipped"
"""The metric that counts updates whose gradient was not finite."""
Metrics = dict[str, Tensor]
"""Detached scalars, left on the device: reading them is the business of whoever reports."""


@dataclass(frozen=True)
class TrainableWeights:
    """What of a module learns, as something that a checkpoint can hold; what is frozen is not saved over and over."""

    module: nn.Module

    def state_dict(self) -> dict[str, Tensor]:
        sharding.reshard(self.module)
        return {name: p.detach() for name, p in self.module.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        mine = self.state_dict()
        if mine.keys() != state.keys():
            odd = min(mine.keys() ^ state.keys())
            raise ValueError(f"the weights are of another network: {odd} is on one side only")
        for name, value in mine.items():
            sharding.local_tensor(value).copy_(sharding.local_tensor(state[name]))


@dataclass(frozen=True)
class OptimizerState:
    """The state of an optimizer: all of it there from the start, so that nothing appears at the first step."""

    optimizer: torch.optim.Optimizer

    def __post_init__(self) -> None:
        for p in (p for group in self.optimizer.param_groups for p in group["params"]):
            if not self.optimizer.state[p]:
                zeros = {name: torch.zeros_like(p.detach()) for name in ("exp_avg", "exp_avg_sq")}
                self.optimizer.state[p] = {"step": torch.zeros((), device=p.device)} | zeros

    def state_dict(self) -> dict[str, Tensor]:
        state = enumerate(self.optimizer.state.values())
        return {f"{index}.{key}": value for index, slots in state for key, value in slots.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name, value in self.state_dict().items():
            sharding.local_tensor(value).copy_(sharding.local_tensor(state[name]))


@dataclass
class Trainable:
    """Something that learns, and the means to change it."""

    name: str
    module: nn.Module
    optimizer: torch.optim.Optimizer
    lr: Callable[[int], float]
    """Learning rate at a step: a function, so that nothing has to be saved to resume it."""
    max_grad_norm: float
    emas: list[Ema] = field(default_factory=list)

    def set_gradient_sync(self, last_part: bool, last_pass: bool) -> None:
        """Say which gradients are complete after the next backward pass, and so are added up over the processes: those of
        a body with the last pass of the last part, those of a head, which the last pass may not reach, with each of it."""
        for name, module in self._roots().items():
            sharding.set_gradient_sync(module, last_part and (last_pass or name == HEAD))

    def update(self, step: int) -> Metrics:
        """Follow the gradient that is there, then forget it. One that is not finite is not followed; nobody waits for the
        device to know."""
        sharding.reshard(self.module)
        gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
        norm = sharding.global_norm(gradients)
        scale = (self.max_grad_norm / (norm + 1e-6)).clamp(max=1)
        torch._foreach_mul_([sharding.local_tensor(gradient) for gradient in gradients], scale)
        bad = (~norm.isfinite()).float()
        self.optimizer.found_inf = bad  # type: ignore[attr-defined]  # as a GradScaler tells a fused optimizer
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr(step)
        self.optimizer.step()
        self.optimizer.zero_grad()
        for average in self.emas:
            average.update(self.module)
        return {f"{self.name}/grad_norm": norm, f"{self.name}/{SKIPPED}": bad}

    def state(self) -> dict[str, Stateful]:
        """What a checkpoint of this trainable consists of."""
        averages = {f"{self.name}.average{i}": average for i, average in enumerate(self.emas)}
        moments = OptimizerState(self.optimizer)
        return {self.name: TrainableWeights(self.module), f"{self.name}.optimizer": moments, **averages}

    def inference_state(self) -> dict[str, Stateful]:
        """Of its state, what `result` is."""
        name = f"{self.name}.average{len(self.emas) - 1}" if self.emas else self.name
        return {name: self.state()[name]}

    def _roots(self) -> dict[str, nn.Module]:
        """The networks this is made of, each on its own."""
        return (
            dict(self.module.named_children())
            if isinstance(self.module, nn.ModuleDict)
            else {"": self.module}
        )

    def inference_weights(self) -> dict[str, Tensor]:
        """The weights to use: the last running average, or the weights themselves if there is none."""
        return self.emas[-1].shadow if self.emas else TrainableWeights(self.module).state_dict()

    @contextmanager
    def swap_in_inference_weights(self) -> Iterator[None]:
        """While inside, the module has the weights to use."""
        if not self.emas:  # they are those it has
            yield
            return
        weights = TrainableWeights(self.module)
        before = {name: value.clone() for name, value in weights.state_dict().items()}
        weights.load_state_dict(self.inference_weights())
        try:
            yield
        finally:
            weights.load_state_dict(before)


def trainable(name: str, module: nn.Module, settings: OptimizerConfig, steps: int) -> Trainable:
    optimizer = torch.optim.AdamW(
        [p for p in module.parameters() if p.requires_grad],
        lr=settings.lr,
        betas=settings.betas,
        weight_decay=settings.weight_decay,
        fused=True,
    )

    def lr(step: int) -> float:
        if step < settings.warmup_steps:
            return settings.lr * (step + 1) / settings.warmup_steps
        gone = (step - settings.warmup_steps) / max(1, steps - settings.warmup_steps)
        return settings.lr * (1 - gone * (1 - settings.final_lr_ratio))

    OptimizerState(optimizer)
    averages = [Ema(module, decay) for decay in settings.ema]
    return Trainable(name, module, optimizer, lr, settings.max_grad_norm, averages)
