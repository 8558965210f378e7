"""The training loop of a run: data, step, metrics, previews, checkpoints; from the newest checkpoint to the last step.

Signals, hanging ranks and divergence end it in an orderly way. A step whose gradient is not finite is skipped and counted;
several in a row end the run. SIGTERM and SIGINT let all ranks finish the step, save and stop. Ranks exchange such flags
over the hosts once a step, and wait for a device only where metrics are read.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

import torch
import torch.distributed as dist
from torch import Tensor

from dmd2.batch import Batch
from dmd2.errors import EXIT_RESTARTABLE, Diverged, Interrupted
from dmd2.io.staging import Draft
from dmd2.parallel.ranks import World
from dmd2.progress import Progress
from dmd2.training import checkpoint
from dmd2.training.checkpoint import Checkpoints
from dmd2.training.hang_watch import hang_watch
from dmd2.training.metrics_log import MetricsLog, Throughput, best_step, checkpoint_scores
from dmd2.training.optim import Trainable
from dmd2.training.phase_timer import PhaseTimer
from dmd2.training.trainer import Trainer

ScoreFunction = Callable[[Callable[[str], None]], float]
"""(called with a note as scoring proceeds) -> score of the student as it is now; lower is better. Only the main process's
return value counts."""
EXIT_STATUS = {signal.SIGINT: 130, signal.SIGTERM: EXIT_RESTARTABLE, signal.SIGHUP: EXIT_RESTARTABLE}
"""Exit status of a run that was stopped by a signal."""


@dataclass(frozen=True)
class LoopSettings:
    """Length of a run, and intervals in steps."""

    steps: int
    throughput: Throughput
    log_every: int
    save_every: int
    preview_every: int
    keep_checkpoints: int
    hang_timeout_s: float
    """Seconds without a finished step after which a process writes its stacks and ends."""
    compile_timeout_s: float = 0.0
    """The same for a step in which a process compiles, if it is more."""

    def is_due(self, step: int, every: int) -> bool:
        """Whether something with this interval happens after the step (counted from 0). It also does after the last."""
        return (step + 1) % every == 0 or step + 1 == self.steps


def train(
    name: str,
    trainer: Trainer,
    batches: Callable[[int], Iterator[Batch]],
    settings: LoopSettings,
    draft: Draft,
    preview: Callable[[int], None],
    world: World,
    score: ScoreFunction | None = None,
    on_log: Callable[[int, float], None] = lambda step, eta_s: None,
    on_progress: Callable[[int], None] = lambda done: None,
) -> None:
    """Train from the newest checkpoint in the draft, or from the start, to the last step.

    Args:
        name: Shown beside the progress bar.
        batches: (first step) -> this rank's part of each batch from that step on.
        preview: Called with the number of steps made, every `preview_every` steps.
        score: Scores each checkpoint that `save_every` asked for; the best one is kept.
        on_log: Called with the number of steps made and the seconds left, after each line of metrics.
        on_progress: Called with the number of steps made, after each step, compiled graph, saved checkpoint and scored batch.

    Raises:
        Interrupted: A signal stopped the run, after saving; or another rank was lost.
        Diverged: Too many optimizer steps in a row had a gradient that was not finite.
    """
    trainer.timer = PhaseTimer(world.device)
    with world.interrupt_on_lost_rank():
        checkpoints = Checkpoints(draft.path / "checkpoints", world, settings.keep_checkpoints, draft)
        first = max(checkpoint.saved_steps(checkpoints.root), default=0)
        if first:
            checkpoint.load(checkpoints.root, first, trainer.state(), world)
        compiled: list[float] = []

        def on_compiled(seconds: float) -> None:
            compiled.append(seconds)
            progress.leave_out(seconds)
            progress.advance(0, f"compiled graphs: {len(compiled)} in {sum(compiled):.0f} s")
            on_progress(progress.done)

        def report_progress() -> None:
            watch.reset()
            on_progress(progress.done)

        with (
            Progress(name, settings.steps, "steps", first, world.is_main) as progress,
            stop_signals() as requested,
            hang_watch(settings.hang_timeout_s, settings.compile_timeout_s, world, on_compiled) as watch,
        ):
            log = MetricsLog(draft.path, first, settings.throughput, world)
            flags = HostFlags(world, requested)
            run = _Run(
                trainer,
                settings,
                draft,
                world,
                checkpoints,
                log,
                flags,
                progress,
                report_progress,
                watch.pause,
                score,
                on_log,
            )
            run.make_steps(first, batches, preview)


@dataclass
class _Run:
    """What the steps of a run share."""

    trainer: Trainer
    settings: LoopSettings
    draft: Draft
    world: World
    checkpoints: Checkpoints
    log: MetricsLog
    flags: HostFlags
    progress: Progress
    report_progress: Callable[[], None]
    pause_watch: Callable[[], None]
    score: ScoreFunction | None
    on_log: Callable[[int, float], None]

    def make_steps(
        self, first: int, batches: Callable[[int], Iterator[Batch]], preview: Callable[[int], None]
    ) -> None:
        self._update_best()
        if self.score and self._has_no_score(first):
            self._score_checkpoint(self.score, first)
        stream = batches(first)
        for step in range(first, self.settings.steps):
            try:
                self._make_step(stream, step)
            except Diverged:  # on all ranks
                self._publish_checkpoint()
                raise
            if self.settings.is_due(step, self.settings.preview_every):
                preview(step + 1)
            stop, saving = self.flags.receive(self.checkpoints.is_saving)
            if not saving:
                self._publish_checkpoint()
            if self._saves_after(step, stop):
                self._save(step, stop)
            self.flags.send(self.checkpoints.is_saving)
            self.report_progress()
        self.log.close()

    def _make_step(self, stream: Iterator[Batch], step: int) -> None:
        start = time.perf_counter()
        real = next(stream)
        data_s = torch.tensor(time.perf_counter() - start)
        metrics = self.trainer.step(real, step)
        self.trainer.timer.stop()
        self.log.append(step, metrics | {"time/data_s": data_s})
        logs = self.settings.is_due(step, self.settings.log_every)
        self.progress.advance(note=self._flush_log() if logs else "")
        if logs:
            self.on_log(step + 1, self.progress.eta_s)

    def _flush_log(self) -> str:
        return self.log.flush(self.trainer.timer.read(), self.progress.eta_s)

    def _saves_after(self, step: int, stop: int) -> bool:
        """Save at the first step from which the run can be resumed once a save is due, and after the last step."""
        resumable = self.trainer.is_resumable_after(step) or step + 1 == self.settings.steps
        return resumable and (stop > 0 or self._save_is_due(step))

    def _save_is_due(self, step: int) -> bool:
        """Whether a save became due after the step, or after one before it from which the run could not be resumed."""
        since = step
        while since > 0 and not self.trainer.is_resumable_after(since - 1):
            since -= 1
        return any(self.settings.is_due(s, self.settings.save_every) for s in range(since, step + 1))

    def _save(self, step: int, stop: int) -> None:
        """Save in the background; wait for it if the run stops here or the checkpoint is to be scored."""
        last = step + 1 == self.settings.steps
        self._flush_log()
        self._publish_checkpoint()
        self.checkpoints.save_async(step + 1, self.trainer.state())
        if self.score or stop or last:
            self._publish_checkpoint()
        if stop and not last:
            raise Interrupted(
                f"stopped after step {step + 1} of {self.settings.steps}, saved; the same command resumes",
                stop,
            )
        if self.score:
            self._score_checkpoint(self.score, step + 1)

    def _publish_checkpoint(self) -> None:
        """Wait for the checkpoint that is being saved, if any, and upload it."""
        if self.checkpoints.wait_for_save():
            self.pause_watch()  # an upload may take longer
            if self.world.is_main:
                self.draft.save()
            self.world.barrier()
            self.report_progress()

    def _has_no_score(self, step: int) -> bool:
        """Whether the run was stopped between saving the checkpoint of this step, which was due, and scoring it."""
        if not step or not self._save_is_due(step - 1):
            return False
        missing = self.world.is_main and step not in checkpoint_scores(self.draft.path)
        return bool(self.world.broadcast_int(int(missing)))

    def _score_checkpoint(self, score: ScoreFunction, step: int) -> None:
        def report(note: str) -> None:
            self.report_progress()
            self.progress.advance(0, note)
            if stop := self.flags.exchange_stop():
                raise Interrupted(
                    f"stopped while the checkpoint of step {step} was scored; the same command resumes", stop
                )

        self.log.log_score(step, score(report))
        self._update_best()
        self.report_progress()

    def _update_best(self) -> None:
        """Protect the best checkpoint from deletion, which is the main process's work."""
        if self.world.is_main:
            self.checkpoints.best = best_step(self.draft.path)


