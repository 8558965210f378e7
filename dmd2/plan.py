"""What a recipe takes on given hardware, before it is paid for: work, memory, messages, seconds, money.

Nothing is guessed that can be counted. The recipe's networks are made without memory (FakeTensorMode), each kind of
pass that a step consists of is run once through the very terms of the training, and what it computes and keeps is
counted; a step is a sum of such passes. Seconds are a prediction: counts over the peak rates of data sheets, times a
stated efficiency. What is not known is said.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from dmd2 import build, memory, parallel
from dmd2.config import Config, EdmConfig
from dmd2.denoiser import Denoiser
from dmd2.errors import Refused, near_miss
from dmd2.models.family import ModelFamily
from dmd2.rng import draw_shared
from dmd2.sample import Conditioning, Sample
from dmd2.terms import Adversarial, DistributionMatching, Term

GB, TERA = 1e9, 1e12


@dataclass(frozen=True)
class Gpu:
    """Rates of a data sheet: dense, without sparsity."""

    bf16: float
    """TFLOP/s."""
    tf32: float
    fp32: float
    gb: float
    """Memory, in 1e9 bytes."""
    memory_gb_s: float
    """Bandwidth of the memory, 1e9 bytes/s."""
    inside_gb_s: float
    """To the other GPUs of a machine, in one direction."""
    between_gb_s: float
    """To other machines, a GPU's share of the usual network, in one direction."""
    source: str


A100 = "NVIDIA A100 data sheet (SXM4); network as in a DGX A100: 200 Gb/s per GPU"
H100 = "NVIDIA {} data sheet (SXM5); network as in {} Gb/s per GPU"
DGX = "a DGX H100: 400"
GPUS = {
    "a100-40gb": Gpu(312, 156, 19.5, 40, 1555, 300, 25, A100),
    "a100-80gb": Gpu(312, 156, 19.5, 80, 2039, 300, 25, A100),
    "h100-80gb": Gpu(989, 494, 67, 80, 3350, 450, 50, H100.format("H100", DGX)),
    "h100-mega-80gb": Gpu(989, 494, 67, 80, 3350, 450, 25, H100.format("H100", "GKE's A3 Mega: 200")),
    "h200-141gb": Gpu(989, 494, 67, 141, 4800, 450, 50, H100.format("H200", DGX)),
    "l4-24gb": Gpu(121, 60, 30.3, 24, 300, 32, 1.6, "NVIDIA L4 data sheet; PCIe 4 x16; 100 Gb/s for 8 GPUs"),
    "l40s-48gb": Gpu(
        362, 183, 91.6, 48, 864, 32, 12.5, "NVIDIA L40S data sheet; PCIe 4 x16; 100 Gb/s per GPU"
    ),
    "a10-24gb": Gpu(
        125, 62.5, 31.2, 24, 600, 32, 3.1, "NVIDIA A10 data sheet; PCIe 4 x16; 100 Gb/s for 4 GPUs"
    ),
}
EFFICIENCY = 0.40
"""Share of the peak rate that the passes reach: an assumption."""
LINK_EFFICIENCY = 0.7
"""Share of a link's bandwidth that large messages reach."""
CALL_S = 50e-6
"""Seconds that a collective takes before its first byte."""
KERNEL_S = 8e-6
"""Seconds of the host per kernel: an assumption. Small passes take as long as it takes to start their kernels."""
USABLE = 0.92
"""Share of a device for tensors; the rest is for the driver, the libraries and what is lost between blocks."""
DISK_GB_S = 1.0
"""1e9 bytes/s at which a machine writes a checkpoint."""
UPDATE_BYTES = 36
"""Bytes read and written per weight that learns: 28 by AdamW, 8 by the limit on the gradient; 12 more per average."""


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

            student = lora.updated(teacher, settings.lora)
            critic = student if settings.lora.shared_base else fam.network()
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        fakes: dict[int, Tensor] = {}
        for network in dict.fromkeys((teacher, student, critic)):
            _fake(network, dtype, fakes)
        if head:
            _fake(head, torch.float32, fakes)
    memory.norms_as_on_cuda(*dict.fromkeys((teacher, student, critic)))
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


def told(fam: ModelFamily, config: Config, rows: int) -> Conditioning:
    """What networks are told of so many samples, in shape."""
    if isinstance(config.family, EdmConfig):
        return Conditioning(label=torch.zeros(rows, dtype=torch.int64))
    stable: Any = fam
    unet = stable.unet
    text = torch.zeros(rows, _tokens(stable.folder), unet["cross_attention_dim"])
    if not (width := unet.get("projection_class_embeddings_input_dim")):
        return Conditioning(text=text)
    pooled = width - 6 * unet["addition_time_embed_dim"]
    return Conditioning(text=text, pooled=torch.zeros(rows, pooled), size=torch.ones(rows, 6))


