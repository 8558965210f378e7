"""What may be asked of a page: every value, from a form, a link or a stranger's program, is checked here, in one sentence.

Sentences never repeat a whole value: it may have a million characters.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from dmd2.errors import Refused

MAX_SEED = 2**32 - 1
MAX_TEACHER_STEPS = 200
MAX_GUIDANCE = 30.0


class Limits(NamedTuple):
    """What the server allows."""

    images: int = 16
    prompt: int = 1000
    """Characters."""


class Offer(NamedTuple):
    """What one package can draw."""

    classes: int
    """Number of classes; 0 = it is conditioned on texts."""
    steps: int
    """Steps that the student was made for."""
    has_tiny_vae: bool = False
    has_teacher: bool = False
    teacher_steps: int = 30
    guidance: float = 1.0
    """Of the teacher, by default."""


@dataclass(frozen=True)
class Request:
    """One drawing. Equal requests to one package give equal images, bit for bit, on the same machine."""

    prompt: int | str
    seed: int
    images: int
    steps: int
    tiny_vae: bool
    compare: bool
    """Whether the teacher draws too, from the same noise."""
    teacher_steps: int
    guidance: float


def check_request(values: Mapping[str, Any], offer: Offer, limits: Limits) -> Request:
    """The request that these values are; what is missing, None or an empty text has its default, and so have 0 steps.

    Raises:
        Refused: A value is of another type, or beyond what the package or the server allows.
    """
    given = {name: value for name, value in values.items() if value is not None and value != ""}

    def whole(name: str, low: int, high: int, default: int) -> int:
        return _whole(name, given.get(name, default), low, high)

    request = Request(
        prompt=_prompt(given.get("prompt", ""), offer, limits),
        seed=whole("seed", 0, MAX_SEED, 0),
        images=whole("images", 1, limits.images, 1),
        steps=whole("steps", 0, offer.steps, 0) or offer.steps,
        tiny_vae=_flag("tiny_vae", given.get("tiny_vae", False)),
        compare=_flag("compare", given.get("compare", False)),
        teacher_steps=whole("teacher_steps", 0, MAX_TEACHER_STEPS, 0) or offer.teacher_steps,
        guidance=_number("guidance", given.get("guidance", offer.guidance), 1, MAX_GUIDANCE),
    )
    if request.tiny_vae and not offer.has_tiny_vae:
        raise Refused(
            "tiny_vae is on, and there is no tiny VAE for this package; start the server with --tiny-vae"
        )
    if request.compare and not offer.has_teacher:
        raise Refused(
            "compare is on, and the teacher of this package is not here; start the server with --teachers"
        )
    return request


def _prompt(value: Any, offer: Offer, limits: Limits) -> int | str:
    if offer.classes:
        return _whole("class", value, 0, offer.classes - 1)
    if not isinstance(value, str):
        raise Refused(f"prompt is {_brief(value)}; give a text")
    if len(value) > limits.prompt:
        raise Refused(f"prompt has {len(value):,} characters; give at most {limits.prompt:,}")
    if not value.isascii() and any(0xD800 <= ord(c) <= 0xDFFF for c in value):
        raise Refused("prompt has half of a character (a lone surrogate); give a text")
    return value.replace("\0", "").strip()


def _whole(name: str, value: Any, low: int, high: int) -> int:
    number = _number(name, value, low, high)
    if number != int(number):
        raise Refused(f"{name} is {_brief(value)}; give a whole number from {low} to {high}")
    return int(number)


def _number(name: str, value: Any, low: float, high: float) -> float:
    try:
        number = math.nan if isinstance(value, bool) or len(str(value)) > 40 else float(value)
    except (TypeError, ValueError, OverflowError):  # ValueError: also str() of thousands of digits
        number = math.nan
    if not low <= number <= high:
        raise Refused(f"{name} is {_brief(value)}; give a number from {low:g} to {high:.12g}")
    return number


def _flag(name: str, value: Any) -> bool:
    if value in (True, "1", "true"):
        return True
    if value in (False, "0", "false"):
        return False
    raise Refused(f"{name} is {_brief(value)}; give true or false")


def _brief(value: Any) -> str:
    """The value as Python writes it, on one line of at most some tens of characters."""
    try:
        return reprlib.repr(value)[:60]
    except ValueError:  # a number of more digits than Python writes
        return "a number of thousands of digits"
