"""What a run reads and writes elsewhere, looked at before any stage is paid for: each address is asked once, all at a time.

Nothing is downloaded but manifests. Whatever is not there, or cannot be read with this account, is refused with its address.
"""

from __future__ import annotations

import errno
import re
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from components.prepare_run.parameters import LAYOUT, RunParameters
from dmd2.config import Config, FamilyConfig
from dmd2.errors import Refused, brief
from dmd2.evaluation.baselines import parse_baselines
from dmd2.io.artifact import MANIFEST, MIRRORED_TEACHER, read_manifest
from dmd2.io.hub import HUB_NAME, check_hub_account, check_hub_file
from dmd2.io.model_registry import ModelRegistry
from dmd2.io.storage import exists, join_uri, open_store
from dmd2.stages.mirror import pretrained_files, pretrained_folders

TIMEOUT_S = 5.0
"""Seconds in which a server must answer."""
SETTINGS = "settings.json"
"""File in the folder of a run: its Config."""
CHECKPOINT = re.compile(r".*\.(safetensors|ckpt|bin|pt|pth|pkl|pickle)")
PIPELINE, NETWORK = "model_index.json", "config.json"
MIRROR = "copy it to the bucket by `dmd2 mirror` and give that address"


def check_resources(given: RunParameters, root: str) -> None:
    """Raise Refused for what a stage would not find, and OSError for a root that cannot be written.

    Args:
        root: Folder of the run, which receives the Config.
    """
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda check: check(), _checks(given, root)))


def _checks(given: RunParameters, root: str) -> Iterator[Callable[[], object]]:
    config = given.last.config
    yield partial(_check_root, root, config)
    if given.source != "digits":
        yield partial(_check_source, LAYOUT.sub("", given.source, count=1))
    if given.teacher:
        yield partial(_check_teacher, given.teacher, config.family)
    if given.start:
        yield partial(_check_artifact, "start", given.start, "run", config.family)
    if given.pairs:
        yield partial(_check_artifact, "pairs", given.pairs, "pairs", config.family)
    if given.prompts:
        yield partial(_check_file, "prompts", LAYOUT.sub("", given.prompts, count=1))
    for name in ("destination", "scores"):
        if address := getattr(given, name):
            yield partial(_check_bucket, name, address)
    for name, folder in {"base": given.base, "vae": given.vae}.items():
        if folder:
            yield partial(_check_folder, name, folder, PIPELINE, NETWORK, f"vae/{NETWORK}")
    if given.safety_checker:
        from dmd2.encoders.safety import FILES  # imports torch

        for file in FILES:
            yield partial(_check_folder, "safety_checker", given.safety_checker, file)
    if given.hub:
        yield partial(check_hub_account, given.hub)
    if given.model_registry:
        yield partial(ModelRegistry, given.model_registry)
    for training in given.trainings:
        yield from _checks_of_weights(training.config)


def _checks_of_weights(config: Config) -> Iterator[Callable[[], None]]:
    """Networks that its stages load beside the teacher."""
    for each in parse_baselines(config.evaluate.baselines):
        yield partial(_check_folder, f"evaluate.baselines {each.name}", each.source, PIPELINE, MANIFEST)
    for field, file in pretrained_files(config).items():
        yield partial(_check_weights, field, file.uri)
    for field, folder in pretrained_folders(config).items():
        yield partial(_check_folder, field, folder, NETWORK, f"vae/{NETWORK}")


def _check_root(root: str, config: Config) -> None:
    """Write the Config into the folder of the run, which every stage writes to."""
    open_store(root).write(SETTINGS, config.model_dump_json(indent=1).encode())


def _check_source(address: str) -> None:
    """Something is at the address: a file, files below it, or files that match its last component."""
    above, _, name = address.rstrip("/").rpartition("/")
    pattern = re.search(r"[*?[]", name)
    start = name[: pattern.start()] if pattern else ""
    folder = open_store((above or ".") if pattern else address)
    if not (folder.has_objects(start) or exists(address)):
        raise Refused(f"source {address} is empty or does not exist; give the address of images")


def _check_teacher(address: str, family: FamilyConfig) -> None:
    """A finished teacher of the recipe's family, a checkpoint, or a pipeline."""
    if not HUB_NAME.fullmatch(address) and exists(join_uri(address, MANIFEST)):
        return _check_artifact("teacher", address, "teacher", family)
    if CHECKPOINT.fullmatch(address):
        return _check_file("teacher", address)
    if not HUB_NAME.fullmatch(address) and exists(join_uri(address, f"{MIRRORED_TEACHER}/{MANIFEST}")):
        raise Refused(
            f"teacher {address} is the folder of a mirror; give that of its teacher, {join_uri(address, MIRRORED_TEACHER)}"
        )
    return _check_folder("teacher", address, PIPELINE, f"unet/{NETWORK}")


def _check_artifact(name: str, address: str, kind: str, family: FamilyConfig) -> None:
    """A finished artifact that was made for networks of this family."""
    made = read_manifest(address, kind).config
    facts = [(f.kind, f.image, f.prompts) for f in (made.family, family)] if made else []
    if facts and facts[0] != facts[1]:
        raise Refused(
            f"{name} {address} is of a {facts[0][0]} network for images {facts[0][1]}, the recipe of a {facts[1][0]} for {facts[1][1]}; choose "
            "another recipe, or one that was made with it"
        )


def _check_file(name: str, address: str) -> None:
    if not exists(address):
        raise Refused(f"{name} {address} does not exist or is no file; check the address")


def _check_folder(name: str, address: str, *files: str) -> None:
    """A folder, local or on a bucket, or a name on the hub, with one of the files."""
    store = open_store(address)
    if store.local_folder is None or store.local_folder.is_dir():
        if not any(exists(join_uri(address, file)) for file in files):
            raise Refused(
                f"{name} {address} has no {' or '.join(files)}, or does not exist; check the address"
            )
    elif HUB_NAME.fullmatch(address):
        check_hub_file(name, address, files, TIMEOUT_S)
    else:
        raise Refused(f"{name} {address} is neither a folder nor a name on the hub; check the address")


def _check_weights(name: str, uri: str) -> None:
    """A file of weights that can be read: local, on a bucket, or on a web server, which is asked for its headers only."""
    if not uri.startswith("https://"):
        return _check_file(f"{name}.uri", uri)
    try:
        with urllib.request.urlopen(urllib.request.Request(uri, method="HEAD"), timeout=TIMEOUT_S):
            return None
    except OSError as error:
        raise Refused(
            f"{name}.uri {uri} cannot be read from here ({brief(error)}); {MIRROR} as {name}.uri"
        ) from None


def _check_bucket(name: str, address: str) -> None:
    """Its bucket exists. Whether this account may read it does not matter: another one may publish."""
    try:
        open_store(address).has_objects()
    except FileNotFoundError:
        raise Refused(f"{name} {address} is in a bucket that does not exist; check the address") from None
    except OSError as error:
        if error.errno != errno.EACCES:
            raise
