"""The images, built and run for real: without a network, without rights, on a root that can not be written.

Slow tests. They need root and the tools of `base.py`, which makes a base and fetches the wheels once. `dmd2` takes many minutes
and 17 GB of disk, so it is built only if DMD2_TEST_DMD2 says `build` (`make test-images`), and else run if it is there.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from images.__main__ import labels, version
from images.pins import ROOT
from tests.images import base

pytestmark = pytest.mark.slow
Podman = Callable[..., subprocess.CompletedProcess[str]]
RUNTIME = ["--runtime=runc"] if shutil.which("runc") else []
ALONE = [
    "run", "--rm", "--network=none", "--read-only", "--cap-drop=all", "--security-opt=no-new-privileges",
    "--ulimit=nofile=4096:4096", "--ulimit=nproc=4096:4096",
]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _possible() -> None:
    if why := base.missing():
        pytest.skip(why)


def built(image: str) -> str:
    """Build it, by the command that `make images` calls."""
    command = [sys.executable, "-m", "images", "build", "--images", image, "--base", base.base()]
    command += ["--wheels", str(base.wheels(image))]
    env = os.environ | {"BUILDAH_ISOLATION": "chroot"}
    done = subprocess.run(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    return f"{image}:{version()}"


def within(image: str, folder: Path) -> Podman:
    """Run a command in the image; `folder` is there as /data."""
    folder.chmod(0o777)

    def call(*words: str) -> subprocess.CompletedProcess[str]:
        command = [
            "podman",
            "--cgroup-manager=cgroupfs",
            *RUNTIME,
            *ALONE,
            f"--volume={folder}:/data",
            image,
            *words,
        ]
        return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    return call


@pytest.fixture(scope="module")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Podman:
    return within(built("dmd2-launch"), tmp_path_factory.mktemp("launch"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Podman:
    image = f"dmd2:{version()}"
    if os.environ.get("DMD2_TEST_DMD2") == "build":
        built("dmd2")
    elif subprocess.run(["podman", "image", "exists", image]).returncode:
        pytest.skip(f"{image} is not on this machine, and DMD2_TEST_DMD2=build does not ask to build it")
    return within(image, tmp_path_factory.mktemp("whole"))


ASK = """
import importlib.util, json, os, pathlib, shutil
from dmd2.io import local, storage
local.write_text(storage.cache() / "written", "here")
try:
    pathlib.Path("/opt/dmd2/written").write_text("")
    root = "can be written"
except OSError as error:
    root = os.strerror(error.errno)
found = {name: bool(importlib.util.find_spec(name)) for name in ("torch", "kfp", "pip", "setuptools", "components", "pytest")}
print(json.dumps({"user": [os.getuid(), os.getgid()], "root": root, "modules": found, "sh": bool(shutil.which("sh"))}))
"""


def test_the_image_without_torch_has_no_rights_and_no_installer(launch: Podman) -> None:
    said = launch("python3", "-c", ASK)
    assert said.returncode == 0, said.stdout
    assert json.loads(said.stdout) == {
        "user": [65532, 65532],
        "root": "Read-only file system",
        "modules": {
            "torch": False,
            "kfp": True,
            "pip": False,
            "setuptools": False,
            "components": True,
            "pytest": False,
        },
        "sh": True,
    }


def test_its_labels_say_what_it_is_and_of_what_it_was_made(launch: Podman) -> None:
    asked = ["podman", "inspect", "--format", "{{json .Config.Labels}}", f"dmd2-launch:{version()}"]
    found = json.loads(subprocess.run(asked, stdout=subprocess.PIPE, check=True).stdout)
    assert labels("dmd2-launch", base.base()).items() <= found.items()
    assert found["org.opencontainers.image.licenses"] == "Apache-2.0"


def test_the_modules_of_its_components_import_in_it(launch: Podman) -> None:
    said = launch(
        "python3",
        "-c",
        "import dmd2.io.artifact, components.find_teachers.ledger, components.find_teachers.watch, kfp.dsl.executor_main",
    )
    assert said.returncode == 0, said.stdout


def test_its_compiled_modules_are_current_whatever_their_times(launch: Podman) -> None:
    said = launch("python3", "-v", "-c", "import dmd2.io.storage")
    assert "__pycache__/storage.cpython-311.pyc matches" in said.stdout


SHORT = ("--teach.steps", "4", "--distill.steps", "4", "--distill.batch", "8", "--distill.preview-every", "4")


def test_stages_run_in_the_image_with_torch(whole: Podman) -> None:
    out = "/data/out"
    for verb, *words in (
        ("shard", "--source", "digits", "--out", f"{out}/shards"),
        ("teach", "--data", f"{out}/shards", "--out", f"{out}/teacher", *SHORT[:2]),
        (
            "distill",
            "--data",
            f"{out}/shards",
            "--teacher",
            f"{out}/teacher",
            "--out",
            f"{out}/run",
            *SHORT[2:],
        ),
    ):
        said = whole("dmd2", verb, "edm-digits", *words)
        assert said.returncode == 0, said.stdout
    (written,) = whole(
        "python3",
        "-c",
        f"from dmd2.io.artifact import read_manifest; print(read_manifest('{out}/run', 'run').digest)",
    ).stdout.split()
    assert len(written) == 64
