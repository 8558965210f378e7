"""The passes of a step, run once without memory (FakeTensorMode) through the very terms of the training, and counted."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from dmd2.batch import Batch
from dmd2.config import Config
from dmd2.denoiser import Denoiser
from dmd2.models.family import ModelFamily
from dmd2.parallel import sharding
from dmd2.plan.meter import Meter, norms_as_on_cuda
from dmd2.training import build
from dmd2.training.activation import checkpointed
from dmd2.training.terms import Adversarial, DistributionMatching, LossTerm


@dataclass(frozen=True)
class Pass:
    """One kind of pass, at some number of rows."""

    rows: int
    flops: int
    convolutions: int = 0
    """Those of the FLOPs."""
    kernels: int = 0
    """Operators that made something new."""
    kept: int = 0
    """Bytes that are alive after the forward pass."""
    peak: int = 0
    """Bytes alive at most, but for weights and their gradients."""
    with_gradients: int = 0
    """The same with the gradients of weights."""
    reached: int = 0
    """Weights that got a gradient."""
    backward: bool = False
    entered: tuple[str, ...] = ()
    """Units whose weights were needed."""

    def at(self, rows: int, other: Pass | None = None) -> Pass:
        """At another number of rows: on the line through this and another one, or in proportion."""

        def line(name: str) -> int:
            mine, its = getattr(self, name), getattr(other, name) if other else 0
            slope = (its - mine) / (other.rows - self.rows) if other else mine / self.rows
            return math.ceil(mine + slope * (rows - self.rows))

        return replace(
            self,
            rows=rows,
            flops=self.flops * rows // self.rows,
            convolutions=self.convolutions * rows // self.rows,
            kept=line("kept"),
            peak=line("peak"),
            with_gradients=line("with_gradients"),
        )


Passes = dict[str, Pass]
"""By part of a step."""
ROLLOUT, STUDENT = "student rollout", "student forward + backward"
TEACHER, SCORE, STUDENT_GAN = "teacher guidance", "critic score", "GAN on the student"
CRITIC_GAN, CRITIC = "critic GAN", "critic denoising"


@dataclass
class Networks:
    """Without memory."""

    teacher: nn.Module
    student: nn.Module
    critic: nn.Module
    head: nn.Module | None
    mode: FakeTensorMode


def networks(config: Config, fam: ModelFamily) -> Networks:
    """In the type they compute in, as they are when gathered; what they keep is what they would on CUDA."""
    settings, dtype = config.distill, getattr(torch, config.distill.dtype)
    with torch.device("meta"):
        student = teacher = critic = fam.network()
        head = fam.head() if settings.gan else None
        if settings.lora:
            from dmd2.models import lora

            student = lora.add_low_rank_update(teacher, fam.lora_targets, settings.lora)
            critic = student if settings.lora.shared_base else fam.network()
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        fakes: dict[int, Tensor] = {}
        for network in dict.fromkeys((teacher, student, critic)):
            _fake(network, dtype, fakes)
        if head:
            _fake(head, torch.float32, fakes)
    norms_as_on_cuda(*dict.fromkeys((teacher, student, critic)))
    return Networks(teacher, student, critic, head, mode)


def _fake(network: nn.Module, dtype: torch.dtype, fakes: dict[int, Tensor]) -> None:
    """Replace what is on the meta device; tensors that were shared stay so."""
    for module in network.modules():
        for table in (module._parameters, module._buffers):
            for name, tensor in table.items():
                if tensor is None:
                    continue
                if id(tensor) not in fakes:
                    kind = dtype if tensor.is_floating_point() else tensor.dtype
                    made: Tensor = torch.empty(tensor.shape, dtype=kind)
                    made = nn.Parameter(made, tensor.requires_grad) if table is module._parameters else made
                    fakes[id(tensor)] = fakes[id(made)] = made
                cast(dict[str, Any], table)[name] = fakes[id(tensor)]


@dataclass
class Rehearsal:
    """Runs passes of a recipe, at some number of rows."""

    config: Config
    fam: ModelFamily
    nets: Networks
    rows: int
    found: Passes = field(default_factory=dict)
    reached: set[int] = field(default_factory=set)
    """Weights that the GAN's gradient reaches, by id."""

    def __post_init__(self) -> None:
        settings, dtype = self.config.distill, getattr(torch, self.config.distill.dtype)
        make = partial(Denoiser, diffusion=self.fam.diffusion, dtype=dtype)
        self.student, self.critic = make(self.nets.student), make(self.nets.critic)
        self.guide = build._teacher(make(self.nets.teacher), settings.guidance)
        self.terms: list[LossTerm] = []
        if settings.dmd:
            self.terms.append(DistributionMatching(self.guide, self.critic, (0, len(self.fam.diffusion))))
        if settings.gan and self.nets.head:
            top = len(self.fam.diffusion)
            self.terms.append(Adversarial(self.critic, self.nets.head, top, 1.0, 1.0))

    def run(self, known: Passes | None = None) -> Passes:
        """All kinds of pass; those without a backward pass are as `known`, if they are."""
        with self.nets.mode:
            cond = self.fam.placeholder_condition(self.rows)
            sample = Batch(torch.zeros(self.rows, *self.fam.shape), cond, cond)
            timestep = torch.zeros(self.rows, dtype=torch.int64)
            self._without_gradient(sample, timestep, known or {})
            self._of_the_student(sample, timestep)
            self._of_the_critic(sample)
        return self.found

    def _without_gradient(self, sample: Batch, timestep: Tensor, known: Passes) -> None:
        calls: dict[str, Callable[[], Tensor]] = {
            ROLLOUT: lambda: self.student(sample.x, timestep, sample.cond),
        }
        if self.config.distill.dmd:
            calls[SCORE] = lambda: self.critic(sample.x, timestep, sample.cond)
            calls[TEACHER] = lambda: self.guide(sample.x, timestep, sample)
        if self.config.distill.regression:
            calls = {}
        for name, call in calls.items():
            if name in known:
                self.found[name] = known[name]
            elif name == SCORE and self.nets.student is self.nets.critic:
                self.found[name] = self.found[ROLLOUT]
            else:
                with torch.no_grad(), self._watched(name) as meter:
                    out = call()
                    self._kept(name, meter)
                    del out

    def _of_the_student(self, sample: Batch, timestep: Tensor) -> None:
        with self._watched(STUDENT) as meter:
            x = self.student(sample.x, timestep, sample.cond)
            self._kept(STUDENT, meter)
            x.backward(torch.zeros_like(x))
            del x
        for term in self.terms:
            if isinstance(term, Adversarial):
                with self._watched(STUDENT_GAN) as meter:
                    leaf = replace(sample, x=sample.x.detach().requires_grad_())
                    loss = term.student_loss(leaf)
                    self._kept(STUDENT_GAN, meter)
                    torch.autograd.grad(loss, leaf.x)
                    del loss

    def _of_the_critic(self, sample: Batch) -> None:
        for compute in build._passes(self.config.distill, self.terms)(sample, sample) if self.terms else ():
            name = CRITIC_GAN if self._only_gan(compute) else CRITIC
            same = self.nets.student is self.nets.critic and not self._shares()
            if name == CRITIC and same:
                self.found[name] = self.found[STUDENT]
                continue
            with self._watched(name) as meter:
                loss = torch.stack(list(compute().values())).sum()
                self._kept(name, meter)
                loss.backward()
                del loss

    def _only_gan(self, compute: Callable[[], Any]) -> bool:
        """Whether a pass of the critic is the GAN's alone: the first, where there are two, or the only one without DMD."""
        return bool(self.config.distill.gan) and (
            self.config.distill.dmd is None or (CRITIC_GAN not in self.found)
        )

    def _shares(self) -> bool:
        return bool(self.config.distill.gan and self.config.distill.gan.reuse_denoising_pass)

    def _kept(self, name: str, meter: Meter) -> None:
        self.found[name] = Pass(self.rows, 0, kept=meter.live)

    @contextmanager
    def _watched(self, name: str) -> Iterator[Meter]:
        """Count what is done inside, as the pass of this name."""
        modules = [n for n in (self.nets.teacher, self.nets.student, self.nets.critic, self.nets.head) if n]
        entered: dict[str, None] = {}
        with ExitStack() as stack:
            for network in dict.fromkeys(modules[:3]):
                for index, unit in enumerate(self.fam.blocks(network)):
                    hook = unit.register_forward_pre_hook(partial(_note, entered, str(index)))
                    stack.callback(hook.remove)
            meter = stack.enter_context(Meter(*modules))
            yield meter
        sizes = {
            "peak": meter.peak_apart,
            "with_gradients": meter.peak,
            "reached": sum(meter.reached.values()),
        }
        if name == CRITIC_GAN:
            self.reached = set(meter.reached)
        backward = name not in (ROLLOUT, SCORE, TEACHER)
        self.found[name] = replace(
            self.found[name],
            flops=meter.flops,
            convolutions=meter.convolutions,
            kernels=meter.kernels,
            backward=backward,
            entered=tuple(entered),
            **sizes,
        )
        meter.release()


def _note(entered: dict[str, None], name: str, *_: Any) -> None:
    entered[name] = None


@contextmanager
def checkpointing(fam: ModelFamily, nets: Networks, how: str) -> Iterator[None]:
    """While inside, student and critic compute activations again."""
    changed = list(dict.fromkeys((nets.student, nets.critic))) if how != "none" else []
    units = [unit for network in changed for unit in sharding.innermost(fam.blocks(network))]
    before = [unit.__dict__.get("forward") for unit in units]
    for network in changed:
        checkpointed(fam, network, how)
    yield
    for unit, forward in zip(units, before, strict=True):
        del unit.forward
        if forward:
            unit.forward = forward
