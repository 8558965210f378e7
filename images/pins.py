"""Reading and writing `images.lock`: one line `name: reference` per image.

A reference ends in `@sha256:...` once a registry has returned the digest of that name. An image without a digest is not used as a
base unless another base is named explicitly.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from hashlib import sha256
from pathlib import Path

from dmd2.errors import Refused, brief, near_miss
from dmd2.io.local import write_text

ROOT = Path(__file__).parents[1]
PINS = ROOT / "images" / "images.lock"
BASE = "python"
"""The entry that the images are built on."""
DIGEST = r"@sha256:[0-9a-f]{64}"


def pins(path: Path = PINS) -> dict[str, str]:
    """{name: reference}, pinned or not."""
    lines = path.read_text().splitlines()
    return dict(_pair(line, path) for line in lines if line and not line.startswith("#"))


def _pair(line: str, path: Path) -> tuple[str, str]:
    name, _, reference = line.partition(": ")
    if not re.fullmatch(rf"[^@\s]+({DIGEST})?", reference):
        raise Refused(
            f"{path} has the line {line!r}; a line is `name: reference`, with @sha256: and 64 hexadecimal digits at the end "
            "if the digest is known"
        )
    return name, reference


def reference(name: str, path: Path = PINS) -> str:
    """The reference of an image, with or without a digest."""
    known = pins(path)
    if name not in known:
        raise Refused(f"{path} names no image {name!r}; {near_miss(name, known)}")
    return known[name]


def by_tag(path: Path = PINS) -> dict[str, str]:
    """{reference without digest: reference with digest} of the images that are pinned."""
    return {found.partition("@")[0]: found for found in pins(path).values() if "@" in found}


def pinned(name: str, path: Path = PINS) -> str:
    """The reference of an image; one without a digest is refused."""
    found = reference(name, path)
    if "@" not in found:
        raise Refused(
            f"{name!r} has no digest in {path}; run `make images-lock` where {found} can be reached, or name "
            "another base (BASE=<image>)"
        )
    return found


def pin(name: str, tagged: str, path: Path = PINS) -> str:
    """Write the digest that a registry returns now for `tagged`, and return the pinned reference."""
    reference(name, path)
    found = f"{tagged}@{digest(tagged)}"
    write_text(
        path, re.sub(rf"^{re.escape(name)}: .*$", f"{name}: {found}", path.read_text(), flags=re.MULTILINE)
    )
    return found


def digest(tagged: str) -> str:
    """The digest that a registry returns for a name; that of the index if the image has several platforms."""
    if not shutil.which("skopeo"):
        raise Refused(
            f"skopeo is needed to ask a registry for the digest of {tagged}; install it and run again"
        )
    asked = subprocess.run(["skopeo", "inspect", "--raw", f"docker://{tagged}"], capture_output=True)
    if asked.returncode:
        reason = brief(RuntimeError(asked.stderr.decode(errors="replace").partition("msg=")[2]))
        raise Refused(f"no registry says what {tagged} is: {reason}; no digest was written")
    return f"sha256:{sha256(asked.stdout).hexdigest()}"
