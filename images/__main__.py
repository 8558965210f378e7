"""`python -m images build | lock | push | sbom | scan`: build, push and sign the images, and say what is in them.

Builders are buildah, podman or docker, whichever is installed.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Literal

import tyro

from dmd2.errors import Refused, brief, one_sentence
from dmd2.io.local import write_text
from images import pins
from images.audit import sbom, scan
from images.parts import PARTS
from images.pins import ROOT

Image = Literal["dmd2", "dmd2-launch"]
IMAGES: tuple[Image, ...] = ("dmd2", "dmd2-launch")
BUILDERS = ("buildah", "podman", "docker")
PORT = 47311
"""Port of the page of wheels. It is fixed, because builders repeat layers that were built from another address."""


def build(
    images: tuple[Image, ...] = IMAGES,
    base: str = "",
    index: str = "",
    wheels: Path | None = None,
    builder: str = "",
) -> None:
    """Build images, each under its name and the version of the project.

    Args:
        images: Images to build.
        base: Another base than the one pinned in `images.lock`; it must have Python 3.11 as `python`.
        index: A mirror of the package index, without credentials in it.
        wheels: A folder with all the wheels, instead of an index: for a build without a network.
        builder: `buildah`, `podman` or `docker`; empty for the first of them that is installed.
    """
    builder = find_builder(builder)
    base = base or pins.pinned(pins.BASE)
    if wheels and not any(wheels.glob("*.whl")):
        raise Refused(f"{wheels} has no *.whl; `pip download -r images/dmd2.lock -d {wheels}` fills it")
    with serve_wheels(wheels) as page:
        arguments = {
            "BASE": base,
            "PIP_INDEX_URL": index,
            "PIP_FIND_LINKS": page,
            "PIP_NO_INDEX": "1" if page else "",
        }
        for image in images:
            command = [builder, "build", "--file", "images/Dockerfile", "--tag", f"{image}:{version()}"]
            command += ["--layers"] if builder == "buildah" else []  # the others keep them unasked
            command += ["--network", "host"] if page else []
            command += flags("--build-arg", arguments | {"IMAGE": image})
            command += flags("--label", labels(image, base))
            run([*command, "."], f"{image} was not built on {base}")


def flags(flag: str, values: dict[str, str]) -> list[str]:
    return [word for name, value in values.items() if value for word in (flag, f"{name}={value}")]


def labels(image: str, base: str) -> dict[str, str]:
    """The labels that differ from build to build; the others are in the Dockerfile."""
    values = {"title": image, "version": version(), "revision": revision(), "base.name": base}
    return {f"org.opencontainers.image.{name}": value for name, value in values.items()}


def lock(base: bool = True) -> None:
    """Write the packages of each image as `uv.lock` pins them, and the digests of the base and of other people's images in
    the manifests into `images.lock`.

    Args:
        base: Ask the registries for those digests.
    """
    for name in PARTS:
        write_text(part(name), exported(name))
    if base:
        pin_others()


def pin_others(path: Path = pins.PINS) -> None:
    """Pin every image that is not ours; those that no registry told are refused together, after the others."""
    failed = []
    for name, reference in pins.pins(path).items():
        if name not in IMAGES:
            try:
                print(pins.pin(name, reference.partition("@")[0], path))
            except Refused as refusal:
                failed.append(str(refusal))
    if failed:
        raise Refused("; ".join(failed))


def part(name: str) -> Path:
    return ROOT / "images" / f"{name}.lock"


def exported(name: str) -> str:
    """The requirements of a part, with versions and hashes. It needs no network."""
    command = [sys.executable, "-m", "uv", "export", "--quiet", "--frozen", "--offline"]
    command += ["--no-emit-project", "--no-header", *PARTS[name]]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise Refused(f"uv exported no {name}.lock: {brief(RuntimeError(done.stderr))}")
    return done.stdout


def push(
    registry: str,
    images: tuple[Image, ...] = IMAGES,
    builder: str = "",
    key: str = "",
    unsigned: bool = False,
) -> None:
    """Push images that are built, sign them, and write the digests that the registry has for them into `images.lock`.

    Args:
        registry: Where to: host and path, without the image's name.
        images: Images to push.
        builder: The builder they were built with; empty for the first that is installed.
        key: Key to sign with, as cosign takes it: a file, or a key of a KMS; empty for an identity of the environment.
        unsigned: Push without a signature.
    """
    builder = find_builder(builder)
    if not registry.strip("/"):
        raise Refused("the registry to push to is empty; give REGISTRY=<host>/<path>")
    if not unsigned and not shutil.which("cosign"):
        raise Refused(
            "cosign is needed to sign what is pushed; install it, or push without a signature (UNSIGNED=1)"
        )
    for image in images:
        there = f"{registry.rstrip('/')}/{image}:{version()}"
        run([builder, "tag", f"{image}:{version()}", there], f"{image}:{version()} is not there to be pushed")
        run([builder, "push", there], f"{there} was not pushed")
        print(found := pins.pin(image, there))
        if not unsigned:
            sign(found, key)


def sign(reference: str, key: str) -> None:
    """Sign an image by its digest: a tag may be another image by then."""
    tagged, _, digest = reference.partition("@")
    by_digest = f"{tagged.rpartition(':')[0]}@{digest}"
    words = ["--key", key] if key else []
    run(["cosign", "sign", "--yes", *words, by_digest], f"{by_digest} was pushed and is not signed")


def find_builder(builder: str) -> str:
    """The builder that was asked for, or the first one that is installed."""
    asked = [builder] if builder else BUILDERS
    found = [name for name in asked if shutil.which(name)]
    if not found:
        raise Refused(f"no builder of images is installed; install {' or '.join(asked)}, or give --builder")
    return found[0]


def run(command: list[str], failed: str) -> None:
    """Run a command, which prints its own error message; a failure is refused with `failed`."""
    status = subprocess.run(command, cwd=ROOT).returncode
    if status:
        raise Refused(f"{failed}: `{command[0]} {command[1]}` ended with status {status} and says above why")


@contextmanager
def serve_wheels(wheels: Path | None) -> Iterator[str]:
    """Serve the wheels on this machine, and yield the address for pip's --find-links; an empty string without wheels."""
    if wheels is None:
        yield ""
        return
    try:
        server = ThreadingHTTPServer(("127.0.0.1", PORT), partial(QuietHandler, directory=str(wheels)))
    except OSError as error:
        raise Refused(f"port {PORT} is needed to serve {wheels} to the builder ({error.strerror})") from None
    with server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{PORT}/"
        server.shutdown()


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        """Log nothing: pip prints the packages that it downloads."""


def version() -> str:
    return str(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"])


def revision() -> str:
    """The commit that the images are built from, `-dirty` if files were changed since; `unknown` outside a checkout."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    asked = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return asked.stdout.strip() or "unknown"


if __name__ == "__main__":
    with one_sentence():
        tyro.extras.subcommand_cli_from_dict(
            {"build": build, "lock": lock, "push": push, "sbom": sbom, "scan": scan}, prog="python -m images"
        )
