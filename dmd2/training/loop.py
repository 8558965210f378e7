"""A run: a trainer played to its last step, in a folder from which it can be resumed at any time.

The loop is here, and what people see of it: progress with images/s and an ETA, `metrics.jsonl`, TensorBoard,
previews. An update whose gradient is not finite is skipped, counted and told; several in a row stop the run, with the
term named. A signal ends the step on all processes, saves, and stops. Hosts talk beside the devices, once a step, and
never wait for a device but where numbers are told.
"""

from __future__ import annotations

import faulthandler
import json
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist
from accelerate.tracking import TensorBoardTracker
from torch import Tensor

from dmd2.batch import Batch
from dmd2.errors import AGAIN, Diverged, Interrupted
from dmd2.io.artifact import Draft
from dmd2.io.storage import write
from dmd2.parallel import World
from dmd2.progress import Progress
from dmd2.training import checkpoint
from dmd2.training.checkpoint import Checkpoints
from dmd2.training.trainer import SKIPPED, Metrics, Trainable, Trainer

METRICS = "metrics.jsonl"
SCORE = "checkpoint/fid"
"""The metric that tells how far the student's samples are from the training samples, at a checkpoint."""
Score = Callable[[Callable[[str], None]], float]
"""(tells how far it is) -> the score of the student as it is, known to the main process."""
EXIT_STATUS = {signal.SIGINT: 130, signal.SIGTERM: AGAIN, signal.SIGHUP: AGAIN}
"""What a run that was stopped by a signal exits with."""
IN_A_ROW = 5
"""Updates of one trainable that may be skipped in a row, because their gradient was not finite."""


@dataclass(frozen=True)
class Pace:
    """How long a run is, and how often it does what, in steps."""

    steps: int
    batch: int
    log_every: int
    save_every: int
    preview_every: int
    keep: int
    hang_timeout_s: float


def play(
    name: str,
    trainer: Trainer,
    batches: Callable[[int], Iterator[Batch]],
    pace: Pace,
    draft: Draft,
    preview: Callable[[int], None],
    world: World,
    score: Score | None = None,
) -> None:
    """Play from the newest checkpoint in the draft, or from the start, to the last step. With a `score`, every checkpoint is
    judged that was due, and the best one kept."""
    with world.interruptible():
        _play(name, trainer, batches, pace, draft, preview, world, score)


def _play(
    name: str,
    trainer: Trainer,
    batches: Callable[[int], Iterator[Batch]],
    pace: Pace,
    draft: Draft,
    preview: Callable[[int], None],
    world: World,
    score: Score | None,
) -> None:
    folder = draft.path
    checkpoints = Checkpoints(folder / "checkpoints", world, pace.keep, draft)
    saved = checkpoint.steps(checkpoints.root)
    first = saved[-1] if saved else 0
    if first:
        checkpoint.load(checkpoints.root, first, trainer.state(), world)

    def finish() -> None:
        if checkpoints.finish():
            faulthandler.cancel_dump_traceback_later()  # a bucket takes its time, and no device waits meanwhile
            if world.main:
                draft.push()
            world.wait()
            alive()

    with (
        Progress(name, pace.steps, "steps", first, world.main) as progress,
        _signals() as asked,
        _watched(pace.hang_timeout_s) as alive,
    ):
        journal, words = Journal(folder, progress, pace, first, world), Words(world)

        def judge(score: Score, step: int) -> None:
            def say(note: str) -> None:
                alive()
                progress.advance(0, note)
                if stop := words.together(max(asked, default=0)):
                    raise Interrupted(
                        f"stopped while the checkpoint of step {step} was judged; the same command resumes",
                        stop,
                    )

            journal.score(step, score(say))
            note_best()
            alive()

        def note_best() -> None:
            if world.main:  # the others would read what it is just writing
                checkpoints.best = best(folder)

        note_best()
        unjudged = int(world.main and first not in scores(folder))
        if score and first and _save_due(trainer, first - 1, pace) and world.told(unjudged):
            judge(score, first)
        stream = batches(first)
        for step in range(first, pace.steps):
            asked_for = time.monotonic()
            real = next(stream)
            waited = torch.tensor(time.monotonic() - asked_for)
            try:
                journal.record(step, trainer.step(real, step) | {"loader/wait_s": waited})
            except Diverged:  # on all processes alike
                finish()
                raise
            if _due(step, pace.preview_every, pace.steps):
                preview(step + 1)
            stop, writing = words.heard(max(asked, default=0), not checkpoints.written)
            if not writing:
                finish()
            last = step + 1 == pace.steps  # from which nothing goes on
            if (trainer.complete(step) or last) and (stop or _save_due(trainer, step, pace)):
                journal.flush()
                finish()
                checkpoints.begin(step + 1, trainer.state())
                if score or stop or last:
                    finish()
                if stop and not last:
                    raise Interrupted(
                        f"stopped after step {step + 1} of {pace.steps}, saved; the same command resumes",
                        stop,
                    )
                if score:
                    judge(score, step + 1)
            words.say(max(asked, default=0), not checkpoints.written)
            alive()
        journal.close()


