"""Speed of the engine, compared with a plain implementation of the same algorithm.

Three networks: the digits of the demo, the emoji SDXL with its teacher's weights, and an ADM U-Net of 30 M parameters. In a
round, every variant makes one update of the student, which is `critic_updates` steps, and its process CPU time is taken:
ratios within a round are reproducible on a shared machine, seconds are not. A process has one thread, because threads wait
for each other in busy loops, which would count as CPU time. The fast mode is in bfloat16 where the processor has
instructions for it, and in float32 elsewhere. Each optimization is measured alone: those that are always on by adding them
to the plain implementation, the others by switching them on in the engine.

The time of a step is also compared with the sum of its parts: each network pass, and the optimizer, run alone.

Prints a table for each network and adds to runs/bench/engine.json. Rollouts stop at the same steps in all variants of a
round.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import count
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from dmd2 import recipes
from dmd2.batch import Batch, Conditioning, CondPair
from dmd2.config import AdmConfig, Config
from dmd2.denoiser import Denoiser
from dmd2.io.local import write_text
from dmd2.models.family import ModelFamily, make_family
from dmd2.parallel import ranks
from dmd2.parallel.ranks import World
from dmd2.rng import Rng, draw_shared
from dmd2.training import build
from dmd2.training.optim import NETWORK, Trainable
from dmd2.training.terms import HEAD
from dmd2.training.trainer import DMD2Trainer
from tests.bench.baseline import Baseline, Learner, NoisedSamples, Process

RESULT = Path("runs/bench/engine.json")
TEACHER = Path("tests/emoji/pipeline")
CPU = torch.device("cpu")
MIDDLE = AdmConfig(
    resolution=64,
    image_channels=3,
    classes=1000,
    channels=64,
    multipliers=(1, 2, 4, 4),
    blocks=1,
    attention=(16, 8),
    patch=2,
)
"""The published ImageNet-64 network, a third as wide, on folded pixels."""


@dataclass(frozen=True)
class Net:
    """A network, its recipe and its conditioning."""

    config: Config
    family: ModelFamily
    weights: dict[str, Tensor]
    """Of the teacher."""
    conditioning: CondPair

    def real(self, rows: int) -> Tensor:
        return torch.randn(rows, *self.family.shape)


def digits() -> Net:
    return _random(recipes.get("edm-digits"))


def middle() -> Net:
    base = recipes.get("edm-imagenet64")
    family = base.family.model_copy(update={"network": MIDDLE})
    distill = base.distill.model_copy(update={"batch": 8, "dtype": "float32"})
    return _random(base.model_copy(update={"family": family, "distill": distill}))


def emoji() -> Net:
    config = recipes.get("sdxl-4step-emoji")
    family = make_family(config.family, TEACHER)
    texts = [f"emoji number {row}" for row in range(config.distill.batch)]
    with torch.no_grad():
        conditioning = family.condition(texts)
    return Net(config, family, family.weights(TEACHER), conditioning)


def _random(config: Config) -> Net:
    """Random weights without zeros: speed does not depend on the values of others."""
    family = make_family(config.family)
    torch.manual_seed(0)
    network = family.network()
    for parameter in network.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    labels = torch.arange(config.distill.batch) % config.family.classes
    return Net(config, family, network.state_dict(), CondPair(Conditioning(label=labels), Conditioning()))


NETS: dict[str, Callable[[], Net]] = {"edm-digits": digits, "sdxl-4step-emoji": emoji, "edm-middle": middle}


class OneKernel(Learner):
    """Fused AdamW; gradient norms and EMAs over lists of tensors."""

    def _optimizer(self, **how: bool) -> torch.optim.Optimizer:
        return super()._optimizer(fused=True)

    def _clip(self) -> Tensor:
        return nn.utils.clip_grad_norm_(self.parameters, self.settings.max_grad_norm, foreach=True)

    @torch.no_grad()
    def _average(self, average: list[Tensor], kept: float) -> None:
        torch._foreach_lerp_(average, list[Tensor](self.parameters), 1 - kept)


class Fused(Baseline):
    learner = OneKernel


class OneDiscriminatorPass(Baseline):
    """Fake and real samples in one batch."""

    def _both_logits(
        self, fake: NoisedSamples, real: NoisedSamples, cond: Conditioning
    ) -> tuple[Tensor, Tensor]:
        x_t, timestep = torch.cat([fake[0], real[0]]), torch.cat([fake[1], real[1]])
        of_fake, of_real = self._logits(x_t, timestep, cond.cat(cond)).chunk(2)
        return of_fake, of_real


class TwoPasses(Baseline):
    """Classifier-free guidance by two passes of the teacher."""

    def _unconditional_and_conditional(
        self, x_t: Tensor, timestep: Tensor, real: Batch
    ) -> tuple[Tensor, Tensor]:
        out = partial(self.process.out, self.teacher, x_t, timestep)
        return out(real.uncond), out(real.cond)


class WholePass(Process):
    def features(self, network: nn.Module, x_t: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
        return Denoiser(network, self.family.diffusion).output_and_features(x_t, timestep, cond)[1]


class NoEarlyExit(Baseline):
    """Bottleneck features by a whole forward pass."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.process = WholePass(self.family)


