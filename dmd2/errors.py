"""Errors a user can act on, and the exit status of each.

Such an error has one sentence: what is wrong, which value, which rule, what to do. `one_sentence()` turns it into a line
on stderr and an exit status instead of a stack trace; the command line and the pipeline's components both use it.
"""

from __future__ import annotations

import errno
import logging
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from difflib import get_close_matches
from typing import NoReturn

from dmd2 import log

logger = logging.getLogger(__name__)

EXIT_RESTARTABLE = 75
"""Exit status of a process that was told to stop, and has saved its work."""
EXIT_RANK_LOST = 79
"""Exit status of a process that lost another one: the cause is that of the other, and this status says nothing about it."""


class Refused(Exception):
    """A wrong input: an unknown name, a folder of another kind, a damaged file."""

    status = 64


class Diverged(Exception):
    """Training produced infinite or NaN losses or gradients."""

    status = 76


class Interrupted(Exception):
    """Stopped by a signal, after saving. The same command resumes."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


ADVICE = dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "free space and run again")
ADVICE |= dict.fromkeys(
    (errno.EACCES, errno.EPERM, errno.EROFS), "allow access to it, or choose another place"
)
ADVICE |= dict.fromkeys((errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG), "check the path")
ADVICE |= {errno.EIO: "run again, it goes on from what was saved"}
"""errno -> what the user can do."""


@contextmanager
def one_sentence() -> Iterator[None]:
    """Configure logging, and turn errors a user can act on into one line on stderr and an exit status. In the JSON log
    format the line is a record of severity ERROR, with the field `exit_status`."""
    try:
        log.configure()
        yield
    except (Refused, Diverged, Interrupted) as error:
        _exit(str(error), error.status)
    except KeyboardInterrupt:
        _exit("interrupted; the same command starts again", 130)
    except BrokenPipeError:  # the reader of stdout has ended, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None
    except OSError as error:
        if error.errno not in ADVICE:
            raise
        where = f" at {error.filename}" if error.filename else ""
        what = (error.strerror or "input or output failed").lower()
        _exit(f"{what}{where}; what was complete before is untouched: {ADVICE[error.errno]}", 74)


def brief(error: Exception) -> str:
    """The message of another library's error, on one line of at most 200 characters."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def near_miss(name: str, known: Iterable[str]) -> str:
    """`did you mean 'x'? ` if a known name is close, and the list of known names."""
    known = list(known)
    close = get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}known: {', '.join(sorted(known))}"


def _exit(message: str, status: int) -> NoReturn:
    if log.is_json():
        logger.error(message, extra={"exit_status": status})
    else:
        with suppress(BrokenPipeError):
            line = log.printable(message).replace("\n", "\\n")
            print(f"dmd2: {line}", file=sys.stderr, flush=True)
    raise SystemExit(status)
