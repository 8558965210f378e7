"""What an evaluation costs: `python -m tests.bench.evaluation [--parts throughput frechet memory ranks]`; about an hour on two cores.

- `throughput`: processor time of FID between sampled images and a reference, end to end, against clean-fid with the same network
  (EfficientNet-Lite0 on 299 pixels). clean-fid reads files, so the images are written first, as its users do.
- `frechet`: processor time of the Frechet distance of 2,048 features against clean-fid's `frechet_distance`.
- `memory`: growth of the peak memory over 10,000 images of 1,024 pixels from a stand-in sampler, with a stand-in network.
- `ranks`: wall clock and processor time of a digit evaluation in one process and in two, one thread each.

Compared times are interleaved, and each ratio is that of the medians. Figures are added to runs/bench/evaluation.json.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cleanfid.fid
import numpy as np
import torch
import tyro
from cleanfid.resize import build_resizer
from PIL import Image
from torch import Tensor

from dmd2 import recipes, stages
from dmd2.config import EvaluateConfig
from dmd2.data.loader import Shards
from dmd2.data.shard_table import TRAIN
from dmd2.evaluation import efficientnet, metrics
from dmd2.evaluation.blocks import MeasuredBlocks
from dmd2.evaluation.evaluator import Evaluator, score_states
from dmd2.evaluation.features import FeatureExtractor
from dmd2.evaluation.frechet import Gaussian, frechet_distance
from dmd2.io.artifact import read_manifest
from dmd2.io.local import LocalStore, write_text
from dmd2.models.family import Prompt
from tests.emoji import source as emoji_source

OUT = Path("runs/bench/evaluation.json")
SIZE, BLOCK, DIMENSIONS = 1024, 32, 2048
CPU = torch.device("cpu")
Times = dict[str, list[float]]


def main(
    parts: tuple[str, ...] = ("throughput", "frechet", "memory", "ranks"),
    shards: str = "",
    images: int = 5000,
    large: int = 10_000,
    digits: int = 2000,
    rounds: int = 2,
) -> None:
    """Measure the parts.

    Args:
        parts: throughput, frechet, memory, ranks.
        shards: Shards of the emoji; made if there are none.
        images: Images of `throughput`, repeated if there are fewer emoji.
        large: Images of `memory`.
        digits: Images of `ranks`.
        rounds: Times that each number of processes of `ranks` is measured.
    """
    measured: dict[str, Callable[[], dict[str, Any]]] = {
        "throughput": lambda: throughput(shards or emoji_shards(), images),
        "frechet": frechet,
        "memory": lambda: memory_growth(large),
        "ranks": lambda: ranks(digits, rounds),
    }
    if len(parts) > 1:  # a process each: the peak of one part would hide that of the next
        given = ["--shards", shards, "--images", str(images), "--large", str(large), "--digits", str(digits)]
        given += ["--rounds", str(rounds)]
        for part in parts:
            subprocess.run(
                [sys.executable, "-m", "tests.bench.evaluation", "--parts", part, *given], check=True
            )
        return
    for part in parts:
        figures = json.loads(OUT.read_text()) if OUT.is_file() else {}
        found = measured[part]()
        print(json.dumps(found, indent=1), flush=True)
        write_text(OUT, json.dumps(figures | found, indent=1) + "\n")


def emoji_shards() -> str:
    out = Path("runs/bench/emoji-shards")
    source = emoji_source.source(Path("runs/emoji/source"))
    stages.shard(recipes.get("sdxl-4step-emoji"), str(source), str(out))
    return str(out)


def interleaved(rounds: int, **work: Callable[[], float]) -> tuple[Times, dict[str, float]]:
    """(processor seconds of each piece of work in each round, what it returned)."""
    times: Times = {name: [] for name in work}
    found: dict[str, float] = {}
    for _ in range(rounds):
        for name, call in work.items():
            start = time.process_time()
            found[name] = call()
            times[name].append(time.process_time() - start)
    return times, found


def throughput(shards: str, count: int) -> dict[str, Any]:
    train = Shards(shards, TRAIN)
    sampled, real = (
        train.select(np.arange(count) * 7 % len(train)).image,
        train.select(np.arange(len(train))[:count]).image,
    )
    network = efficientnet.load(efficientnet.weights())
    extractor = FeatureExtractor(network, build_resizer("clean"), {}, CPU, "")
    evaluator = Evaluator.load(metrics.select(["fid"]), EvaluateConfig(), lambda: extractor, CPU)
    reference = evaluator.accumulate([(real, [0] * len(real))])
    their_features = _quietly(lambda: cleanfid_features(real, network))
    mean, covariance = their_features.mean(0), np.cov(their_features, rowvar=False)

    def ours() -> float:
        return score_states(evaluator.accumulate([(sampled, [0] * count)]), reference)["fid"].value

    def theirs() -> float:
        found = _quietly(lambda: cleanfid_features(sampled, network))
        return float(cleanfid_distance(found.mean(0), np.cov(found, rowvar=False), mean, covariance))

    times, found = interleaved(2, ours=ours, theirs=theirs)
    return {
        "fid_throughput_ratio": ratio(times),
        "fid_throughput": {"images": count, "seconds": times, "fid": found},
        "fid_relative_difference": abs(found["ours"] / found["theirs"] - 1),
    }


def cleanfid_features(images: Tensor, network: torch.nn.Module) -> np.ndarray:
    """Features by clean-fid, from files."""
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        for index, image in enumerate(images):
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(Path(folder) / f"{index:06d}.png")
        found: np.ndarray = cleanfid.fid.get_folder_features(
            folder, network, num_workers=0, batch_size=64, device=CPU, mode="clean", verbose=False
        )
    return found


def cleanfid_distance(*moments: np.ndarray) -> float:
    """clean-fid's distance. It calls `sqrtm` with an argument that scipy 1.18 has removed."""
    original = cleanfid.fid.linalg.sqrtm

    def sqrtm(matrix: np.ndarray, disp: bool = True) -> Any:
        root = original(matrix)
        return root if disp else (root, None)

    cleanfid.fid.linalg.sqrtm = sqrtm
    try:
        return float(cleanfid.fid.frechet_distance(*moments))
    finally:
        cleanfid.fid.linalg.sqrtm = original


