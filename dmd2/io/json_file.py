"""JSON files from outside: read with bounds, or refused in a sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dmd2.errors import Refused

MAX_BYTES = 2**22
"""Configs of networks have some kilobytes."""


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        Refused: The file is missing, larger than `MAX_BYTES`, or holds something else.
    """
    try:
        with path.open("rb") as stream:
            text = stream.read(MAX_BYTES + 1)
        found = json.loads(text) if len(text) <= MAX_BYTES else None
    except FileNotFoundError:
        raise Refused(f"{path} is missing; get the folder again") from None
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise Refused(f"{path} is not JSON, or not a config of at most {MAX_BYTES:,} bytes; get it again")
    return found
