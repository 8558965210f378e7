"""The metrics of a run: `metrics.jsonl`, TensorBoard, and the note beside the progress bar.

A line of `metrics.jsonl` has the mean of each loss over the steps since the line before, gradient norms, learning rates,
and what EDM2, nanochat and torchtitan log too: samples per second, model FLOPs utilization (MFU), peak memory, and the
seconds of a mean step by phase (`time/data_s` is the wait for the data loader). Metrics stay on the device until a line
is due; this is the one place where training waits for it.
"""

from __future__ import annotations

import json
import logging
import math
import resource
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate.tracking import TensorBoardTracker

from dmd2.errors import Diverged
from dmd2.io.local import write_text
from dmd2.parallel.ranks import World
from dmd2.training import checkpoint
from dmd2.training.optim import SKIPPED, Metrics

logger = logging.getLogger(__name__)
METRICS = "metrics.jsonl"
SCORE = "checkpoint/fid"
"""Metric: Frechet distance between samples of the student and training samples, at a checkpoint."""
RENAMED = {
    "images_per_s": "samples_per_s",
    "loader/wait_s": "time/data_s",
    "student/dmd_gradient": "student/dmd_grad_l1",
    "student/gan_gradient": "student/gan_grad_l1",
}
"""{name of a metric in the logs of version 0.1.0: its name now}."""
MAX_CONSECUTIVE_SKIPS = 5
"""Number of skipped optimizer steps of one network, one after the other, that ends the run."""
NOT_IN_NOTE = ("_grad_l1", "/grad_norm", f"/{SKIPPED}", "/lr", "_s")
"""Endings of metrics that are not shown beside the progress bar."""


@dataclass(frozen=True)
class Throughput:
    """Converts steps per second to samples per second and model FLOPs utilization."""

    batch: int
    """Samples of a step, over all ranks."""
    flops_per_step: float = 0.0
    """FLOPs of the networks in a mean step of the whole batch, without recomputation; 0 if unknown."""
    peak_flops_per_s: float = 0.0
    """Peak of all devices of the run together; 0 if unknown."""

    def metrics(self, steps_per_s: float) -> dict[str, float]:
        rates = {"samples_per_s": steps_per_s * self.batch}
        if self.flops_per_step and self.peak_flops_per_s:
            rates["mfu"] = steps_per_s * self.flops_per_step / self.peak_flops_per_s
        return rates


@dataclass
class MetricsLog:
    """Collects the metrics of each step. All ranks must call `flush` at the same steps."""

    folder: Path
    first_step: int
    """Number of steps that were made before; later lines of an existing log are removed."""
    throughput: Throughput
    world: World
    window: list[tuple[int, Metrics]] = field(default_factory=list)
    """(step, its metrics) since the last line."""
    consecutive_skips: dict[str, int] = field(default_factory=dict)
    """Number of optimizer steps skipped up to now, one after the other, by trainable."""

    def __post_init__(self) -> None:
        self.window_start = time.monotonic()
        if self.world.is_main:
            truncate_after(self.folder / METRICS, self.first_step)
            self.tracker = TensorBoardTracker("tensorboard", self.folder, purge_step=self.first_step)
            self.tracker.start()

    def append(self, step: int, metrics: Metrics) -> None:
        self.window.append((step, metrics))

    def flush(self, phase_seconds: Mapping[str, float], eta_s: float) -> str:
        """Read the metrics of the window, check them, write a line, and return a note for the progress bar.

        Args:
            phase_seconds: Total seconds of the window by phase.
            eta_s: Seconds until the end of the run.

        Raises:
            Diverged: Too many optimizer steps were skipped in a row.
        """
        if not self.window:
            return ""
        steps = [step for step, _ in self.window]
        names = dict.fromkeys(name for _, metrics in self.window for name in metrics)
        values = {name: _values_by_step(self.window, name, self.world) for name in names}
        self._check_skips(steps, values)
        means = {name: _window_value(name, list(column.values())) for name, column in values.items()}
        rates = self.throughput.metrics(len(steps) / (time.monotonic() - self.window_start))
        phases = {f"time/{phase}_s": total / len(steps) for phase, total in phase_seconds.items()}
        memory_gb = peak_memory_gb(self.world.device)
        line = (
            {"step": steps[-1] + 1} | means | rates | phases | {"peak_memory_gb": memory_gb, "eta_s": eta_s}
        )
        self.window.clear()
        self.window_start = time.monotonic()
        if self.world.is_main:
            self._write(line)
        return _note(means, rates, memory_gb)

    def log_score(self, step: int, score: float) -> None:
        """Write the score of the checkpoint of a step. The time that scoring took does not count as training."""
        if self.world.is_main:
            self._write({"step": step, SCORE: score})
        self.window_start = time.monotonic()

    def close(self) -> None:
        if self.world.is_main:
            self.tracker.finish()

    def _write(self, line: Mapping[str, float]) -> None:
        """Values that are not finite are left out: JSON has no name for them."""
        finite = {k: v if k == "step" else float(f"{v:.6g}") for k, v in line.items() if math.isfinite(v)}
        with (self.folder / METRICS).open("a") as stream:
            stream.write(json.dumps(finite) + "\n")
        self.tracker.log(finite, step=int(line["step"]))

    def _check_skips(self, steps: list[int], values: Mapping[str, Mapping[int, float]]) -> None:
        """Report each skipped optimizer step with the metric that was not finite."""
        for name in [name for name in values if name.endswith(f"/{SKIPPED}")]:
            trainable = name.split("/")[0]
            for step in (step for step in steps if step in values[name]):
                if not values[name][step]:
                    self.consecutive_skips[trainable] = 0
                    continue
                skips = self.consecutive_skips[trainable] = self.consecutive_skips.get(trainable, 0) + 1
                reason = _first_not_finite(step, trainable, values)
                if skips >= MAX_CONSECUTIVE_SKIPS:
                    raise Diverged(
                        f"{reason} at step {step}, and {skips} updates of the {trainable} were skipped in a row; what {self.folder} "
                        f"has saved is from before it: lower the learning rate of the {trainable}, remove that folder if it is "
                        "there, and start anew"
                    )
                if self.world.is_main:
                    logger.warning(
                        "%s at step %d; this update is skipped", reason, step, extra={"step": step}
                    )


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """The lines of a run's log, oldest first, with today's names of metrics; an empty list if there is no log."""
    path = folder / METRICS
    lines = [json.loads(line) for line in _complete_lines(path)] if path.is_file() else []
    return [{RENAMED.get(name, name): value for name, value in line.items()} for line in lines]


