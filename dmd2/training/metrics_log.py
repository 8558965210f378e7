"""The numbers of a run as people see them: `metrics.jsonl`, TensorBoard and the note beside the progress bar."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate.tracking import TensorBoardTracker

from dmd2.errors import Diverged
from dmd2.io.local import write_text
from dmd2.parallel.ranks import World
from dmd2.progress import Progress
from dmd2.training import checkpoint
from dmd2.training.optim import SKIPPED, Metrics

METRICS = "metrics.jsonl"
SCORE = "checkpoint/fid"
"""The metric that tells how far the student's samples are from the training samples, at a checkpoint."""
IN_A_ROW = 5
"""Updates of one trainable that may be skipped in a row, because their gradient was not finite."""


@dataclass(frozen=True)
class LoopSettings:
    """How long a run is, and how often it does what, in steps."""

    steps: int
    batch: int
    log_every: int
    save_every: int
    preview_every: int
    keep: int
    hang_timeout_s: float


@dataclass
class MetricsLog:
    """Collects the numbers of each step, and tells them every `log_every` steps."""

    folder: Path
    progress: Progress
    pace: LoopSettings
    first: int
    world: World
    window: list[tuple[int, Metrics]] = field(default_factory=list)
    skips: dict[str, int] = field(default_factory=dict)
    """By trainable: updates that were skipped, one after the other, up to now."""

    def __post_init__(self) -> None:
        self.since = time.monotonic()
        if self.world.is_main:
            truncate_after(self.folder / METRICS, self.first)
            self.tracker = TensorBoardTracker("tensorboard", self.folder, purge_step=self.first)
            self.tracker.start()

    def record(self, step: int, metrics: Metrics) -> None:
        self.window.append((step, metrics))
        note = self.flush() if due(step, self.pace.log_every, self.pace.steps) else ""
        self.progress.advance(note=note)

    def flush(self) -> str:
        """Read the window from the device (the one place where a step waits for it), check it, write its means."""
        if not self.window:
            return ""
        steps = [step for step, _ in self.window]
        names = dict.fromkeys(n for _, m in self.window for n in m)
        values = {name: _column(self.window, name, self.world) for name in names}
        self._count_skips(steps, values)
        seconds = time.monotonic() - self.since
        rate = len(steps) * self.pace.batch / seconds
        means = {name: _told(name, list(column.values())) for name, column in values.items()}
        line = {"step": steps[-1] + 1, **means, "images_per_s": rate, "eta_s": self.progress.eta_s}
        self.window.clear()
        self.since = time.monotonic()
        if self.world.is_main:
            self._write(line)
        losses = " ".join(
            f"{n} {v:.4g}" for n, v in means.items() if not n.endswith(("_gradient", "grad_norm", SKIPPED))
        )
        return f"{losses} {rate:.0f} images/s"

    def score(self, step: int, value: float) -> None:
        """Write the score of a checkpoint. The time that it took is not that of steps."""
        if self.world.is_main:
            self._write({"step": step, SCORE: value})
        self.since = time.monotonic()

    def _write(self, line: dict[str, float]) -> None:
        told = {k: v if k == "step" else float(f"{v:.6g}") for k, v in line.items() if abs(v) < float("inf")}
        with (self.folder / METRICS).open("a") as stream:
            stream.write(json.dumps(told) + "\n")
        self.tracker.log(told, step=int(line["step"]))

    def _count_skips(self, steps: list[int], values: dict[str, dict[int, float]]) -> None:
        """Tell of updates that were skipped, with the first number that was none; too many in a row end the run."""
        for name in [name for name in values if name.endswith(f"/{SKIPPED}")]:
            trainable = name.split("/")[0]
            for step in (step for step in steps if step in values[name]):
                if not values[name][step]:
                    self.skips[trainable] = 0
                    continue
                self.skips[trainable] = self.skips.get(trainable, 0) + 1
                what = _first_odd(step, trainable, values)
                if self.skips[trainable] >= IN_A_ROW:
                    raise Diverged(
                        f"{what} at step {step}, and {IN_A_ROW} updates of the {trainable} were skipped in a row; what {self.folder} "
                        f"has saved is from before it: lower the learning rate of the {trainable}, remove that folder if it is "
                        "there, and start anew"
                    )
                if self.world.is_main:
                    print(f"{what} at step {step}; this update is skipped", file=sys.stderr, flush=True)

    def close(self) -> None:
        self.flush()
        if self.world.is_main:
            self.tracker.finish()


def read_metrics(folder: Path) -> list[dict[str, float]]:
    path = folder / METRICS
    return [json.loads(line) for line in _lines(path)] if path.is_file() else []


def checkpoint_scores(folder: Path) -> dict[int, float]:
    """Of the checkpoints that were judged, by their step."""
    return {int(line["step"]): line[SCORE] for line in read_metrics(folder) if SCORE in line}


def best_step(folder: Path) -> int | None:
    """The step of the checkpoint with the least score; none where none was judged."""
    there, judged = checkpoint.saved_steps(folder / "checkpoints"), checkpoint_scores(folder)
    return min((step for step in there if step in judged), key=judged.__getitem__, default=None)


def due(step: int, every: int, steps: int) -> bool:
    return (step + 1) % every == 0 or step + 1 == steps


def _column(window: list[tuple[int, Metrics]], name: str, world: World) -> dict[int, float]:
    """{step: value} of one metric, read from the device at once; the mean over the processes."""
    there = [(step, metrics[name]) for step, metrics in window if name in metrics]
    values = torch.stack([value.float() for _, value in there]).cpu()
    return dict(zip((step for step, _ in there), world.all_reduce_mean(values).tolist(), strict=True))


def _told(name: str, values: list[float]) -> float:
    """Of a window: how many were skipped; of anything else the mean of the numbers that are one."""
    if name.endswith(f"/{SKIPPED}"):
        return sum(values)
    finite = [value for value in values if abs(value) < float("inf")]
    return sum(finite) / len(finite) if finite else float("nan")


def _first_odd(step: int, trainable: str, values: dict[str, dict[int, float]]) -> str:
    """The loss or gradient of the trainable that was no number."""
    mine = {
        n: column[step] for n, column in values.items() if n.startswith(f"{trainable}/") and step in column
    }
    odd = [f"{name} became {value}" for name, value in mine.items() if not abs(value) < float("inf")]
    return odd[0] if odd else f"{trainable}/grad_norm became infinite"


def _lines(path: Path) -> list[str]:
    """Without one that was torn when its machine stopped."""
    return [line for line in path.read_text().splitlines() if line.endswith("}")]


def truncate_after(path: Path, first: int) -> None:
    """Drop the lines of steps that will be played again."""
    if path.is_file():
        kept = [line for line in _lines(path) if json.loads(line)["step"] <= first]
        write_text(path, "".join(line + "\n" for line in kept))