def frechet() -> dict[str, Any]:
    draw = torch.Generator().manual_seed(0)
    scale = torch.logspace(0, -3, DIMENSIONS).double()

    def gaussian(shift: float) -> Gaussian:
        rows = torch.randn(3 * DIMENSIONS, DIMENSIONS, generator=draw).double() * scale + shift
        return Gaussian(rows.mean(0), rows.T.cov())

    def clean_copy(of: Gaussian) -> Gaussian:
        return Gaussian(of.mean, of.covariance)

    one, reference = gaussian(0.1), gaussian(0.0)
    moments = [each.numpy() for g in (one, reference) for each in (g.mean, g.covariance)]
    times, found = interleaved(
        3,
        ours=lambda: frechet_distance(clean_copy(one), clean_copy(reference)),
        ours_again=lambda: frechet_distance(clean_copy(one), reference),
        theirs=lambda: cleanfid_distance(*moments),
    )
    return {
        "frechet_ratio": ratio(times),
        "frechet_ratio_of_another_set": ratio(times, "ours_again"),
        "frechet": {"dimensions": DIMENSIONS, "seconds": times, "distance": found},
    }


class StandIn(torch.nn.Module):
    """(B, 3, 299, 299) -> (B, 2048)."""

    def forward(self, images: Tensor) -> Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(images, 27).flatten(1)[:, :DIMENSIONS]


def memory_growth(count: int) -> dict[str, Any]:
    """The same path as in `evaluate`: sampled, measured, written, folded."""
    extractor = FeatureExtractor(StandIn(), build_resizer("clean"), {}, CPU, "")
    evaluator = Evaluator.load(metrics.select(["fid"]), EvaluateConfig(), lambda: extractor, CPU)
    prompts: list[Prompt] = [0] * count
    with tempfile.TemporaryDirectory() as folder:
        blocks = MeasuredBlocks(LocalStore(Path(folder)), "blocks", prompts, BLOCK)
        warm, start = 0.0, time.monotonic()
        for rows in blocks.rows():
            draw = np.random.default_rng(rows.start)
            images = torch.from_numpy(draw.integers(0, 256, (len(rows), 3, SIZE, SIZE), dtype=np.uint8))
            blocks.write(rows, evaluator.measure(images, prompts[: len(rows)]))
            if rows.start == BLOCK:
                states = evaluator.fold([(blocks.read(rows), prompts[: len(rows)])])
                warm = peak_gb()
        states = evaluator.fold(blocks.read_all())
        assert states["fid"].score(states["fid"]).value < 1e-6
    seconds = time.monotonic() - start
    return {
        "memory_growth_gb_10k_1024": round(peak_gb() - warm, 3),
        "memory": {
            "images": count,
            "pixels": SIZE,
            "peak_gb": round(peak_gb(), 3),
            "seconds": round(seconds),
        },
    }


def peak_gb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def ranks(count: int, rounds: int) -> dict[str, Any]:
    root = Path("runs/bench/evaluation-ranks")
    settings = [
        "teach.steps=100", "distill.steps=20", "evaluate.features=efficientnet", f"evaluate.images={count}", "evaluate.batch=64",
    ]  # fmt: skip
    config = recipes.resolve("edm-digits", settings)
    data, teacher, run = (str(root / name) for name in ("shards", "teacher", "run"))
    stages.shard(config, "digits", data)
    stages.teach(config, data, teacher)
    stages.distill(config, data, teacher, run)
    flags = [word for each in settings for word in ("--" + each.split("=")[0], each.split("=")[1])]
    seconds: Times = {"one": [], "two": []}
    processor: Times = {"one": [], "two": []}
    scores = {}
    for number, (name, processes) in enumerate([("one", 1), ("two", 2)] * rounds):
        out = root / f"evaluation-{number}"
        words = ["dmd2", "evaluate", "edm-digits", "--data", data, "--teacher", teacher, "--run", run]
        launch = ["torch.distributed.run", f"--nproc-per-node={processes}", "-m", "--"]
        command = [sys.executable, "-m", *launch, *words, "--out", str(out), *flags]
        start, used = time.monotonic(), processor_s_of_children()
        subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True)
        seconds[name].append(time.monotonic() - start)
        processor[name].append(processor_s_of_children() - used)
        scores[name] = read_manifest(out, "evaluation").facts["scores"]
    assert scores["one"] == scores["two"]
    speedup = statistics.median(seconds["one"]) / statistics.median(seconds["two"])
    more = statistics.median(processor["two"]) / statistics.median(processor["one"])
    measured = {"images": count, "seconds": seconds, "processor_seconds": processor}
    return {
        "two_rank_speedup": round(speedup, 2),
        "two_rank_processor_time": round(more, 3),
        "ranks": measured,
    }


def processor_s_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def ratio(times: Times, ours: str = "ours") -> float:
    return round(statistics.median(times["theirs"]) / statistics.median(times[ours]), 2)


def _quietly(call: Callable[[], np.ndarray]) -> np.ndarray:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return call()


if __name__ == "__main__":
    tyro.cli(main)