def checkpoint_scores(folder: Path) -> dict[int, float]:
    """{step: score} of the checkpoints that were scored."""
    return {int(line["step"]): line[SCORE] for line in read_metrics(folder) if SCORE in line}


def best_step(folder: Path) -> int | None:
    """The step of the saved checkpoint with the lowest score; None if none was scored."""
    saved, scores = checkpoint.saved_steps(folder / "checkpoints"), checkpoint_scores(folder)
    return min((step for step in saved if step in scores), key=scores.__getitem__, default=None)


def truncate_after(path: Path, step: int) -> None:
    """Remove the lines of later steps from a log: a resumed run makes those steps again."""
    if path.is_file():
        kept = [line for line in _complete_lines(path) if json.loads(line)["step"] <= step]
        write_text(path, "".join(line + "\n" for line in kept))


def peak_memory_gb(device: torch.device) -> float:
    """Peak memory of this process in 1e9 bytes: allocated on an accelerator, otherwise resident on the host."""
    if device.type != "cpu":
        return torch.accelerator.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def _note(means: Mapping[str, float], rates: Mapping[str, float], memory_gb: float) -> str:
    losses = [f"{name} {mean:.4g}" for name, mean in means.items() if not name.endswith(NOT_IN_NOTE)]
    mfu = [f"{rates['mfu']:.1%} MFU"] if "mfu" in rates else []
    return " ".join([*losses, f"{rates['samples_per_s']:.0f} samples/s", *mfu, f"{memory_gb:.1f} GB"])


def _values_by_step(window: list[tuple[int, Metrics]], name: str, world: World) -> dict[int, float]:
    """{step: mean of the metric over the ranks}, for the steps that have it. Reads the device once."""
    found = [(step, metrics[name]) for step, metrics in window if name in metrics]
    values = torch.stack([value.float() for _, value in found]).cpu()
    return dict(zip((step for step, _ in found), world.all_reduce_mean(values).tolist(), strict=True))


def _window_value(name: str, values: list[float]) -> float:
    """Number of skipped steps; the last learning rate; otherwise the mean of the finite values."""
    if name.endswith(f"/{SKIPPED}"):
        return sum(values)
    if name.endswith("/lr"):
        return values[-1]
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan


def _first_not_finite(step: int, trainable: str, values: Mapping[str, Mapping[int, float]]) -> str:
    """Which loss or gradient of the trainable was not finite at the step."""
    for name, column in values.items():
        if name.startswith(f"{trainable}/") and step in column and not math.isfinite(column[step]):
            return f"{name} became {column[step]}"
    return f"{trainable}/grad_norm became infinite"


def _complete_lines(path: Path) -> list[str]:
    """The last line may be incomplete, if the machine stopped while it was written."""
    return [line for line in path.read_text().splitlines() if line.endswith("}")]