def _tokens(folder: Path) -> int:
    """Of a text, as the pipeline's text encoder takes them."""
    path = folder / "text_encoder" / "config.json"
    return int(json.loads(path.read_text())["max_position_embeddings"]) if path.exists() else CLIP_TOKENS


CLIP_TOKENS = 77


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
        self.terms: list[Term] = []
        if settings.dmd:
            self.terms.append(DistributionMatching(self.guide, self.critic, (0, len(self.fam.diffusion))))
        if settings.gan and self.nets.head:
            top = len(self.fam.diffusion)
            self.terms.append(Adversarial(self.critic, self.nets.head, top, 1.0, 1.0))

    def run(self, known: Passes | None = None) -> Passes:
        """All kinds of pass; those without a backward pass are as `known`, if they are."""
        with self.nets.mode:
            told_ = told(self.fam, self.config, self.rows)
            sample = Sample(torch.zeros(self.rows, *self.fam.shape), told_, told_)
            level = torch.zeros(self.rows, dtype=torch.int64)
            self._without_gradient(sample, level, known or {})
            self._of_the_student(sample, level)
            self._of_the_critic(sample)
        return self.found

    def _without_gradient(self, sample: Sample, level: Tensor, known: Passes) -> None:
        calls: dict[str, Callable[[], Tensor]] = {
            ROLLOUT: lambda: self.student(sample.x, level, sample.cond),
        }
        if self.config.distill.dmd:
            calls[SCORE] = lambda: self.critic(sample.x, level, sample.cond)
            calls[TEACHER] = lambda: self.guide(sample.x, level, sample)
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

    def _of_the_student(self, sample: Sample, level: Tensor) -> None:
        with self._watched(STUDENT) as meter:
            x = self.student(sample.x, level, sample.cond)
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

    def _of_the_critic(self, sample: Sample) -> None:
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
        return bool(self.config.distill.gan and self.config.distill.gan.shared_view)

    def _kept(self, name: str, meter: memory.Meter) -> None:
        self.found[name] = Pass(self.rows, 0, kept=meter.live)

    @contextmanager
    def _watched(self, name: str) -> Iterator[memory.Meter]:
        """Count what is done inside, as the pass of this name."""
        modules = [n for n in (self.nets.teacher, self.nets.student, self.nets.critic, self.nets.head) if n]
        entered: dict[str, None] = {}
        with ExitStack() as stack:
            for network in dict.fromkeys(modules[:3]):
                for index, unit in enumerate(self.fam.blocks(network)):
                    hook = unit.register_forward_pre_hook(partial(_note, entered, str(index)))
                    stack.callback(hook.remove)
            meter = stack.enter_context(memory.Meter(*modules))
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
    units = [unit for network in changed for unit in parallel.innermost(fam.blocks(network))]
    before = [unit.__dict__.get("forward") for unit in units]
    for network in changed:
        build.checkpointed(fam, network, how)
    yield
    for unit, forward in zip(units, before, strict=True):
        del unit.forward
        if forward:
            unit.forward = forward


def calls(config: Config, students_turn: bool, stop: int) -> dict[str, int]:
    """How often a step makes each pass, for all of its rows, if its rollout ends at `stop`. With `every_stop`, only the
    student's turn begins a rollout there."""
    settings = config.distill
    if settings.regression:
        return {STUDENT: 1}
    walks = settings.inputs == "rollout" and not (settings.every_stop and not students_turn)
    found = {ROLLOUT: stop if walks else 0}
    if students_turn:
        found |= {STUDENT: 1} | ({TEACHER: 1, SCORE: 1} if settings.dmd else {})
        found |= {STUDENT_GAN: 1} if settings.gan else {}
    else:
        found[ROLLOUT] += 1
    found |= {CRITIC_GAN: 1} if settings.gan else {}
    return found | ({CRITIC: 1} if settings.dmd else {})


def calls_at(config: Config, step: int) -> dict[str, int]:
    """The same at a step of the run, with the stop that it draws."""
    settings = config.distill
    turn = step - step % settings.critic_updates if settings.every_stop else step
    stop = draw_shared(config.seed, turn, len(settings.student_levels))
    return calls(config, step % settings.critic_updates == 0, stop)


