"""The cost of each pass of a step: the trainer's own passes, run once on tensors without data (FakeTensorMode) and counted.

The loss terms come from `build.loss_terms`, as in a training. Every pass that they list is run and counted, so the cost of
a new term is in the plan without a word about it here.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules.module import register_module_forward_hook
from torch.utils._pytree import tree_leaves

from dmd2.batch import Batch
from dmd2.config import Config
from dmd2.denoiser import Denoiser
from dmd2.models.family import ModelFamily
from dmd2.parallel import sharding
from dmd2.plan.meter import Meter, norms_as_on_cuda
from dmd2.training import build, memory, networks
from dmd2.training.activation import apply_activation_checkpointing
from dmd2.training.networks import DistillNetworks
from dmd2.training.optim import NETWORK
from dmd2.training.terms import CriticPass, LossTerm, critic_passes

ROLLOUT, STUDENT = "student rollout", "student forward + backward"
"""The passes of the student itself: a call without gradient, and the call whose graph takes the gradient at the samples."""
MERGING = "merge of the student's update"
"""No pass of a batch: once per update of a low-rank student."""


def student_pass(term: LossTerm) -> str:
    """The name of the pass that computes a term's loss for the student, and differentiates it at the samples."""
    return f"student loss {term.name}"


@dataclass(frozen=True)
class PassCost:
    """What one pass takes for a number of rows."""

    rows: int
    flops: int
    convolution_flops: int = 0
    """The part of `flops` that convolutions have."""
    kernels: int = 0
    """Operators that allocate an output."""
    cast_bytes: int = 0
    """Bytes read and written by operators that change the type of a tensor."""
    kept: int = 0
    """Bytes of activations that are alive after the forward pass."""
    peak: int = 0
    """Most bytes that are alive at a time, without weights and their gradients."""
    peak_with_gradients: int = 0
    """Most bytes that are alive at a time, without weights."""
    reached: frozenset[nn.Parameter] = frozenset()
    """Weights that get a gradient."""
    forward_calls: Mapping[nn.Module, int] = field(default_factory=Counter)
    """Forward calls of each module."""
    backward_calls: Mapping[nn.Module, int] = field(default_factory=Counter)
    """Those forward calls through which a gradient flows back."""

    @property
    def has_backward(self) -> bool:
        return bool(self.backward_calls)

    def at(self, rows: int, other: PassCost | None = None) -> PassCost:
        """For another number of rows: FLOPs in proportion, bytes on the line through this and `other`, or in proportion."""

        def line(name: str) -> int:
            mine, its = getattr(self, name), getattr(other, name) if other else 0
            slope = (its - mine) / (other.rows - self.rows) if other else mine / self.rows
            return math.ceil(mine + slope * (rows - self.rows))

        return replace(
            self,
            rows=rows,
            flops=self.flops * rows // self.rows,
            convolution_flops=self.convolution_flops * rows // self.rows,
            cast_bytes=line("cast_bytes"),
            kept=line("kept"),
            peak=line("peak"),
            peak_with_gradients=line("peak_with_gradients"),
        )


PassCosts = dict[str, PassCost]
"""By the name of the pass."""


ShardedUnit = tuple[nn.Module, list[nn.Parameter]]
"""A unit of sharding, and the weights that it gathers."""


def shard_units(units: Sequence[nn.Module], network: nn.Module) -> list[ShardedUnit]:
    """The units of a network, and the network itself for the weights that no unit has.

    A frozen network is sharded whole; of a network with a LoRA, only the weights that learn are.
    """
    sharded = {p for p in network.parameters() if p.requires_grad} or set(network.parameters())
    found: list[ShardedUnit] = []
    for unit in (*units, network):
        mine = [p for p in unit.parameters() if p in sharded]
        sharded -= set(mine)
        found.append((unit, mine))
    return [(unit, mine) for unit, mine in found if mine]


