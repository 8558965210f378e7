"""Drawing with packages: the images of a request, by the sampler of `dmd2 sample`, and the seconds of each part.

Knows nothing of pages. A student and its teacher start from the same noise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dmd2.config import EvaluateConfig
from dmd2.encoders.safety import SafetyChecker
from dmd2.encoders.text import count_cut_texts
from dmd2.encoders.vae import Vae
from dmd2.model import Model
from dmd2.serve.request import Limits, Offer, Request, check_request
from dmd2.training.phase_timer import PhaseTimer

Progress = Callable[[float], None]
"""Called with the share of the work that is done."""


@dataclass(frozen=True)
class Teacher:
    digest: str
    model: Model


@dataclass(frozen=True)
class Student:
    """A package that is served."""

    name: str
    digest: str
    model: Model
    evaluate: EvaluateConfig
    """How its teacher was sampled in the evaluation: the defaults of comparisons."""
    teacher: Teacher | None = None
    tiny_vae: Vae | None = None
    safety: SafetyChecker | None = None

    @property
    def offer(self) -> Offer:
        family = self.model.config
        return Offer(
            classes=family.classes if family.prompts == "classes" else 0,
            steps=len(self.model.timesteps),
            has_tiny_vae=self.tiny_vae is not None,
            has_teacher=self.teacher is not None,
            teacher_steps=self.evaluate.teacher_steps,
            guidance=max(1.0, self.evaluate.teacher_guidance),
        )


@dataclass(frozen=True)
class Images:
    pixels: Tensor
    """uint8 (N, C, H, W)."""
    seconds: dict[str, float]
    """Part (`text`, `steps`, `decode`, and `safety` with a safety checker) -> seconds."""
    withheld: int = 0
    """Images that the safety checker has replaced by black ones."""

    @property
    def per_second(self) -> float:
        return len(self.pixels) / max(sum(self.seconds.values()), 1e-9)


@dataclass(frozen=True)
class Drawing:
    student: Student
    request: Request
    images: Images
    of_teacher: Images | None
    note: str
    """What the user should know of it; empty = nothing."""


def draw(
    student: Student, values: dict[str, Any], limits: Limits, progress: Progress = lambda share: None
) -> Drawing:
    """Check the values of a request and draw it.

    Raises:
        Refused: A value is not allowed, or the network's output is not finite.
    """
    request = check_request(values, student.offer, limits)
    share = 0.5 if request.compare else 1.0
    with count_cut_texts() as cut:
        images = _draw_student(student, request, lambda done: progress(share * done))
        of_teacher = None
        if request.compare and student.teacher:
            of_teacher = _draw_teacher(
                student, student.teacher.model, request, lambda done: progress(0.5 + 0.5 * done)
            )
    withheld = images.withheld + (of_teacher.withheld if of_teacher else 0)
    notes = [
        f"The prompt is longer than the {cut.window} tokens that the text encoder sees." if cut.texts else "",
        f"The safety checker of the package has replaced {withheld} of the images by black ones."
        if withheld
        else "",
    ]
    note = " ".join(filter(None, notes))
    return Drawing(student, request, images, of_teacher, note)


def _draw_student(student: Student, request: Request, progress: Progress) -> Images:
    model = replace(student.model, timesteps=student.model.timesteps[: request.steps])
    vae = student.tiny_vae if request.tiny_vae else None

    def samples(timed: Model, prompts: Sequence[int | str]) -> Tensor:
        return timed.samples(prompts, request.seed)

    return _draw_and_time(model, request, samples, vae, student.safety, request.steps, progress)


def _draw_teacher(student: Student, teacher: Model, request: Request, progress: Progress) -> Images:
    """From the noise of the student of `request.steps` steps, decoded by the same VAE."""
    vae = student.tiny_vae if request.tiny_vae else None
    calls = teacher.family.teacher_calls(
        request.teacher_steps, 1.0
    )  # guidance doubles the batch, not the calls

    def samples(timed: Model, prompts: Sequence[int | str]) -> Tensor:
        steps, guidance = request.teacher_steps, request.guidance
        return timed.teacher_samples(prompts, request.seed, steps, guidance, noises=request.steps)

    return _draw_and_time(teacher, request, samples, vae, student.safety, calls, progress)


def _draw_and_time(
    model: Model,
    request: Request,
    samples: Callable[[Model, Sequence[int | str]], Tensor],
    vae: Vae | None,
    safety: SafetyChecker | None,
    calls: int,
    progress: Progress,
) -> Images:
    timer = PhaseTimer(next(model.network.parameters()).device)
    calls *= -(-request.images // model.usual_batch)
    with _report_calls(model, lambda done: progress(min(1.0, done / calls))):
        x = samples(replace(model, timer=timer), [request.prompt] * request.images)
    timer.start("decode")
    pixels = vae.decode(x) if vae else model.family.decode(x)
    withheld = 0
    if safety:
        timer.start("safety")
        pixels, withheld = safety.withhold(pixels)
    timer.stop()
    return Images(pixels, timer.read(), withheld)


@contextmanager
def _report_calls(model: Model, report: Callable[[int], None]) -> Iterator[None]:
    """Report the number of network calls as they begin."""
    calls = 0

    def count(module: torch.nn.Module, args: Any) -> None:
        nonlocal calls
        report(calls)
        calls += 1

    hook = model.family.blocks(model.network)[0].register_forward_pre_hook(count)
    try:
        yield
    finally:
        hook.remove()
