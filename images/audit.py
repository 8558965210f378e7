"""What is in the images, as CycloneDX, and what is known against it: both by uv, from `uv.lock`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from dmd2.errors import Refused, brief
from dmd2.io.local import write_text
from images.parts import PARTS
from images.pins import ROOT

OSV = "https://api.osv.dev/"
"""The public database of vulnerabilities that uv asks."""
EVERYTHING = {"environment": ("--all-extras", "--all-groups")}


def sbom(out: Path = Path("runs/sbom")) -> None:
    """Write the packages of each image and of the whole environment, with versions and hashes, as `<name>.cdx.json`.

    Args:
        out: Folder for the files.
    """
    for name, options in {**PARTS, **EVERYTHING}.items():
        command = uv("export", "--quiet", "--offline", "--preview-features", "sbom-export", "--format", "cyclonedx1.5", *options)  # fmt: skip
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise Refused(f"uv wrote no {name}.cdx.json: {brief(RuntimeError(done.stderr))}")
        write_text(out / f"{name}.cdx.json", done.stdout)
        print(out / f"{name}.cdx.json")


def scan(service: str = OSV) -> None:
    """Look up every package of `uv.lock` in a database of known vulnerabilities; fails if it finds one, or cannot look.

    Args:
        service: Address of the database, or of a mirror with the same API.
    """
    status = subprocess.run(
        uv("audit", "--preview-features", "audit", "--service-url", service), cwd=ROOT
    ).returncode
    if status == 1:
        raise Refused(
            "packages of uv.lock have known vulnerabilities, listed above; `make lock` takes newer ones"
        )
    if status:
        raise Refused(
            f"nothing was looked up: {service} did not answer as a database should, see above; run this where it can be "
            "reached, or name a mirror (SERVICE=)"
        )  # fmt: skip
    print(f"uv.lock has no package with a vulnerability known to {service}")


def uv(verb: str, *options: str) -> list[str]:
    return [sys.executable, "-m", "uv", verb, "--frozen", *options]
