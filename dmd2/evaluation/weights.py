"""Downloads of published weights, accepted only with the expected digest."""

from __future__ import annotations

import shutil
import urllib.request
from pathlib import Path

from dmd2.config import WeightsConfig
from dmd2.errors import Refused
from dmd2.io.local import sha256
from dmd2.io.storage import fetch_file


def fetch_weights(settings: WeightsConfig, target: Path, option: str) -> None:
    """Copy the weights from their address to `target`; refuse a file whose sha256 does not begin with `settings.sha256`.

    `option` is the command-line option of the settings, for errors."""
    try:
        if settings.uri.startswith("https://"):
            with urllib.request.urlopen(settings.uri, timeout=60) as source, target.open("wb") as copy:
                shutil.copyfileobj(source, copy)
        else:
            shutil.copyfile(fetch_file(settings.uri), target)
    except OSError as error:
        raise Refused(
            f"the weights at {settings.uri} cannot be read ({error}); set {option}.uri to a copy of them"
        ) from None
    if not (found := sha256(target)).startswith(settings.sha256):
        raise Refused(
            f"{settings.uri} has sha256 {found}, not {settings.sha256} as {option.removeprefix('--')}.sha256 demands; it was not loaded"
        )