@dataclass(frozen=True)
class FakeTrainer:
    """What a trainer consists of, on tensors without data."""

    config: Config
    family: ModelFamily
    nets: DistillNetworks
    critic_modules: nn.ModuleDict
    terms: list[LossTerm]
    mode: FakeTensorMode

    @cached_property
    def student(self) -> Denoiser:
        return build.student_denoiser(self.config, self.family, self.nets)

    @cached_property
    def merging(self) -> PassCost | None:
        """What it takes to merge a student's low-rank update into weights for its calls without gradient, once per update."""
        if not (merged := self.nets.merged):
            return None
        with self.mode, Meter(*self.modules) as meter:
            merged.current()
        meter.release()
        return PassCost(0, meter.flops, kernels=meter.kernels, cast_bytes=meter.cast_bytes, peak=meter.peak)

    @cached_property
    def critic_passes(self) -> list[CriticPass]:
        return critic_passes(self.terms)

    @property
    def term_modules(self) -> list[nn.Module]:
        """The modules that loss terms train with the critic, such as a discriminator head."""
        return [module for name, module in self.critic_modules.items() if name != NETWORK]

    @property
    def modules(self) -> list[nn.Module]:
        return [*self.nets.called(), *self.term_modules]

    @cached_property
    def sizes(self) -> memory.Sizes:
        units = self.family.blocks(self.nets.student)
        return memory.sizes(self.config, self.nets, self.critic_modules, units, len(self.critic_passes))

    @cached_property
    def trained(self) -> dict[str, int]:
        """Numbers of weights that learn; the critic's with the modules of loss terms."""
        networks = {"student": self.nets.student, "critic": self.critic_modules}
        return {name: memory.num_trained(network) for name, network in networks.items()}

    @cached_property
    def units(self) -> dict[str, list[ShardedUnit]]:
        """By network, what is gathered at a time while it is not resident."""
        return {name: shard_units(self.family.blocks(one), one) for name, one in self.nets.named().items()}

    @cached_property
    def outer_units(self) -> dict[str, list[ShardedUnit]]:
        """By network, what is gathered at a time while it is resident."""
        return {
            name: shard_units(sharding.outermost(self.family.blocks(one)), one)
            for name, one in self.nets.named().items()
        }


def fake_trainer(config: Config, fam: ModelFamily) -> FakeTrainer:
    """The networks have the type they compute in, as they are when gathered, and keep the activations that they would on
    CUDA."""
    nets = networks.on_meta(config, fam)
    terms, critic_modules = build.loss_terms(config, fam, nets, build.place_on_meta)
    fake = FakeTrainer(config, fam, nets, critic_modules, terms, FakeTensorMode(allow_non_fake_inputs=True))
    with fake.mode:
        replaced: dict[int, Tensor] = {}
        for network in nets.called():
            _replace_tensors(network, getattr(torch, config.distill.dtype), replaced)
        for module in fake.term_modules:
            _replace_tensors(module, torch.float32, replaced)
    norms_as_on_cuda(*nets.called())
    return fake


def _replace_tensors(module: nn.Module, dtype: torch.dtype, replaced: dict[int, Tensor]) -> None:
    """Put fake tensors in the place of those on the meta device; tensors that are shared stay shared."""
    for one in module.modules():
        for table in (one._parameters, one._buffers):
            for name, tensor in table.items():
                if tensor is None:
                    continue
                if id(tensor) not in replaced:
                    kind = dtype if tensor.is_floating_point() else tensor.dtype
                    made: Tensor = torch.empty(tensor.shape, dtype=kind)
                    made = nn.Parameter(made, tensor.requires_grad) if table is one._parameters else made
                    replaced[id(tensor)] = replaced[id(made)] = made
                cast(dict[str, Any], table)[name] = replaced[id(tensor)]


def calls_per_step(fake: FakeTrainer, student_turn: bool, stop: int) -> dict[str, int]:
    """How often a step runs each pass on all of its rows, if its rollout stops at `stop`."""
    settings = fake.config.distill
    if settings.regression:
        return {STUDENT: 1}
    calls = build.sample_student(fake.config, fake.student).calls(student_turn, stop)
    found = {one.name: 1 for one in fake.critic_passes}
    if not student_turn:
        return {ROLLOUT: calls} | found
    return {ROLLOUT: calls - 1, STUDENT: 1} | {student_pass(term): 1 for term in fake.terms} | found


def mean_calls(fake: FakeTrainer) -> dict[str, float]:
    """How often an average step runs each pass: over turns, and over the steps at which a rollout may stop."""
    updates, stops = fake.config.distill.critic_updates, range(len(fake.config.distill.student_timesteps))
    total: Counter[str] = Counter()
    for student_turn, share in ((True, 1 / updates), (False, 1 - 1 / updates)):
        for stop in stops:
            for name, count in calls_per_step(fake, student_turn, stop).items():
                total[name] += share * count / len(stops)  # type: ignore[assignment]  # a Counter of floats
    return dict(total)