def mean_calls(config: Config) -> dict[str, float]:
    """Of an average step, over turns and stops."""
    updates, stops = config.distill.critic_updates, range(len(config.distill.student_levels))
    turns = [(True, 1 / updates), (False, 1 - 1 / updates)]
    total: dict[str, float] = {}
    for turn, share in turns:
        for stop in stops:
            for name, count in calls(config, turn, stop).items():
                total[name] = total.get(name, 0) + share * count / len(stops)
    return total


def flops(passes: Passes, often: Mapping[str, float], rows: int) -> dict[str, float]:
    """FLOPs by part, of so many rows."""
    return {name: count * passes[name].at(rows).flops for name, count in often.items() if count}


@dataclass(frozen=True)
class Layout:
    """GPUs, and how they divide the weights."""

    gpus: int
    per_node: int
    shards: int

    @property
    def replicas(self) -> int:
        return self.gpus // self.shards

    def __str__(self) -> str:
        return f"{self.replicas} x {self.shards}"


def layout(config: Config, nodes: int, per_node: int) -> Layout:
    """The mesh that the recipe's engine makes of so many GPUs."""
    gpus, batch = nodes * per_node, config.distill.batch
    if nodes < 1 or per_node < 1:
        raise Refused(f"{nodes} nodes of {per_node} GPUs are none; give at least one of each")
    if batch % gpus:
        raise Refused(
            f"a batch of {batch} images cannot be divided among {gpus} GPUs; choose a divisor, or another --distill.batch"
        )
    shards = config.engine.shards or per_node
    if gpus % shards:
        raise Refused(f"engine.shards is {shards}, which does not divide the {gpus} GPUs; choose a divisor")
    return Layout(gpus, per_node, shards)


@dataclass(frozen=True)
class Measured:
    """Passes at one number of rows, and at another one if the line between is known."""

    passes: Passes
    others: Passes | None = None

    def at(self, rows: int) -> Passes:
        return {
            name: one.at(rows, self.others[name] if self.others else None)
            for name, one in self.passes.items()
        }


def activations(passes: Passes, apart: bool = True) -> float:
    """Bytes at the fullest moment of a step: the student's graph waits while the terms look at its samples. `apart` leaves
    out gradients of weights."""
    student = passes[STUDENT]
    meanwhile = [passes[n].peak for n in (TEACHER, SCORE, STUDENT_GAN) if n in passes]
    before = 0 if apart else memory.FLOAT32 * (passes[CRITIC_GAN].reached if CRITIC_GAN in passes else 0)
    own = [n for n in (STUDENT, CRITIC_GAN, CRITIC) if n in passes]
    moments = [passes[n].peak if apart else passes[n].with_gradients for n in own]
    if CRITIC in passes and before:
        moments.append(int(before) + passes[CRITIC].peak)
    return max(student.kept + max(meanwhile, default=0), *moments)