class Words:
    """What the hosts tell each other after a step: whether one was asked to stop, and whether one is still writing. Nobody
    waits for the answers; they are heard a step later, by all alike."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.said: tuple[Tensor, dist.Work] | None = None

    def say(self, stop: int, writing: bool) -> None:
        if self.world.control:
            words = torch.tensor([stop, int(writing)])
            work = dist.all_reduce(words, dist.ReduceOp.MAX, self.world.control, async_op=True)
            assert work is not None
            self.said = words, work

    def together(self, stop: int) -> int:
        """The largest exit status that was asked for by now, once all have come here."""
        self.say(stop, writing=False)
        return self.heard(stop, writing=False)[0]

    def heard(self, stop: int, writing: bool) -> tuple[int, bool]:
        """The largest exit status that was asked for, and whether any is writing; of a single process, its own."""
        if not self.world.control:
            return stop, writing
        if not self.said:
            return 0, True
        words, work = self.said
        work.wait()
        return int(words[0]), bool(words[1])


@dataclass
class Journal:
    """Collects the numbers of each step, and tells them every `log_every` steps."""

    folder: Path
    progress: Progress
    pace: Pace
    first: int
    world: World
    window: list[tuple[int, Metrics]] = field(default_factory=list)
    skips: dict[str, int] = field(default_factory=dict)
    """By trainable: updates that were skipped, one after the other, up to now."""

    def __post_init__(self) -> None:
        self.since = time.monotonic()
        if self.world.main:
            forget(self.folder / METRICS, self.first)
            self.tracker = TensorBoardTracker("tensorboard", self.folder, purge_step=self.first)
            self.tracker.start()

    def record(self, step: int, metrics: Metrics) -> None:
        self.window.append((step, metrics))
        note = self.flush() if _due(step, self.pace.log_every, self.pace.steps) else ""
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
        if self.world.main:
            self._write(line)
        losses = " ".join(
            f"{n} {v:.4g}" for n, v in means.items() if not n.endswith(("_gradient", "grad_norm", SKIPPED))
        )
        return f"{losses} {rate:.0f} images/s"

    def score(self, step: int, value: float) -> None:
        """Write the score of a checkpoint. The time that it took is not that of steps."""
        if self.world.main:
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
                if self.world.main:
                    print(f"{what} at step {step}; this update is skipped", file=sys.stderr, flush=True)

    def close(self) -> None:
        self.flush()
        if self.world.main:
            self.tracker.finish()


def read_metrics(folder: Path) -> list[dict[str, float]]:
    path = folder / METRICS
    return [json.loads(line) for line in _lines(path)] if path.is_file() else []


def scores(folder: Path) -> dict[int, float]:
    """Of the checkpoints that were judged, by their step."""
    return {int(line["step"]): line[SCORE] for line in read_metrics(folder) if SCORE in line}


def best(folder: Path) -> int | None:
    """The step of the checkpoint with the least score; none where none was judged."""
    there, judged = checkpoint.steps(folder / "checkpoints"), scores(folder)
    return min((step for step in there if step in judged), key=judged.__getitem__, default=None)


def use_best(draft: Draft, student: Trainable, world: World) -> dict[str, float]:
    """Bring what is used of the student to the state it had at the best checkpoint; what to tell of it."""
    step = world.told((best(draft.path) or 0) if world.main else 0)
    if world.local_rank == 0:
        draft.complete(f"checkpoints/{step:08d}")
    world.wait()
    checkpoint.load(draft.path / "checkpoints", step, student.used(), world)
    return {"best_step": step, "best_fid": scores(draft.path)[step]} if world.main else {}


def _due(step: int, every: int, steps: int) -> bool:
    return (step + 1) % every == 0 or step + 1 == steps


def _save_due(trainer: Trainer, step: int, pace: Pace) -> bool:
    """At the first step from which a run can be resumed, once a checkpoint is due."""
    since = step
    while since > 0 and not trainer.complete(since - 1):
        since -= 1
    return any(_due(s, pace.save_every, pace.steps) for s in range(since, step + 1))


def _column(window: list[tuple[int, Metrics]], name: str, world: World) -> dict[int, float]:
    """{step: value} of one metric, read from the device at once; the mean over the processes."""
    there = [(step, metrics[name]) for step, metrics in window if name in metrics]
    values = torch.stack([value.float() for _, value in there]).cpu()
    return dict(zip((step for step, _ in there), world.mean(values).tolist(), strict=True))


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


def forget(path: Path, first: int) -> None:
    """Drop the lines of steps that will be played again."""
    if path.is_file():
        kept = [line for line in _lines(path) if json.loads(line)["step"] <= first]
        write(path, "".join(line + "\n" for line in kept))


@contextmanager
def _watched(patience_s: float) -> Iterator[Callable[[], None]]:
    """While inside, a process that gives no sign of life for so long writes its stacks to stderr and ends."""

    def alive() -> None:
        faulthandler.dump_traceback_later(patience_s, exit=True, file=2)

    alive()
    try:
        yield alive
    finally:
        faulthandler.cancel_dump_traceback_later()


@contextmanager
def _signals() -> Iterator[list[int]]:
    """While inside, SIGINT and SIGTERM only note the exit status they ask for; a second SIGINT acts at once."""
    asked: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.append(EXIT_STATUS[signal.Signals(number)])

    before = {number: signal.signal(number, note) for number in EXIT_STATUS}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
