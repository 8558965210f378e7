"""A run: a trainer played to its last step, in a folder from which it can be resumed at any time.

The loop is here, and what people see of it: progress with images/s and an ETA, `metrics.jsonl`, TensorBoard,
previews. An update whose gradient is not finite is skipped, counted and told; several in a row stop the run, with the
term named. A signal ends the step on all processes, saves, and stops. Hosts talk beside the devices, once a step, and
never wait for a device but where numbers are told.
"""

from __future__ import annotations

import faulthandler
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import torch
import torch.distributed as dist
from torch import Tensor

from dmd2.batch import Batch
from dmd2.errors import AGAIN, Diverged, Interrupted
from dmd2.io.staging import Draft
from dmd2.parallel.ranks import World
from dmd2.progress import Progress
from dmd2.training import checkpoint
from dmd2.training.checkpoint import Checkpoints
from dmd2.training.metrics_log import LoopSettings, MetricsLog, best_step, checkpoint_scores, due
from dmd2.training.optim import Trainable
from dmd2.training.trainer import Trainer

Score = Callable[[Callable[[str], None]], float]
"""(tells how far it is) -> the score of the student as it is, known to the main process."""
EXIT_STATUS = {signal.SIGINT: 130, signal.SIGTERM: AGAIN, signal.SIGHUP: AGAIN}
"""What a run that was stopped by a signal exits with."""


def train(
    name: str,
    trainer: Trainer,
    batches: Callable[[int], Iterator[Batch]],
    pace: LoopSettings,
    draft: Draft,
    preview: Callable[[int], None],
    world: World,
    score: Score | None = None,
) -> None:
    """Play from the newest checkpoint in the draft, or from the start, to the last step. With a `score`, every checkpoint is
    judged that was due, and the best one kept."""
    with world.interrupt_on_lost_rank():
        _train(name, trainer, batches, pace, draft, preview, world, score)


def _train(
    name: str,
    trainer: Trainer,
    batches: Callable[[int], Iterator[Batch]],
    pace: LoopSettings,
    draft: Draft,
    preview: Callable[[int], None],
    world: World,
    score: Score | None,
) -> None:
    folder = draft.path
    checkpoints = Checkpoints(folder / "checkpoints", world, pace.keep, draft)
    saved = checkpoint.saved_steps(checkpoints.root)
    first = saved[-1] if saved else 0
    if first:
        checkpoint.load(checkpoints.root, first, trainer.state(), world)

    def finish() -> None:
        if checkpoints.wait_for_save():
            faulthandler.cancel_dump_traceback_later()  # a bucket takes its time, and no device waits meanwhile
            if world.is_main:
                draft.save()
            world.barrier()
            alive()

    with (
        Progress(name, pace.steps, "steps", first, world.is_main) as progress,
        _signals() as asked,
        _watched(pace.hang_timeout_s) as alive,
    ):
        journal, words = MetricsLog(folder, progress, pace, first, world), Words(world)

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
            if world.is_main:  # the others would read what it is just writing
                checkpoints.best = best_step(folder)

        note_best()
        unjudged = int(world.is_main and first not in checkpoint_scores(folder))
        if score and first and _save_due(trainer, first - 1, pace) and world.broadcast_int(unjudged):
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
            if due(step, pace.preview_every, pace.steps):
                preview(step + 1)
            stop, writing = words.heard(max(asked, default=0), checkpoints.is_saving)
            if not writing:
                finish()
            last = step + 1 == pace.steps  # from which nothing goes on
            if (trainer.is_resumable_after(step) or last) and (stop or _save_due(trainer, step, pace)):
                journal.flush()
                finish()
                checkpoints.save_async(step + 1, trainer.state())
                if score or stop or last:
                    finish()
                if stop and not last:
                    raise Interrupted(
                        f"stopped after step {step + 1} of {pace.steps}, saved; the same command resumes",
                        stop,
                    )
                if score:
                    judge(score, step + 1)
            words.say(max(asked, default=0), checkpoints.is_saving)
            alive()
        journal.close()


class Words:
    """What the hosts tell each other after a step: whether one was asked to stop, and whether one is still writing. Nobody
    waits for the answers; they are heard a step later, by all alike."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.said: tuple[Tensor, dist.Work] | None = None

    def say(self, stop: int, writing: bool) -> None:
        if self.world.host_group:
            words = torch.tensor([stop, int(writing)])
            work = dist.all_reduce(words, dist.ReduceOp.MAX, self.world.host_group, async_op=True)
            assert work is not None
            self.said = words, work

    def together(self, stop: int) -> int:
        """The largest exit status that was asked for by now, once all have come here."""
        self.say(stop, writing=False)
        return self.heard(stop, writing=False)[0]

    def heard(self, stop: int, writing: bool) -> tuple[int, bool]:
        """The largest exit status that was asked for, and whether any is writing; of a single process, its own."""
        if not self.world.host_group:
            return stop, writing
        if not self.said:
            return 0, True
        words, work = self.said
        work.wait()
        return int(words[0]), bool(words[1])


def load_best(draft: Draft, student: Trainable, world: World) -> dict[str, float]:
    """Bring what is used of the student to the state it had at the best checkpoint; what to tell of it."""
    step = world.broadcast_int((best_step(draft.path) or 0) if world.is_main else 0)
    if world.local_rank == 0:
        draft.exchange.download_missing(f"checkpoints/{step:08d}")
    world.barrier()
    checkpoint.load(draft.path / "checkpoints", step, student.inference_state(), world)
    return {"best_step": step, "best_fid": checkpoint_scores(draft.path)[step]} if world.is_main else {}


def _save_due(trainer: Trainer, step: int, pace: LoopSettings) -> bool:
    """At the first step from which a run can be resumed, once a checkpoint is due."""
    since = step
    while since > 0 and not trainer.is_resumable_after(since - 1):
        since -= 1
    return any(due(s, pace.save_every, pace.steps) for s in range(since, step + 1))


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