def pass_names(fake: FakeTrainer) -> list[str]:
    """In the order in which they are counted: those that take most of a usual step come first, at the least work of counting them."""
    critic = [one.name for one in fake.critic_passes]
    return [ROLLOUT, *critic, STUDENT, *(student_pass(term) for term in fake.terms)]


def measure_passes(
    fake: FakeTrainer,
    rows: int,
    known: PassCosts | None = None,
    counted: Callable[[PassCosts], None] = lambda costs: None,
) -> PassCosts:
    """The cost of every pass for `rows` rows. Those without a backward pass are taken from `known`, if they are in it.

    Args:
        counted: Called after each pass with the costs so far.
    """
    found: PassCosts = {}
    if fake.nets.merged:
        assert fake.merging, "merged before the calls that would do it"
    with fake.mode:
        forwards = _forwards(fake, rows)
    for name in pass_names(fake):
        if known and name in known and not known[name].has_backward:
            found[name] = known[name]
        else:
            with fake.mode:
                found[name] = _measure(fake, rows, forwards[name])
        counted(found)
    return found


Backward = Callable[[], object]


def _forwards(fake: FakeTrainer, rows: int) -> dict[str, Callable[[], Backward]]:
    """By pass what runs it forward, and returns what runs it backward."""
    cond = fake.family.placeholder_condition(rows)
    batch = Batch(torch.zeros(rows, *fake.family.shape), cond, cond)
    student: dict[str, Callable[[], Backward]] = {
        ROLLOUT: partial(_rollout, fake, batch),
        STUDENT: partial(_student, fake, batch),
    }
    terms = {student_pass(term): partial(_student_loss, term, batch) for term in fake.terms}
    critic = {one.name: partial(_critic_losses, one, batch) for one in fake.critic_passes}
    return student | terms | critic


def _student(fake: FakeTrainer, batch: Batch) -> Backward:
    x = fake.student(batch.x, torch.zeros(len(batch.x), dtype=torch.int64), batch.cond)
    return lambda: x.backward(torch.zeros_like(x))


@torch.no_grad()
def _rollout(fake: FakeTrainer, batch: Batch) -> Backward:
    x = fake.student(batch.x, torch.zeros(len(batch.x), dtype=torch.int64), batch.cond)
    return lambda: x


def _student_loss(term: LossTerm, batch: Batch) -> Backward:
    leaf = replace(batch, x=batch.x.detach().requires_grad_())
    loss = term.student_loss(leaf)
    return lambda: torch.autograd.grad(loss, leaf.x)


def _critic_losses(one: CriticPass, batch: Batch) -> Backward:
    loss = torch.stack(list(one.losses(batch, batch).values())).sum()
    return lambda: loss.backward()


def _measure(fake: FakeTrainer, rows: int, forward: Callable[[], Backward]) -> PassCost:
    with _count_calls() as (forward_calls, backward_calls), Meter(*fake.modules) as meter:
        backward = forward()
        kept = meter.live
        backward()
        del backward
    meter.release()
    return PassCost(
        rows,
        meter.flops,
        meter.convolution_flops,
        meter.kernels,
        meter.cast_bytes,
        kept,
        meter.peak_without_gradients,
        meter.peak,
        frozenset(meter.reached),
        forward_calls,
        backward_calls,
    )


@contextmanager
def _count_calls() -> Iterator[tuple[Counter[nn.Module], Counter[nn.Module]]]:
    """While inside, the forward calls of all modules are counted, and those through which a gradient will flow."""
    forward: Counter[nn.Module] = Counter()
    backward: Counter[nn.Module] = Counter()

    def count(module: nn.Module, _: Any, out: Any) -> None:
        forward[module] += 1
        backward[module] += any(isinstance(one, Tensor) and one.requires_grad for one in tree_leaves(out))

    hook = register_module_forward_hook(count)
    try:
        yield forward, backward
    finally:
        hook.remove()
    for module in [module for module, calls in backward.items() if not calls]:
        del backward[module]


@contextmanager
def activation_checkpointing(fake: FakeTrainer, how: str) -> Iterator[None]:
    """While inside, student and critic recompute activations as engine.activation_checkpointing says."""
    changed = (fake.nets.student, fake.nets.critic) if how != "none" else ()
    units = [unit for network in changed for unit in sharding.innermost(fake.family.blocks(network))]
    before = [unit.__dict__.get("forward") for unit in units]
    for network in changed:
        apply_activation_checkpointing(fake.family, network, how)
    yield
    for unit, forward in zip(units, before, strict=True):
        del unit.forward
        if forward:
            unit.forward = forward