def held(
    config: Config, sizes: memory.Sizes, mesh: Layout, resident: bool, measured: Measured, rows: int
) -> dict[str, float]:
    """Bytes by part, at the fullest moment of a step with so many rows at a time."""
    passes, parts = measured.at(rows), -(-config.distill.batch // mesh.gpus // rows)
    reached = passes[CRITIC_GAN].reached if CRITIC_GAN in passes else None
    found = memory.static(config, sizes, mesh.shards, resident, parts, reached)
    apart = mesh.gpus > 1
    if not apart:
        found.pop("gradients on their way", None)
        if memory.config_width(config) == memory.FLOAT32 and parts == 1:
            gradients = found.pop("gradients", 0.0)
            return found | {"activations and gradients": max(activations(passes, apart=False), gradients)}
    return found | {"activations": activations(passes)}


def largest(
    config: Config, sizes: memory.Sizes, mesh: Layout, resident: bool, measured: Measured, gpu: Gpu
) -> int:
    """Rows at a time that fit on a GPU, up to its share of the batch; 0 if none do."""
    share = config.distill.batch // mesh.gpus
    fit = (
        rows
        for rows in range(share, 0, -1)
        if sum(held(config, sizes, mesh, resident, measured, rows).values()) <= USABLE * gpu.gb * GB
    )
    return next(fit, 0)


Traffic = dict[str, tuple[float, float]]
"""Kind of collective -> calls, and bytes that a GPU receives, per average step."""
GATHER, SCATTER, REDUCE = "all-gather", "reduce-scatter", "all-reduce"


def owned(fam: ModelFamily, network: nn.Module, outermost: bool) -> dict[str, int]:
    """Weights that learn by unit, named by its place in the family's list; "" has what is left. None are left out."""
    units, mine, seen = list(fam.blocks(network)), {}, set()
    used = {id(unit) for unit in (parallel.outermost(units) if outermost else units)}
    named = [(str(i), unit) for i, unit in enumerate(units) if id(unit) in used]
    for name, unit in [*named, ("", network)]:
        fresh = [p for p in unit.parameters() if id(p) not in seen]
        seen |= {id(p) for p in fresh}
        mine[name] = sum(p.numel() for p in fresh if p.requires_grad)
    return {name: size for name, size in mine.items() if size}


def traffic(
    config: Config, fam: ModelFamily, nets: Networks, mesh: Layout, resident: bool, passes: Passes, rows: int
) -> Traffic:
    """What an average step sends. Resident networks are gathered, and their gradients added up, once per unit and update;
    others are gathered in each direction of each pass, and their gradients added up in each backward pass."""
    if mesh.gpus == 1:
        return {}
    settings, width = config.distill, memory.config_width(config)
    parts = -(-settings.batch // mesh.gpus // rows)
    rates = {"student": 1.0 if settings.regression else 1 / settings.critic_updates}
    rates |= {} if settings.regression else {"critic": 1.0}
    total, low_rank = _Sum(mesh), settings.lora is not None
    shared = bool(settings.lora and settings.lora.shared_base)
    whole = {"student": resident or low_rank, "critic": resident or shared, "teacher": resident or low_rank}
    for name, rate in rates.items():
        if whole[name]:
            units = owned(fam, getattr(nets, name), outermost=True).values()
            total.gather(list(units), width, rate)
            total.reduce(list(units), width, rate)
    if nets.head:
        size, reductions = [memory.count(nets.head)], 2 if settings.gan and settings.gan.shared_view else 1
        total.gather(size, memory.FLOAT32, 1)
        total.reduce(size, memory.FLOAT32, reductions)
    sizes = owned(fam, nets.critic, outermost=False)
    for name, often in mean_calls(config).items():
        if not whole[OF[name]]:
            one = passes[name]
            entered = [sizes[unit] for unit in (*one.entered, "") if unit in sizes]
            total.gather(entered, width, often * parts * (2 if one.backward else 1))
            total.reduce(entered, width, often * parts * bool(one.reached))
    norms = sum(rates.values()) if mesh.shards > 1 else 0
    total.add(REDUCE, norms, norms * memory.FLOAT32)
    return {kind: sums for kind, sums in total.sums.items() if sums[0]}


OF = {ROLLOUT: "student", STUDENT: "student", TEACHER: "teacher"}
OF |= dict.fromkeys((SCORE, STUDENT_GAN, CRITIC_GAN, CRITIC), "critic")
"""Whose passes they are."""


class _Sum:
    """Of calls and bytes by kind."""

    def __init__(self, mesh: Layout) -> None:
        self.mesh, self.sums = mesh, dict.fromkeys((GATHER, SCATTER, REDUCE), (0.0, 0.0))
        self.others = 1 - 1 / mesh.shards
        """Share of a tensor that other processes have."""

    def add(self, kind: str, calls: float, size: float) -> None:
        before = self.sums[kind]
        self.sums[kind] = before[0] + calls, before[1] + size

    def gather(self, units: Sequence[int], width: int, times: float) -> None:
        """Weights, each unit so many times."""
        if self.mesh.shards > 1:
            self.add(GATHER, times * len(units), times * sum(units) * width * self.others)

    def reduce(self, units: Sequence[int], width: int, times: float) -> None:
        """Gradients: among the shards as they come, then among the replicas in float32, there and back."""
        if self.mesh.shards > 1:
            self.add(SCATTER, times * len(units), times * sum(units) * width * self.others)
        if self.mesh.replicas > 1:
            size = 2 * (1 - 1 / self.mesh.replicas) * memory.FLOAT32 * sum(units) / self.mesh.shards
            self.add(REDUCE, times * len(units), times * size)


def seconds(
    config: Config, nets: Networks, mesh: Layout, gpu: Gpu, passes: Passes, sent: Traffic
) -> dict[str, float]:
    """Of an average step, by what takes them; nothing is assumed to overlap."""
    share = config.distill.batch // mesh.gpus
    rows = min(config.engine.micro_batch or share, share)
    computing = sum(
        often * share / rows * _computing(passes[name].at(rows), config, gpu)
        for name, often in mean_calls(config).items()
    )
    inside = mesh.shards <= mesh.per_node
    link = {GATHER: inside, SCATTER: inside, REDUCE: mesh.gpus <= mesh.per_node}
    sending = sum(
        size / (LINK_EFFICIENCY * (gpu.inside_gb_s if link[kind] else gpu.between_gb_s) * GB) + calls * CALL_S
        for kind, (calls, size) in sent.items()
    )
    return {"computing": computing, "sending": sending, "updating": _updating(config, nets, mesh, gpu)}


def _computing(one: Pass, config: Config, gpu: Gpu) -> float:
    """Of the device or of the host, whichever is longer. In float32, PyTorch lets convolutions use TF32, and matrix
    products not."""
    if config.distill.dtype == "bfloat16":
        rated = one.flops / gpu.bf16
    else:
        rated = one.convolutions / gpu.tf32 + (one.flops - one.convolutions) / gpu.fp32
    return max(rated / (EFFICIENCY * TERA), one.kernels * KERNEL_S)


def _updating(config: Config, nets: Networks, mesh: Layout, gpu: Gpu) -> float:
    settings = config.distill
    rates = {"student": 1.0 if settings.regression else 1 / settings.critic_updates, "critic": 1.0}
    sizes = learning(config, nets)
    moved = sum(
        rates[name] * sizes[name] * (UPDATE_BYTES + 12 * len(player.ema))
        for name, player in (("student", settings.student), ("critic", settings.critic))
    )
    return moved / mesh.shards / (gpu.memory_gb_s * GB)


def learning(config: Config, nets: Networks) -> dict[str, int]:
    """Weights that learn, by player; the critic's with its head."""
    mine = {
        name: sum(p.numel() for p in network.parameters() if p.requires_grad)
        for name, network in (("student", nets.student), ("critic", nets.critic))
    }
    mine["critic"] += memory.count(nets.head) if nets.head else 0
    return mine | ({"critic": 0} if config.distill.regression else {})


def checkpoint_bytes(config: Config, nets: Networks) -> int:
    """Masters, moments and averages, in float32."""
    settings, sizes = config.distill, learning(config, nets)
    return memory.FLOAT32 * sum(
        sizes[name] * (3 + len(player.ema))
        for name, player in (("student", settings.student), ("critic", settings.critic))
    )


@dataclass(frozen=True)
class Reference:
    """The published scheme on its 64 GPUs: every layer a unit of its own, in float32, nothing kept gathered."""

    units: int
    unit_calls: float
    """Per average step; of a unit a gather in each direction, and a reduction."""
    computing_s: float
    overhead_s: float
    published_s: float = 10.8
    ours_s: float = 0.0

    @property
    def seconds(self) -> float:
        return self.computing_s + self.overhead_s


REFERENCE_UNIT_S = 1.2e-3
"""Seconds of overhead per unit call: inferred from the published run times themselves, by one of three differences
between them (the others give 0.7 and 1.5 ms), and never profiled. That the sum meets the published time is therefore no
proof; that the computing alone does not come near it is what this shows."""
REFERENCE_UNIT_WEIGHTS = 3000
"""The smallest unit of its wrapping policy, in weights."""


def reference(
    config: Config, nets: Networks, measured: Measured, reached: set[int]
) -> tuple[int, float, float]:
    """Units of a network, unit calls and seconds of computing of an average step, at two rows per A100: rollouts and the
    critic's score in TF32, the rest in bfloat16; the head sees real and fake apart."""
    units = wrapped(nets.critic, REFERENCE_UNIT_WEIGHTS)
    encoder = sum(any(id(p) in reached for p in unit.parameters()) for unit in units)
    sizes = {
        STUDENT_GAN: 2 * encoder,
        CRITIC_GAN: 2 * 3 * encoder,
        STUDENT: 3 * len(units),
        CRITIC: 3 * len(units),
    }
    often, gpu = mean_calls(config), GPUS["a100-80gb"]
    unit_calls = sum(count * sizes.get(name, len(units)) for name, count in often.items())
    computing = sum(
        count * measured.passes[name].at(2).flops / (gpu.tf32 if name in (ROLLOUT, SCORE) else gpu.bf16)
        for name, count in often.items()
    )
    return len(units), unit_calls, computing / (EFFICIENCY * TERA)


def wrapped(network: nn.Module, least: int) -> list[nn.Module]:
    """The units of FSDP's size_based_auto_wrap_policy: from the leaves up, what has so many weights left to it."""
    units: list[nn.Module] = []

    def taken(module: nn.Module) -> int:
        size = memory.count(module)
        if size < least:
            return 0
        inner = sum(taken(child) for child in module.children())
        if size - inner >= least and not isinstance(module, nn.ModuleList | nn.ModuleDict):
            units.append(module)
            return size
        return inner

    for child in network.children():
        taken(child)
    return units


@dataclass(frozen=True)
class Choice:
    """One way to do it."""

    mesh: Layout
    resident: bool
    checkpointing: str
    gb: float
    seconds: float
    fits: bool


@dataclass(frozen=True)
class Plan:
    """All that is told, for programs."""

    config: Config
    gpu_name: str
    gpu: Gpu
    mesh: Layout
    price: float
    """Of a GPU for an hour."""
    weights: dict[str, int]
    """By network, and how many of them learn."""
    flops: dict[str, float]
    """Of an average step of the whole batch, by part."""
    memory: dict[str, float]
    """Bytes of a GPU by part."""
    resident: bool
    rows: int
    """At a time, through the networks of a GPU."""
    largest: int
    """Rows at a time that would fit, up to a GPU's share of the batch."""
    traffic: Traffic
    seconds: dict[str, float]
    """Of an average step."""
    checkpoint: int
    """Bytes of one."""
    choices: tuple[Choice, ...]
    reference: Reference | None

    @property
    def seconds_per_step(self) -> float:
        return sum(self.seconds.values())

    @property
    def hours(self) -> float:
        return self.config.distill.steps * self.seconds_per_step / 3600

    @property
    def gpu_hours(self) -> float:
        return self.hours * self.mesh.gpus

    @property
    def cost(self) -> float:
        return self.gpu_hours * self.price

    @property
    def memory_gb(self) -> float:
        return sum(self.memory.values()) / GB

    @property
    def fits(self) -> bool:
        return self.memory_gb <= USABLE * self.gpu.gb

    @property
    def checkpoint_s(self) -> float:
        """All machines write at once."""
        nodes = -(-self.mesh.gpus // self.mesh.per_node)
        return self.checkpoint / (DISK_GB_S * GB * nodes)

    @property
    def facts(self) -> dict[str, Any]:
        """The numbers a budget needs."""
        return {
            "gpus": self.mesh.gpus,
            "tflop_per_step": sum(self.flops.values()) / TERA,
            "memory_gb": self.memory_gb,
            "fits": self.fits,
            "largest_micro_batch": self.largest,
            "seconds_per_step": self.seconds_per_step,
            "hours": self.hours,
            "gpu_hours": self.gpu_hours,
            "cost": self.cost,
            "checkpoint_gb": self.checkpoint / GB,
            "checkpoint_s": self.checkpoint_s,
        }


def plan(
    config: Config, gpu: str, gpus_per_node: int = 8, nodes: int = 1, price: float = 0.0, teacher: str = ""
) -> Plan:
    """Say what a distillation would take: memory, seconds, GPU-hours, cost. Needs neither the GPUs nor the teacher's weights.

    Args:
        gpu: Kind of GPU: a100-40gb, a100-80gb, h100-80gb, h200-141gb, l4-24gb, l40s-48gb, a10-24gb.
        gpus_per_node: GPUs of a machine.
        nodes: Machines.
        price: Of a GPU for an hour, in any currency.
        teacher: Local folder of the teacher, for sd15 and sdxl of another size than the published networks.
    """
    if gpu not in GPUS:
        raise Refused(f"unknown GPU {gpu!r}; {near_miss(gpu, list(GPUS))}")
    fam, mesh = _family(config, teacher), layout(config, nodes, gpus_per_node)
    made = planned(config, fam, gpu, mesh, price)
    show(made, Console())
    return made


def _family(config: Config, teacher: str) -> ModelFamily:
    if teacher and not Path(teacher).is_dir():
        raise Refused(
            f"{teacher} is not a folder on this machine; give that of the teacher, or leave out --teacher"
        )
    return build.family(config.family, Path(teacher) if teacher else None)


MODES = ("none", "selective", "full")
SIZES = (1, 2)
"""Rows at which passes are run: what they keep is on a line through both."""


def planned(config: Config, fam: ModelFamily, gpu_name: str, mesh: Layout, price: float = 0.0) -> Plan:
    gpu, nets, sizes = GPUS[gpu_name], networks(config, fam), memory.sizes(config, fam)
    weights = _weights(config, nets)
    measured, reached = rehearsed(config, fam, nets)
    share = config.distill.batch // mesh.gpus
    rows = min(config.engine.micro_batch or share, share)

    def chosen(mesh: Layout) -> bool:
        """As `build.is_resident` would."""
        if config.engine.weights != "auto" or mesh.gpus == 1:
            return config.engine.weights != "sharded"
        found = memory.static(config, sizes, mesh.shards, True, memory.parts_of(config, mesh.shards))
        return sum(found.values()) <= memory.ROOM * gpu.gb * GB

    def timed(mesh: Layout, resident: bool, of: Measured) -> tuple[Traffic, dict[str, float]]:
        sent = traffic(config, fam, nets, mesh, resident, of.passes, rows)
        return sent, seconds(config, nets, mesh, gpu, of.passes, sent)

    def choice(mesh: Layout, resident: bool, how: str) -> Choice:
        of = measured[how]
        gb = sum(held(config, sizes, mesh, resident, of, rows).values()) / GB
        return Choice(
            mesh, resident, how, gb, sum(timed(mesh, resident, of)[1].values()), gb <= USABLE * gpu.gb
        )

    mine, resident = measured[config.engine.checkpointing], chosen(mesh)
    sent, spent = timed(mesh, resident, mine)
    return Plan(
        config,
        gpu_name,
        gpu,
        mesh,
        price,
        weights,
        flops(mine.passes, mean_calls(config), config.distill.batch),
        held(config, sizes, mesh, resident, mine, rows),
        resident,
        rows,
        largest(config, sizes, mesh, resident, mine, gpu),
        sent,
        spent,
        checkpoint_bytes(config, nets),
        tuple(choice(*one) for one in _choices(mesh)),
        _compared(config, fam, nets, measured, reached) if config.recipe == "sdxl-4step" else None,
    )


def _choices(mesh: Layout) -> Iterator[tuple[Layout, bool, str]]:
    for shards in sorted({1, mesh.per_node, mesh.gpus}):
        for resident in (True, False) if shards > 1 else (True,):
            for how in MODES:
                yield Layout(mesh.gpus, mesh.per_node, shards), resident, how


def _compared(
    config: Config, fam: ModelFamily, nets: Networks, measured: Mapping[str, Measured], reached: set[int]
) -> Reference:
    """Ours on the GPUs of the reference, at its batch of two on each."""
    units, unit_calls, computing = reference(config, nets, measured["none"], reached)
    mesh, passes = Layout(64, 8, 8), measured["none"].passes
    sent = traffic(config, fam, nets, mesh, True, passes, config.distill.batch // mesh.gpus)
    ours = sum(seconds(config, nets, mesh, GPUS["a100-80gb"], passes, sent).values())
    return Reference(units, unit_calls, computing, unit_calls * REFERENCE_UNIT_S, ours_s=ours)


def rehearsed(config: Config, fam: ModelFamily, nets: Networks) -> tuple[dict[str, Measured], set[int]]:
    """The passes by checkpointing, the recipe's own at two sizes; and the weights that the GAN's gradient reaches, by id."""
    own = config.engine.checkpointing
    found: dict[str, Measured] = {}
    for how in (own, *(mode for mode in MODES if mode != own)):
        with checkpointing(fam, nets, how):
            known = found[own].others if found else None
            high = Rehearsal(config, fam, nets, SIZES[1])
            passes = high.run(known)
            if how == own:
                reached = high.reached
                found[how] = Measured(Rehearsal(config, fam, nets, SIZES[0]).run(), passes)
            else:
                found[how] = Measured(passes)
    return found, reached


def _weights(config: Config, nets: Networks) -> dict[str, int]:
    learns = learning(config, nets)
    head = {"head": memory.count(nets.head)} if nets.head else {}
    critic = {} if config.distill.regression else {"critic": memory.count(nets.critic)}
    networks = {"teacher": memory.count(nets.teacher), "student": memory.count(nets.student)}
    return networks | critic | head | {"learn": sum(learns.values())}


def show(made: Plan, console: Console) -> None:
    for title, table in _tables(made):
        console.print(f"[bold]{title}[/bold]", table, sep="\n")
    console.print("\n".join(f"- {line}" for line in unknown(made)), highlight=False)


def _tables(made: Plan) -> Iterator[tuple[str, Table]]:
    config, mesh = made.config, made.mesh
    told = f"{config.recipe} on {mesh.gpus} x {made.gpu_name}, mesh {mesh} (replicas x shards)"
    yield _table(told, ("weights", "millions"), [(n, f"{v / 1e6:,.2f}") for n, v in made.weights.items()])
    updates = 1 if config.distill.regression else config.distill.critic_updates
    work = [(n, _tflop(v), _tflop(v * updates)) for n, v in made.flops.items()]
    total = sum(made.flops.values())
    yield _table(
        f"TFLOP of {config.distill.batch} images",
        ("part", "average step", f"student update ({updates} steps)"),
        [*work, ("all", _tflop(total), _tflop(total * updates))],
    )
    held = [(name, _s(size / GB)) for name, size in made.memory.items()]
    yield _table(
        f"memory of a GPU, weights {'resident' if made.resident else 'sharded'}, {made.rows} images at a time",
        ("part", "GB"),
        [*held, ("peak", _s(made.memory_gb)), ("usable", f"{USABLE * made.gpu.gb:.1f}")],
    )
    if made.traffic:
        sent = [(kind, f"{calls:,.1f}", _s(size / GB)) for kind, (calls, size) in made.traffic.items()]
        yield _table("messages of a GPU, per average step", ("kind", "calls", "GB received"), sent)
    yield _table("prediction", ("", ""), list(_predicted(made)))
    yield _table(
        "other ways",
        ("mesh", "weights", "checkpointing", "GB", "s/step", "fits"),
        [
            (
                str(c.mesh),
                _word(c.resident),
                c.checkpointing,
                f"{c.gb:.1f}",
                _s(c.seconds),
                "yes" if c.fits else "no",
            )
            for c in made.choices
        ],
    )
    if made.reference:
        yield _reference_table(made.reference)


def _predicted(made: Plan) -> Iterator[tuple[str, str]]:
    config = made.config
    yield from ((f"{name}, s", _s(value)) for name, value in made.seconds.items())
    yield "step, s", _s(made.seconds_per_step)
    yield f"{config.distill.steps:,} steps, hours", _s(made.hours)
    yield "GPU-hours", _s(made.gpu_hours)
    if made.price:
        yield f"cost at {made.price:g} per GPU-hour", f"{made.cost:,.0f}"
    yield "largest micro-batch that fits", str(made.largest or "none")
    saves = config.distill.steps // config.distill.save_every
    yield (
        f"checkpoint, every {config.distill.save_every} steps ({saves} of them), GB",
        f"{made.checkpoint / GB:.2f}",
    )
    yield f"checkpoint at {DISK_GB_S:g} GB/s per machine, in the background, s", _s(made.checkpoint_s)


def _reference_table(of: Reference) -> tuple[str, Table]:
    return _table(
        "seconds of a step on 64 x a100-80gb, 2 images each",
        ("", "s"),
        [
            ("reference: computing (rollouts and score in TF32)", _s(of.computing_s)),
            (
                f"reference: {of.unit_calls:,.0f} calls of its {of.units} units a network, {1e3 * REFERENCE_UNIT_S:g} ms each",
                _s(of.overhead_s),
            ),
            ("reference: both", _s(of.seconds)),
            ("reference: published", _s(of.published_s)),
            ("ours, weights resident", _s(of.ours_s)),
        ],
    )


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> tuple[str, Table]:
    table = Table(show_header=any(columns))
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left")
    for row in rows:
        table.add_row(*row)
    return title, table


def _tflop(value: float) -> str:
    return _s(value / TERA)


def _s(value: float) -> str:
    return f"{value:.3g}" if value < 1 else f"{value:,.2f}"


def _word(resident: bool) -> str:
    return "resident" if resident else "sharded"


def unknown(made: Plan) -> list[str]:
    """What this does not know, in sentences."""
    lines = [
        f"Rates are those of the data sheet ({made.gpu.source}). That {EFFICIENCY:.0%} of the computing rate and {LINK_EFFICIENCY:.0%} of "
        "the links is reached is an assumption: nothing here was measured on a GPU.",
        "Counted: weights, FLOPs of matrix products, convolutions and attention. Work limited by memory (norms, activations) is "
        "in the efficiency. Messages follow from the units, without the padding of shards.",
        f"A kernel takes {1e6 * KERNEL_S:g} us of the host, an assumption too. Nothing is assumed to overlap. Waiting for data, text encoders, previews, judging checkpoints, start, congestion of the network and slow "
        "machines are not in the seconds.",
        f"Memory is the sum of what each part has at its fullest. Activations are what PyTorch keeps, without the workspace of convolutions; {1 - USABLE:.0%} of the memory is left for that, the "
        "driver and fragmentation.",
    ]
    if made.config.engine.compile:
        lines.append("What torch.compile saves, in time and memory, is not in it.")
    if made.reference:
        lines.append(
            "The time per unit call of the reference was itself inferred from its published times: that the sum meets one of them "
            "is no proof of the cause."
        )
    if made.config.distill.regression:
        lines.append("The decoder and the distance of images of the warm-up are not counted.")
    return lines