class HostFlags:
    """Two flags that ranks exchange after each step: the exit status of a stop signal, and whether a rank is still saving.

    `send` starts an all-reduce (max) over the hosts, `receive` ends it one step later: no rank waits, and all ranks act on
    the same values at the same step.
    """

    def __init__(self, world: World, requested: list[int]) -> None:
        self.world = world
        self.requested = requested
        """Exit statuses of the stop signals that this process has received."""
        self._pending: tuple[Tensor, dist.Work] | None = None

    def send(self, saving: bool) -> None:
        if self.world.host_group:
            flags = torch.tensor([self._own_stop, int(saving)])
            work = dist.all_reduce(flags, dist.ReduceOp.MAX, self.world.host_group, async_op=True)
            assert work is not None
            self._pending = flags, work

    def receive(self, saving: bool) -> tuple[int, bool]:
        """(exit status of a stop signal or 0, whether any rank was saving) as sent last; of a single process, as of now."""
        if not self.world.host_group:
            return self._own_stop, saving
        if not self._pending:
            return 0, True
        flags, work = self._pending
        work.wait()
        return int(flags[0]), bool(flags[1])

    def exchange_stop(self) -> int:
        """The exit status that any rank was asked to stop with up to now, or 0. Waits for all ranks."""
        self.send(saving=False)
        return self.receive(saving=False)[0]

    @property
    def _own_stop(self) -> int:
        return max(self.requested, default=0)


def load_best(draft: Draft, student: Trainable, world: World) -> dict[str, float]:
    """Load the student's inference weights from the best checkpoint.

    Returns:
        `best_step` and `best_fid` on the main process; an empty dict on other ranks.
    """
    step = world.broadcast_int((best_step(draft.path) or 0) if world.is_main else 0)
    if world.local_rank == 0:
        draft.exchange.download_missing(f"checkpoints/{step:08d}")
    world.barrier()
    checkpoint.load(draft.path / "checkpoints", step, student.inference_state(), world)
    return {"best_step": step, "best_fid": checkpoint_scores(draft.path)[step]} if world.is_main else {}


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Inside the block, SIGINT, SIGTERM and SIGHUP only append their exit status to the yielded list; a second SIGINT raises
    KeyboardInterrupt."""
    requested: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        if requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        requested.append(EXIT_STATUS[signal.Signals(number)])

    previous = {number: signal.signal(number, handle) for number in EXIT_STATUS}
    try:
        yield requested
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
