"""Measures the engine on a GPU: `make bench-gpu`, or `python -m tests.bench.gpu --only NAMES`.

Random weights at the real shapes, through the library's own functions. Each measurement is written at once to a JSON file of
its own, with card, date and commit; after `budget` seconds no other one starts, and a later call goes on where this one
ended. `--predict` writes beforehand, without a GPU, what the plan says of each training. `--tiny` runs the same measurements
on a CPU at sizes of seconds, which shows only that they run. docs/measured/README.md has the list, and what was measured.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor

from dmd2 import recipes
from dmd2.batch import Batch, Conditioning, CondPair
from dmd2.config import Config
from dmd2.io.local import write_text
from dmd2.models.family import ModelFamily, make_family
from dmd2.parallel.ranks import World
from dmd2.plan.hardware import BY_DEVICE_NAME, GB, TERA
from dmd2.plan.prediction import make_plan
from dmd2.plan.step_costs import TEXT, VAE
from dmd2.plan.traffic import MeshShape
from dmd2.plan.utilization import peak_flops_per_s
from dmd2.rng import Rng, draw_shared
from dmd2.sampler import generate
from dmd2.training import build
from dmd2.training.compile_cache import CompileCache
from dmd2.training.trainer import DMD2Trainer

OUT, EMOJI = Path("runs/bench/gpu"), Path("tests/emoji/pipeline")
CYCLES = 2
"""Timed updates of the student, each with its updates of the critic."""
Row = dict[str, Any]


@dataclass(frozen=True)
class Training:
    """A measured training."""

    recipe: str
    overrides: str
    profiled: bool = False
    """Also its kernels, and the places where the host waits for the device."""
    tf32: bool = False
    """Products of float32 matrices in TF32."""
    needs_gb: float = 0.0


EDM = "distill.batch=40 distill.dtype="  # of 280, as each of the reference's seven GPUs had
SHARED, SDXL = "sdxl-4step-shared", "distill.batch=4 engine.micro_batch=2"
EAGER, FULL, COMPILE = " engine.compile=off", " engine.activation_checkpointing=full", " engine.compile=on"
ONE, EIGHT_BITS = "distill.batch=4", " distill.student.moments=8bit distill.critic.moments=8bit"
TRAININGS = {
    "edm-float32": Training("edm-imagenet64", EDM + "float32", profiled=True),
    "edm-tf32": Training("edm-imagenet64", EDM + "float32", tf32=True),
    "edm-bfloat16": Training("edm-imagenet64", EDM + "bfloat16", profiled=True),
    "sdxl-shared": Training(SHARED, SDXL, profiled=True),
    "sdxl-shared-selective": Training(SHARED, SDXL + " engine.activation_checkpointing=selective"),
    "sdxl-shared-full": Training(SHARED, SDXL + FULL),
    "sdxl-shared-fewer-calls": Training(
        SHARED, SDXL + " distill.continue_rollouts=True distill.gan.reuse_denoising_pass=True"
    ),
    "sdxl-lora": Training("sdxl-4step-lora", SDXL + FULL, profiled=True, needs_gb=75),
    "sdxl-whole": Training("sdxl-4step", SDXL + FULL, profiled=True, needs_gb=120),
    "sdxl-whole-8bit": Training(
        "sdxl-4step", ONE + " engine.micro_batch=1" + EIGHT_BITS, profiled=True, needs_gb=70
    ),
    "sdxl-whole-8bit-offload": Training(
        "sdxl-4step", ONE + " engine.micro_batch=2 engine.offload_teacher=True" + EIGHT_BITS, needs_gb=75
    ),
    "edm-bfloat16-compile": Training("edm-imagenet64", EDM + "bfloat16" + COMPILE, profiled=True),
    "sdxl-shared-compile": Training(SHARED, SDXL + COMPILE, profiled=True),  # minutes of compiling: last
}
TINY_EDM = " ".join(
    f"family.network.{size}"
    for size in ("channels=16", "multipliers=1", "blocks=1", "resolution=8", "attention=8", "head_channels=16")
)  # fmt: skip
TINY = {"edm": f" distill.batch=2 {TINY_EDM}", "sdxl": " distill.batch=2 engine.micro_batch=1"}
SAMPLERS = {"sample-4step": "sdxl-4step", "sample-1step": "sdxl-1step"}
"""{name: recipe of the student whose sampling is timed}."""


def setting(case: Training, tiny: bool) -> tuple[Config, ModelFamily]:
    """Config and family, with a seed whose timed rollouts have the mean length."""
    kind = case.recipe.partition("-")[0]
    name = f"{case.recipe}-emoji" if tiny and kind == "sdxl" else case.recipe
    mode = "" if COMPILE in case.overrides else EAGER
    config = recipes.resolve(name, (case.overrides + mode + (TINY[kind] if tiny else "")).split())
    if tiny and kind == "sdxl":
        config = config.model_copy(
            update={"distill": config.distill.model_copy(update={"dtype": "bfloat16"})}
        )
    count, cycle = len(config.distill.student_timesteps), config.distill.critic_updates

    def excess(seed: int) -> float:
        stops = [draw_shared(seed, step, count) for step in range(cycle, cycle * (1 + CYCLES))]
        return abs(sum(stops) / len(stops) - (count - 1) / 2)

    seed = min(range(999), key=excess)
    family = make_family(config.family, EMOJI if tiny and kind == "sdxl" else None)
    return config.model_copy(update={"seed": seed}), family


def predicted(case: Training, tiny: bool, gpu: str) -> Row:
    """What the plan says: seconds of a step, GB, and TFLOP of the model without what is computed twice."""
    config, family = setting(case, tiny)
    plan = make_plan(config, family, gpu, MeshShape(1, 1, 1), compared=())
    plain = config.model_copy(
        update={"engine": config.engine.model_copy(update={"activation_checkpointing": "none"})}
    )
    model = (
        plan
        if plain == config
        else make_plan(plain, make_family(config.family), gpu, MeshShape(1, 1, 1), compared=())
    )
    low, high = plan.range_s
    return {
        "plan s/step": [low, plan.seconds_per_step, high],
        "plan GB": sum(size for part, size in plan.memory.items() if part not in (VAE, TEXT)) / GB,
        "TFLOP": sum(model.flops.values()) / TERA,
    }


def weights(family: ModelFamily, device: torch.device) -> dict[str, Tensor]:
    """Random in bfloat16, none of them all zeros, which are quicker than others."""
    torch.manual_seed(0)
    with device:
        network = family.network().bfloat16()
    for parameter in network.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    return network.state_dict()


def conditioning(family: ModelFamily, rows: int, device: torch.device) -> CondPair:
    def drawn(name: str, value: Tensor) -> Tensor:
        return torch.randn_like(value) if name in ("text", "pooled") else value

    placeholder = family.placeholder_condition(rows).to(device)
    cond = Conditioning(**{name: drawn(name, value) for name, value in placeholder.items()})
    return CondPair(cond, placeholder if "text" in cond else Conditioning())


def batch(config: Config, family: ModelFamily, step: int, device: torch.device) -> Batch:
    rows = config.distill.batch
    rng = Rng.at(config.seed, step, range(rows), device)
    return Batch(torch.randn(rows, *family.shape, device=device), *conditioning(family, rows, device), rng)


def clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.monotonic()


def train(case: Training, device: torch.device, tiny: bool, plan: Row) -> Row:
    """Seconds of a mean step, images/s, MFU, memory; the plan beside them."""
    config, family = setting(case, tiny)
    torch.set_float32_matmul_precision("high" if case.tf32 else "highest")
    trainer = build.trainer(config, family, weights(family, device), World(device))
    assert isinstance(trainer, DMD2Trainer)
    cycle = config.distill.critic_updates
    last = cycle * (1 + CYCLES)
    reals, start = [batch(config, family, step, device) for step in range(last + cycle)], clock(device)
    first = [trainer.step(reals[step], step) for step in range(cycle)]
    begun = clock(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    timed = [trainer.step(reals[step], step) for step in range(cycle, last)]
    seconds = (clock(device) - begun) / len(timed)
    row: Row = {
        "s/step": seconds,
        "images/s": config.distill.batch / seconds,
        "first cycle s": begun - start,
        "finite": all(bool(v.isfinite()) for one in (*first, *timed) for v in one.values()),
        "losses": {name: float(value) for name, value in first[0].items()},
    } | plan
    if device.type == "cuda":
        row["peak GB"] = torch.cuda.max_memory_allocated() / GB
        row["reserved GB"] = torch.cuda.max_memory_reserved() / GB
        peak = peak_flops_per_s(torch.cuda.get_device_name(), config.distill.dtype)
        row["MFU"] = plan["TFLOP"] * TERA / seconds / peak if plan and peak else None
    return row | (profile(trainer, reals[last:], last, device) if case.profiled else {})


def profile(trainer: DMD2Trainer, reals: list[Batch], step: int, device: torch.device) -> Row:
    """Where a step makes the host wait; the device's busy share and seconds by kernel in a student's turn and the step after."""
    gpu = device.type == "cuda"
    if gpu:
        torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trainer.step(reals[0], step)
    if gpu:
        torch.cuda.set_sync_debug_mode("default")
    kinds, start = torch.profiler.ProfilerActivity, clock(device)
    with torch.profiler.profile(activities=[kinds.CUDA if gpu else kinds.CPU]) as found:
        for index, real in enumerate(reals[:2]):
            trainer.step(real, step + index)
        wall = clock(device) - start
    events = [e for e in found.key_averages() if not gpu or "CUDA" in str(e.device_type)]
    spent = {e.key[:120]: (e.self_device_time_total if gpu else e.self_cpu_time_total) / 1e6 for e in events}
    waits = Counter(f"{w.filename}:{w.lineno}" for w in said if "synchroniz" in str(w.message))
    return {
        "host waits at": dict(waits),
        "busy": sum(spent.values()) / wall,
        "launched": sum(e.count for e in events),
        "seconds by kernel": dict(Counter(spent).most_common(80)),
    }


def starts(name: str, tiny: bool) -> Row:
    """Seconds of the first cycle of two processes with empty caches of their own; the second has the graphs that the first kept."""
    row: Row = {}
    with tempfile.TemporaryDirectory() as folder:
        for which in ("first", "second"):
            own = dict.fromkeys(("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"), f"{folder}/{which}")
            code = f"from tests.bench import gpu; gpu.start({name!r}, {folder + '/graphs'!r}, {tiny})"
            words = (sys.executable, "-c", code)
            ended = subprocess.run(words, env=os.environ | own, stdout=subprocess.PIPE, text=True, check=True)
            row[f"{which} start"] = json.loads(ended.stdout.splitlines()[-1])
        row["file MB"] = sum(path.stat().st_size for path in Path(folder, "graphs").iterdir()) / 1e6
    return row


def start(name: str, folder: str, tiny: bool) -> None:
    """Make the first cycle of a training, keep its graphs, and print how long it took."""
    from torch._dynamo.utils import counters

    device = torch.device("cuda" if torch.cuda.is_available() and not tiny else "cpu")
    config, family = setting(TRAININGS[name], tiny)
    engine = config.engine.model_copy(update={"compile_cache": folder})
    config = config.model_copy(update={"engine": engine})
    trainer = build.trainer(config, family, weights(family, device), World(device))
    reals = [batch(config, family, step, device) for step in range(config.distill.critic_updates)]
    begun, used = clock(device), time.process_time()
    for step, real in enumerate(reals):
        trainer.step(real, step)
    row: Row = {"first cycle s": clock(device) - begun, "of the process": time.process_time() - used}
    CompileCache(folder, World(device)).save()
    found, missed = (counters["inductor"][f"fxgraph_cache_{what}"] for what in ("hit", "miss"))
    print(json.dumps(row | {"graphs found": found, "compiled": missed}))


class HostRng(Rng):
    """Draws on the CPU, so that every device gets the same numbers."""

    place = torch.device("cpu")

    def normal(self, *shape: int) -> Tensor:
        return super().normal(*shape).to(self.place)

    def integers(self, low: int, high: int, like: Tensor) -> Tensor:
        return super().integers(low, high, like.cpu()).to(self.place)

    def __getitem__(self, rows: slice) -> Rng:
        return HostRng(self.seeds[rows])


def same_losses(device: torch.device) -> Row:
    """Losses and gradient norms of the first step of the emoji SDXL on the device, against those of the CPU in float32."""
    told: dict[str, dict[str, float]] = {}
    for name, place in {"cpu": torch.device("cpu"), "float32": device, "tf32": device, "bfloat16": device}.items():  # fmt: skip
        HostRng.place = place
        # Not by torch.backends.cuda.matmul.allow_tf32: once that was on, torch refuses to tell the precision, which `denoiser.tf32` reads.
        torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
        torch.backends.cudnn.allow_tf32 = name == "tf32"
        dtype = "bfloat16" if name == "bfloat16" else "float32"
        config = recipes.resolve("sdxl-4step-emoji", ["distill.batch=4", f"distill.dtype={dtype}"])
        family = make_family(config.family, EMOJI)
        pair = family.condition(["a red heart", "a cat", "", "a green tree"]).to(place)
        x = torch.randn(4, *family.shape, generator=torch.Generator().manual_seed(1)).to(place)
        trainer = build.trainer(config, family, family.weights(EMOJI), World(place))
        told[name] = {k: float(v) for k, v in trainer.step(Batch(x, *pair, HostRng(range(4))), 0).items()}
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = True  # both are torch's defaults
    off = {
        name: max(abs(one[key] - value) / max(abs(value), 1e-6) for key, value in told["cpu"].items())
        for name, one in told.items()
    }
    return {"off": off, "ok": off["float32"] < 1e-3 and off["tf32"] < 2e-2 and off["bfloat16"] < 0.3} | told


def environment(device: torch.device) -> Row:
    """Versions, and the two ceilings: a matrix product and a copy."""
    facts: Row = {
        "cc": shutil.which("cc") or shutil.which("gcc"),
        "cores": os.cpu_count(),
        "cudnn": torch.backends.cudnn.version(),
    }
    if device.type != "cuda":
        return facts
    a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    product, copy = (seconds_of(call, device) for call in (lambda: a @ b, lambda: b.copy_(a)))
    return facts | {"TFLOP/s": 2 * 8192**3 / product / TERA, "copy GB/s": 4 * a.numel() / copy / GB}


def seconds_of(call: Callable[[], object], device: torch.device, times: int = 5) -> float:
    """Mean seconds of a call after a first one."""
    call()
    start = clock(device)
    for _ in range(times):
        call()
    return (clock(device) - start) / times


@torch.no_grad()
def sampling(recipe: str, device: torch.device, tiny: bool) -> Row:
    """Seconds of one image by a student in bfloat16: its network calls, and the decoders by themselves."""
    import diffusers

    config, family = setting(Training(recipe, ""), tiny)
    with device:
        network = family.network().bfloat16().eval()
    cond, x = conditioning(family, 1, device).cond, torch.randn(1, *family.shape, device=device)
    timesteps = config.distill.student_timesteps
    draw = partial(generate, family.denoiser(network), x, cond, timesteps, torch.randn_like)
    row: Row = {"network s": seconds_of(draw, device)}
    widths = (32, 32) if tiny else (128, 256, 512, 512)
    full: Any = diffusers.AutoencoderKL
    small: Any = diffusers.AutoencoderTiny
    vaes: dict[str, Callable[[], Any]] = {
        "VAE s": lambda: full(
            block_out_channels=widths,
            layers_per_block=2,
            latent_channels=4,
            down_block_types=("DownEncoderBlock2D",) * len(widths),
            up_block_types=("UpDecoderBlock2D",) * len(widths),
        ),
        "tiny VAE s": small,
    }
    for name, make in vaes.items():
        with device:
            vae = make().eval()
        row[name] = seconds_of(partial(vae.decode, x), device, 3)
    return row


@torch.no_grad()
def evaluating(device: torch.device, tiny: bool) -> Row:
    """Images/s through the feature network that a package brings, with the resizing of images on the host."""
    from dmd2.evaluation.features import load_pretrained

    settings = recipes.get("sdxl-4step-emoji").evaluate
    extractor = load_pretrained(settings, "evaluate", device)
    side, count = (64, 8) if tiny else (1024, 64)
    images = torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8)
    seconds = seconds_of(partial(extractor.measure, images, [""] * count), device, 2)
    return {"images/s": count / seconds, "pixels": side, "features": settings.features}


def stamp(device: torch.device, tiny: bool) -> Row:
    git = subprocess.run(("git", "rev-parse", "HEAD"), capture_output=True, text=True, check=False)
    card = torch.cuda.get_device_name() if device.type == "cuda" else "CPU, no measurement of a GPU"
    when = datetime.now(UTC).isoformat(timespec="seconds")
    return {"card": card, "torch": torch.__version__, "date": when, "commit": git.stdout.strip(), "tiny": tiny}  # fmt: skip


def measurements(device: torch.device, tiny: bool, plans: dict[str, Row]) -> dict[str, Callable[[], Row]]:
    """Everything that is measured, in order, by name."""
    room = torch.cuda.mem_get_info()[1] / GB if device.type == "cuda" else float("inf")
    return {
        "environment": partial(environment, device),
        "same-losses": partial(same_losses, device),
        **{
            name: partial(train, case, device, tiny, plans.get(name, {}))
            for name, case in TRAININGS.items()
            if case.needs_gb < room
        },
        **{name: partial(sampling, recipe, device, tiny) for name, recipe in SAMPLERS.items()},
        "evaluation": partial(evaluating, device, tiny),
        "compile-starts": partial(starts, "edm-bfloat16-compile", tiny),
    }


def main(
    only: tuple[str, ...] = (),
    out: Path = OUT,
    tiny: bool = False,
    predict: str = "",
    budget: float = 480.0,
    again: bool = False,
) -> None:
    """Measure.

    Args:
        only: Names of measurements; all by default.
        out: Folder with one JSON file per measurement, and plan.json.
        tiny: On the CPU, at sizes of seconds.
        predict: A GPU of the plan; write what the plan says of the trainings on one, and measure nothing.
        budget: Seconds after which no other measurement starts.
        again: Also what has a file already.
    """
    device, start = (
        torch.device("cuda" if torch.cuda.is_available() and not tiny else "cpu"),
        time.monotonic(),
    )
    if device.type == "cpu" and not (tiny or predict):
        raise SystemExit("there is no GPU here; use --tiny to run the measurements on the CPU")
    known = out / "plan.json"
    plans: dict[str, Row] = json.loads(known.read_text()) if known.is_file() else {}
    if predict:
        for name in only or tuple(TRAININGS):
            plans[name] = {"gpu": predict} | predicted(TRAININGS[name], tiny, predict)
            write_text(known, json.dumps(plans, indent=1) + "\n")
        return
    here = BY_DEVICE_NAME.get(torch.cuda.get_device_name()) if device.type == "cuda" else None
    plans = {name: row for name, row in plans.items() if here is None or row["gpu"] == here}
    for name, measure in measurements(device, tiny, plans).items():
        path = out / f"{name}.json"
        if (only and name not in only) or (path.is_file() and not (again or only)):
            continue
        if time.monotonic() - start > budget:
            print(f"{name} and what follows it: the budget of {budget:.0f} s is spent; run this again")
            break
        try:
            row = measure()
        except Exception as error:  # the next one may succeed
            row = {"failed": f"{type(error).__name__}: {error}"[:500], "at": traceback.format_exc()[-2000:]}
        write_text(path, json.dumps(stamp(device, tiny) | row, indent=1, default=str) + "\n")
        short = {k: v for k, v in row.items() if not isinstance(v, dict) or k == "host waits at"}
        print(f"{name:24} {short} [{time.monotonic() - start:.0f} s]", flush=True)
        torch._dynamo.reset()
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    tyro.cli(main)
