"""Log records on stderr: lines for people, by rich on a terminal, or one JSON object per record for a log collector.

Modules log through `logging.getLogger(__name__)` and print nothing to stderr themselves. The command line and the
components call `configure` once; a program that uses dmd2 as a library sets up `logging` as it likes. Only the main
process (RANK 0) logs INFO, unless DMD2_LOG_LEVEL says otherwise. Importing this module imports no rich.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import sys
from contextlib import suppress
from datetime import UTC, datetime
from functools import cache
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

FORMAT, LEVEL = "DMD2_LOG_FORMAT", "DMD2_LOG_LEVEL"
"""Environment variables: `text` or `json`; the lowest level that is logged, as DEBUG."""
PACKAGES = ("dmd2", "components", "pipelines")
SEVERITIES = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
"""Levels of logging, and severities of Cloud Logging, by the same names."""
UNPRINTABLE = re.compile(
    "[\\x00-\\x08\\x0b-\\x1f\\x7f-\\x9f\\u061c\\u200e\\u200f\\u2028-\\u202e\\u2066-\\u2069\\ud800-\\udfff]"
)
"""Characters that would steer a terminal, hide or reverse text, or that no file in UTF-8 can hold."""
SECRETS = re.compile(
    r"(?<=://)[^/\s?#]+(?=@)|(?<=[?&])(?P<name>(?i:(?:[a-z_-]*[_-])?(?:token|signature|password|secret|key|sig))=)[^&\s#]*"
)
"""User and password in an address, and parameters of signed addresses."""
STANDARD_FIELDS = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
"""Fields that every record has. All other ones were given as `extra`."""


def without_secrets(value: Any) -> Any:
    """The value with the secrets of addresses removed from all of its texts. JSON escapes control characters itself."""
    if isinstance(value, str):
        return _remove_secrets(value)
    if isinstance(value, dict):
        return {key: without_secrets(each) for key, each in value.items()}
    return [without_secrets(each) for each in value] if isinstance(value, list | tuple) else value


def printable(text: str) -> str:
    """The text with control characters as escapes (a tab and a new line stay), and without the secrets of addresses: names of
    files and fields come from anywhere."""
    return _remove_secrets(UNPRINTABLE.sub(lambda found: ascii(found[0])[1:-1], text))


class PrintableFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


class TextHandler(logging.Handler):
    """Lines for people: by rich on a terminal, plain elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(PrintableFormatter())

    def emit(self, record: logging.LogRecord) -> None:
        if sys.stderr.isatty():
            _rich_handler().emit(record)
            return
        prefix = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        _write_line(prefix + self.format(record))


class JsonHandler(logging.Handler):
    """One JSON object per record and line, in the fields of Cloud Logging's structured logs."""

    def emit(self, record: logging.LogRecord) -> None:
        _write_line(json.dumps(without_secrets(event(record)), default=str))


HANDLERS: dict[str, type[TextHandler | JsonHandler]] = {"text": TextHandler, "json": JsonHandler}


def configure(format: str = "") -> None:
    """Send the log records of this process, and of processes that it starts, to stderr. May be called again.

    Args:
        format: `text` or `json`; empty for what DMD2_LOG_FORMAT says, or else `text`.

    Raises:
        Refused: Unknown format or level.
    """
    format = _choose(format or os.environ.get(FORMAT) or "text", FORMAT, tuple(HANDLERS))
    main = os.environ.get("RANK", "0") == "0"
    level = _choose(os.environ.get(LEVEL) or ("INFO" if main else "WARNING"), LEVEL, SEVERITIES)
    os.environ[FORMAT] = format
    root = logging.getLogger()
    for earlier in _handlers():
        root.removeHandler(earlier)
    for other in (h for h in root.handlers if type(h) is logging.StreamHandler):
        other.addFilter(_is_of_others)  # as of KFP's executor, which would print each record a second time
    handler = HANDLERS[format]()
    handler.addFilter(_is_ours_or_a_warning)  # the root's own level may be INFO, as under KFP
    root.addHandler(handler)
    for package in PACKAGES:
        logging.getLogger(package).setLevel(level)
    # google-auth hides all records of a "google" logger whose level is not set.
    logging.getLogger("google").setLevel("WARNING")
    logging.getLogger("google").propagate = True
    logging.captureWarnings(format == "json")
    if format == "json":
        sys.excepthook = _log_uncaught
    elif sys.excepthook is _log_uncaught:
        sys.excepthook = sys.__excepthook__


def _is_of_others(record: logging.LogRecord) -> bool:
    return record.name.partition(".")[0] not in PACKAGES


def _is_ours_or_a_warning(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.WARNING or not _is_of_others(record)


def is_json() -> bool:
    return any(isinstance(handler, JsonHandler) for handler in _handlers())


def event(record: logging.LogRecord) -> dict[str, Any]:
    """The JSON object of a record: severity, message, time (RFC 3339, UTC), logger, the fields given as `extra`."""
    time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
    fields = {
        "severity": SEVERITIES[min(max(record.levelno // 10, 1), len(SEVERITIES)) - 1],
        "message": record.getMessage(),
        "time": time.replace("+00:00", "Z"),
        "logger": record.name,
    }
    if record.exc_info:
        fields["stack_trace"] = logging.Formatter().formatException(record.exc_info)
    extra = {name: value for name, value in vars(record).items() if name not in STANDARD_FIELDS}
    return fields | {name: _finite(value) for name, value in extra.items()}


@cache
def console() -> Console:
    """The terminal behind stderr, which log lines and progress bars share."""
    from rich.console import Console

    return Console(stderr=True)


@cache
def _rich_handler() -> logging.Handler:
    from rich.logging import RichHandler

    handler = RichHandler(console=console(), show_time=False, show_path=False)
    handler.setFormatter(PrintableFormatter("%(message)s"))
    return handler


def _remove_secrets(text: str) -> str:
    return SECRETS.sub(lambda found: f"{found['name'] or ''}***", text)


def _handlers() -> list[TextHandler | JsonHandler]:
    return [h for h in logging.getLogger().handlers if isinstance(h, TextHandler | JsonHandler)]


def _choose(value: str, variable: str, known: tuple[str, ...]) -> str:
    from dmd2.errors import Refused, near_miss  # which imports this module

    if value not in known:
        raise Refused(f"{variable} is {value!r}; {near_miss(value, known)}")
    return value


def _finite(value: Any) -> Any:
    """JSON has no numbers for infinity and NaN."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _write_line(line: str) -> None:
    """One write per line, so that lines of several processes do not mix."""
    with suppress(BrokenPipeError):  # the reader has ended; the work goes on
        sys.stderr.write(line + "\n")
        sys.stderr.flush()


def _log_uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    logging.getLogger("dmd2").critical("%s: %s", kind.__name__, error, exc_info=(kind, error, trace))
