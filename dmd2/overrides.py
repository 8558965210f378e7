"""Fields of a Config that are replaced: as flags of the command line, read by tyro, or as `field=value`. Old names are understood."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stderr
from typing import Any, TypeVar, get_args

import tyro
from pydantic.fields import FieldInfo

from dmd2.config import RENAMED, Config, Section
from dmd2.errors import Refused

Parsed = TypeVar("Parsed")


def override_flags(overrides: Sequence[str]) -> list[str]:
    """Overrides as flags of the command line: ["ema=0.9,0.99"] -> ["--ema", "0.9", "0.99"]. Texts are taken as they are."""
    flags: list[str] = []
    for override in overrides:
        field, separator, value = override.partition("=")
        if not separator:
            raise Refused(
                f"override {override!r} must have the form field=value, for example distill.steps=100"
            )
        name = field.strip()
        values = [value] if _is_verbatim(name.replace("-", "_")) else value.replace(",", " ").split()
        flags += [f"--{name}", *values]
    return flags


SWITCHES = tyro.constructors.ConstructorRegistry()
"""How tyro reads flags that are on or off: `--encode.text` and `--encode.text True` are the same."""


@SWITCHES.primitive_rule
def _switch(
    field: tyro.constructors.PrimitiveTypeInfo,
) -> tyro.constructors.PrimitiveConstructorSpec[bool] | None:
    if field.type is not bool:
        return None
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=(0, 1),
        metavar="[True|False]",
        instance_from_str=lambda words: words != ["False"],
        is_instance=lambda value: isinstance(value, bool),
        str_from_instance=lambda value: [str(value)],
        choices=("True", "False"),
    )


def parse_flags(target: Callable[..., Parsed], flags: Sequence[str], program: str, **settings: Any) -> Parsed:
    """Read flags with tyro and call `target` with them. Flags with the old name of a field are understood.

    Raises:
        Refused: With tyro's message about a mistake as one sentence.
    """
    output = io.StringIO()
    try:
        with redirect_stderr(output):
            return tyro.cli(
                target,
                args=[_current_flag(flag) for flag in flags],
                prog=program,
                config=(tyro.conf.AvoidSubcommands, tyro.conf.FlagConversionOff, tyro.conf.SuppressFixed),
                registry=SWITCHES,
                **settings,
            )
    except SystemExit as end:
        if end.code:
            said = (
                _sentence(output.getvalue())
                .replace(f"Missing from {program}:", "missing:")
                .replace(" (required)", "")
            )
            raise Refused(f"{program}: {said}") from None
        raise
    except ValueError as error:  # what a Config says of its own fields: not every tyro prints that
        raise Refused(f"{program}: {error}") from None


def _current_flag(flag: str) -> str:
    """`--distill.student-levels=999` -> `--distill.student_timesteps=999`; anything else stays as it is."""
    name, equals, value = flag.partition("=")
    path = name.removeprefix("--").replace("-", "_")
    today = _current_name(path)
    return flag if not name.startswith("--") or today == path else f"--{today}{equals}{value}"


def _sentence(box: str) -> str:
    """The text of one of tyro's boxes without its frame, title and general advice."""
    words = re.split(r"Argument helptext:|For full helptext", box)[0].split("\n", 1)[1]
    return " ".join(re.sub(r"[│╭╮╰╯─]|-{3,}", " ", words).split())


def _current_name(path: str) -> str:
    """The name that a field has today: `distill.student_levels` -> `distill.student_timesteps`. Unknown words stay as they are."""
    return ".".join(word for word, _ in _follow(path))


def _is_verbatim(path: str) -> bool:
    """Whether the value of a field is taken as it stands: a text, such as `distill.regression.decoder`, True or False."""
    *_, (_, fields) = _follow(path)
    return any(field.annotation in (str, bool) for field in fields)


def _follow(path: str) -> Iterator[tuple[str, list[FieldInfo]]]:
    """(name today, fields that it may be) of each word in the path of a field, through unions and subclasses of sections."""
    sections: list[type[Section]] = [Config]
    for word in path.split("."):
        renamed = [RENAMED.get(section.__name__, {}) for section in sections]
        today = next((names[word] for names in renamed if word in names), word)
        fields = [s.model_fields[today] for s in sections if today in s.model_fields]
        yield today, fields
        sections = [section for field in fields for section in _sections_of(field.annotation)]


def _sections_of(annotation: Any) -> list[type[Section]]:
    """The sections that a field of this type may hold, in unions and subclasses too."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation, *annotation.__subclasses__()]
    return [section for part in get_args(annotation) for section in _sections_of(part)]
