"""A base for the images on a Debian machine, and the wheels they are built of: each is made once and then kept.

The base is a stand-in for the pinned one, which only its registry has. It takes part in tests only.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from platformdirs import user_cache_path

from images.__main__ import part

NAME = "localhost/dmd2-tests-base:bookworm"
TOOLS = ("buildah", "podman", "debootstrap")
PYTHON = "python3.11,python3.11-venv,python3-distutils,ca-certificates"
CERTIFICATES = Path("etc/ssl/certs/ca-certificates.crt")


def missing() -> str:
    """Why images cannot be built here; empty if they can."""
    absent = [tool for tool in TOOLS if not shutil.which(tool)]
    if absent:
        return f"{' and '.join(absent)} not installed; as root: apt-get install {' '.join(TOOLS)}"
    return "" if os.geteuid() == 0 else "debootstrap and builds without namespaces need root"


def base() -> str:
    """The reference of Debian with Python 3.11 as `python`, or of DMD2_TEST_BASE."""
    if given := os.environ.get("DMD2_TEST_BASE"):
        return given
    if subprocess.run(["podman", "image", "exists", NAME]).returncode:
        with tempfile.TemporaryDirectory() as folder:
            _make(Path(folder))
    return NAME


def _make(folder: Path) -> None:
    root, archive = folder / "root", folder / "root.tar"
    subprocess.run(["debootstrap", "--variant=minbase", f"--include={PYTHON}", "bookworm", root], check=True)
    (root / "usr/local/bin/python").symlink_to("/usr/bin/python3.11")
    shutil.copy(Path("/") / CERTIFICATES, root / CERTIFICATES)  # what this machine trusts
    subprocess.run(["tar", "-C", root, "-cf", archive, "."], check=True)
    subprocess.run(["podman", "import", archive, NAME], check=True)


def wheels(image: str) -> Path:
    """A folder with everything that the lock of an image names, or DMD2_TEST_WHEELS."""
    if given := os.environ.get("DMD2_TEST_WHEELS"):
        return Path(given)
    locks = [part(name) for name in ("build", image)]
    digest = hashlib.sha256(b"".join(lock.read_bytes() for lock in locks)).hexdigest()[:16]
    folder = user_cache_path("dmd2-tests") / f"{image}-{digest}"
    if not folder.exists():
        partial = folder.with_name(f".{folder.name}.partial")
        for lock in locks:
            words = ["pip", "download", "--quiet", "--no-deps", "--require-hashes"]
            subprocess.run([sys.executable, "-m", *words, "-r", lock, "-d", partial], check=True)
        partial.rename(folder)
    return folder