PLAIN: dict[str, type[Baseline]] = {
    "baseline": Baseline,
    "baseline, fused AdamW, norms and EMAs": Fused,
    "baseline, real and fake in one batch": OneDiscriminatorPass,
    "baseline, guidance by two passes": TwoPasses,
    "baseline, features by a whole pass": NoEarlyExit,
}
LOWER = {} if ranks.is_emulated(CPU, torch.bfloat16) else {"dtype": "bfloat16"}
"""The type of the fast mode: bfloat16, or float32 on a processor without bfloat16 instructions."""
LESS: dict[str, Any] = {"reuse_denoising_pass": True, "continue_rollouts": True}
SWITCHES: dict[str, dict[str, Any]] = {
    "parity": {},
    "parity, compile": {"compile": "on"},
    **({"parity, bfloat16": LOWER} if LOWER else {}),
    "parity, reused denoising pass": {"reuse_denoising_pass": True},
    "parity, continued rollouts": {"continue_rollouts": True},
    "fast without compile": LESS | LOWER,
    "fast": LESS | LOWER | {"compile": "on"},
}
Step = Callable[[int], object]
"""(step) -> anything; makes one training step."""


def main(quick: bool = False, only: tuple[str, ...] = tuple(NETS), rounds: int = 5, threads: int = 1) -> None:
    """Measure all variants.

    Args:
        quick: Two rounds without compilation; the result goes to a file of its own.
        only: Names of networks.
        rounds: Timed updates of the student, for each variant.
        threads: Threads of the process; more than one only on a machine that is idle otherwise.
    """
    os.environ |= {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
    path = RESULT.with_stem("engine-quick") if quick else RESULT
    for name in only:
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:  # one that reads this environment
            rows = pool.submit(measure, name, 2 if quick else rounds, quick).result()
        show(name, rows)
        found = json.loads(path.read_text()) if path.is_file() else {}
        found["nets"] = found.get("nets", {}) | {name: rows}
        write_text(path, json.dumps(found, indent=1) + "\n")


def measure(name: str, rounds: int, quick: bool) -> dict[str, Any]:
    net = seeded(NETS[name](), rounds)
    variants = {label: plain(net, kind) for label, kind in PLAIN.items() if _differs(net, label)}
    trainers: dict[str, DMD2Trainer] = {}
    for label, switches in SWITCHES.items():
        if _differs(net, label) and not (quick and switches.get("compile")):
            trainers[label] = engine(net, switches)
            variants[label] = partial(turn, net, trainers[label], net.real(net.config.distill.batch))
    parts = Parts(net, trainers["parity"])
    seconds: dict[str, list[float]] = {label: [] for label in variants}
    alone: dict[str, list[float]] = {label: [] for label in parts.calls}
    cycle = net.config.distill.critic_updates
    for number in range(-1, rounds):  # the first warms up
        for label, step in variants.items():
            start = time.process_time()
            for index in range(cycle):
                step((number + 1) * cycle + index)
            seconds[label].append(time.process_time() - start)
        for label, call in parts.calls.items():
            alone[label].append(cpu_seconds(call))
    return facts(net, parts, {k: v[1:] for k, v in seconds.items()}, {k: v[1:] for k, v in alone.items()})


def seeded(net: Net, rounds: int) -> Net:
    """The same with a seed whose rollouts have the expected mean length."""
    steps, timesteps = net.config.distill.critic_updates, len(net.config.distill.student_timesteps)
    span = range(steps, steps * (rounds + 1))

    def mean(seed: int) -> float:
        return statistics.mean(draw_shared(seed, step, timesteps) for step in span)

    seed = next(seed for seed in count() if abs(mean(seed) - (timesteps - 1) / 2) < 0.05)
    return Net(net.config.model_copy(update={"seed": seed}), net.family, net.weights, net.conditioning)


def plain(net: Net, kind: type[Baseline]) -> Step:
    trainer = kind(net.config, net.family, net.weights, net.family.head().state_dict())
    x = net.real(net.config.distill.batch)
    return lambda step: trainer.step(Batch(x, *net.conditioning), step)  # noise from torch's global generator


def engine(net: Net, switches: dict[str, Any]) -> DMD2Trainer:
    switches = dict(switches)
    units = net.config.engine.model_copy(update={"compile": switches.pop("compile", "off")})
    gan = net.config.distill.gan
    assert gan
    gan = gan.model_copy(update={"reuse_denoising_pass": switches.pop("reuse_denoising_pass", False)})
    if len(net.config.distill.student_timesteps) == 1:
        switches.pop("continue_rollouts", None)
    distill = net.config.distill.model_copy(update=switches | {"gan": gan})
    config = net.config.model_copy(update={"distill": distill, "engine": units})
    trainer = build.trainer(config, net.family, net.weights, World(CPU))
    assert isinstance(trainer, DMD2Trainer)
    return trainer


def turn(net: Net, trainer: DMD2Trainer, x: Tensor, step: int) -> object:
    """One step, with random numbers addressed by row, as in a run."""
    return trainer.step(Batch(x, *net.conditioning, Rng.at(net.config.seed, step, range(len(x)), CPU)), step)


class Parts:
    """The network passes and optimizer steps of an update of the student, each run alone."""

    def __init__(self, net: Net, trainer: DMD2Trainer) -> None:
        batch, self.net = net.config.distill.batch, net
        network = net.family.network().requires_grad_(False)
        network.load_state_dict(net.weights)
        assert isinstance(trainer.critic.module, nn.ModuleDict)
        student, critic, head = (
            trainer.student.module,
            trainer.critic.module[NETWORK],
            trainer.critic.module[HEAD],
        )
        x, timestep = net.real(batch), torch.full((batch,), len(net.family.diffusion) // 2)
        inputs = (*net.family.diffusion.network_input(x, timestep), net.conditioning.cond)
        twice = (*(torch.cat([t, t]) for t in inputs[:2]), net.conditioning.cond.cat(net.conditioning.cond))
        guided = net.config.distill.guidance != 1
        of_teacher = (*twice[:2], net.conditioning.cond.cat(net.conditioning.uncond)) if guided else inputs

        def discriminate(x: Tensor, time: Tensor, cond: Conditioning) -> Tensor:
            logits: Tensor = head(critic(x, time, cond, features_only=True))
            return logits

        def at_samples() -> None:
            x = inputs[0].detach().requires_grad_()
            torch.autograd.grad(discriminate(x, *inputs[1:]).sum(), x)

        self.passes: dict[str, Callable[[], object]] = {
            "student, no gradient": partial(forward, student, inputs),
            "student, forward and backward": partial(both_ways, student, inputs, trainer.student.module),
            "teacher": partial(forward, network, of_teacher),
            "critic, no gradient": partial(forward, critic, inputs),
            "critic to the head, backward to the samples": at_samples,
            "critic to the head, twice the batch, both ways": partial(
                both_ways, discriminate, twice, trainer.critic.module
            ),
            "critic, forward and backward": partial(both_ways, critic, inputs, trainer.critic.module),
        }
        self.optimizers: dict[str, Callable[[], object]] = {
            "update of the student": partial(update, trainer.student, gradients(trainer.student)),
            "update of the critic": partial(update, trainer.critic, gradients(trainer.critic)),
        }
        self.calls = self.passes | self.optimizers

    def counts(self, number: int) -> dict[str, int]:
        """How often a round of the engine in parity mode runs each part."""
        config = self.net.config
        updates, timesteps = config.distill.critic_updates, len(config.distill.student_timesteps)
        steps = range((number + 1) * updates, (number + 2) * updates)
        rollouts = sum(draw_shared(config.seed, step, timesteps) for step in steps)
        each = {name: updates for name in self.calls if name.endswith(("both ways", "of the critic"))}
        each |= {"critic, forward and backward": updates, "student, no gradient": rollouts + updates - 1}
        return dict.fromkeys(self.calls, 1) | each


Inputs = tuple[Any, ...]


@torch.no_grad()
def forward(network: Callable[..., Tensor], inputs: Inputs) -> None:
    network(*inputs)


def both_ways(network: Callable[..., Tensor], inputs: Inputs, learns: nn.Module) -> None:
    network(*inputs).sum().backward()
    learns.zero_grad()


def gradients(trainable: Trainable) -> list[Tensor]:
    return [torch.zeros_like(p) for p in trainable.module.parameters()]


def update(trainable: Trainable, gradients: list[Tensor]) -> None:
    for parameter, gradient in zip(trainable.module.parameters(), gradients, strict=True):
        parameter.grad = gradient
    trainable.update(0)


def cpu_seconds(call: Callable[[], object], times: int = 3) -> float:
    """CPU seconds of one call."""
    start = time.process_time()
    for _ in range(times):
        call()
    return (time.process_time() - start) / times


def facts(
    net: Net, parts: Parts, seconds: dict[str, list[float]], alone: dict[str, list[float]]
) -> dict[str, Any]:
    def against(of: str, mode: str) -> float:
        return statistics.median(a / b for a, b in zip(seconds[of], seconds[mode], strict=True))

    def overhead(names: Iterable[str]) -> float:
        shares = []
        for number, whole in enumerate(seconds["parity"]):
            counts = parts.counts(number)
            shares.append(whole / sum(counts[name] * statistics.median(alone[name]) for name in names))
        return statistics.median(shares)

    network = net.family.network()
    return {
        "fast_type": LOWER.get("dtype", "float32"),
        "processor": torch.backends.cpu.get_cpu_capability(),
        "parameters_m": round(sum(p.numel() for p in network.parameters()) / 1e6, 2),
        "batch": net.config.distill.batch,
        "parity_ratio": against("baseline", "parity"),
        "fast_ratio": against("baseline", "fast") if "fast" in seconds else None,
        "step_overhead": overhead(parts.passes),
        "step_over_passes_and_optimizer": overhead(parts.calls),
        "lines": {
            label: {
                "cpu_s": statistics.median(values),
                "against_baseline": against("baseline", label),
                "against_parity": against("parity", label),
            }
            for label, values in seconds.items()
        },
        "passes": {
            name: {
                "cpu_s": statistics.median(values),
                "in_an_update": statistics.mean(parts.counts(n)[name] for n in range(len(values))),
            }
            for name, values in alone.items()
        },
    }


def show(name: str, rows: dict[str, Any]) -> None:
    console = Console()
    table = Table(
        title=f"{name}: an update of the student, {rows['parameters_m']} M parameters, batch {rows['batch']}; "
        f"{rows['processor']}, fast in {rows['fast_type']}"
    )
    for column in ("", "CPU s", "baseline / it", "parity / it"):
        table.add_column(column, justify="right" if column else "left")
    for label, line in rows["lines"].items():
        table.add_row(
            label, f"{line['cpu_s']:.2f}", f"{line['against_baseline']:.2f}", f"{line['against_parity']:.2f}"
        )
    console.print(table)
    table = Table(title=f"{name}: parts of a step in parity mode, each run alone")
    for column in ("", "CPU s", "times", "CPU s in an update"):
        table.add_column(column, justify="right" if column else "left")
    for label, line in rows["passes"].items():
        table.add_row(
            label,
            f"{line['cpu_s']:.4f}",
            f"{line['in_an_update']:.1f}",
            f"{line['cpu_s'] * line['in_an_update']:.3f}",
        )
    console.print(table)
    console.print(
        f"a step / its passes of networks = {rows['step_overhead']:.3f}, "
        f"/ passes and optimizers = {rows['step_over_passes_and_optimizer']:.3f}\n"
    )


def _differs(net: Net, label: str) -> bool:
    """Whether the variant differs from the others for this network."""
    distill = net.config.distill
    return not (
        (distill.guidance == 1 and "guidance" in label)
        or (len(distill.student_timesteps) == 1 and label.endswith("continued rollouts"))
    )


if __name__ == "__main__":
    tyro.cli(main)
