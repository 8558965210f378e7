"""Where teachers are announced: a source is a function from its address to what is there now.

A folder announces a teacher by its `manifest.json`, which is written last. A name on the hub announces the commit that
its revision stands for; a Model Registry, the folders that its artifacts point to. Whatever the source, a teacher is
known by the digest of what it is, never by a name or a date. What is no teacher is passed over with its reason.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from dmd2.errors import Refused, brief
from dmd2.io.artifact import MANIFEST, Manifest
from dmd2.io.storage import is_remote, join_uri, open_store

HUB = "hf://"
REGISTRY = re.compile(r"registry\+(https?://.+)")
PAGE = 100
"""Artifacts of a registry that are asked for at a time."""
TIMEOUT_S = 60


@dataclass(frozen=True)
class Teacher:
    name: str
    """For people."""
    address: str
    """What a distillation takes as its teacher. What lies there is what the digest says, now and later."""
    digest: str


@dataclass
class Found:
    teachers: list[Teacher] = field(default_factory=list)
    passed_over: list[str] = field(default_factory=list)
    """A sentence each."""

    def add(self, other: Found) -> None:
        self.teachers += other.teachers
        self.passed_over += other.passed_over


def find(addresses: str) -> Found:
    """The teachers of several sources, separated by spaces: each once, in the order in which they are given."""
    if not addresses.split():
        raise Refused(
            "teachers is empty; give a folder, as gs://bucket/teachers, hf://owner/name@revision or registry+https://host"
        )
    found = Found()
    for address in addresses.split():
        found.add(source(address)(address))
    once: dict[str, Teacher] = {}
    for teacher in found.teachers:
        once.setdefault(teacher.digest, teacher)
    return Found(list(once.values()), found.passed_over)


def source(address: str) -> Callable[[str], Found]:
    if address.startswith(HUB):
        return on_the_hub
    if REGISTRY.fullmatch(address):
        return in_a_registry
    return below


def below(address: str) -> Found:
    """The teachers below a folder, local or `gs://`, at any depth."""
    store, found = open_store(address), Found()
    sizes = {entry.name: entry.size for entry in store.list_objects()}
    for name in sizes:
        folder, _, last = name.rpartition("/")
        if last == MANIFEST:
            beside = {
                n.removeprefix(f"{folder}/"): size
                for n, size in sizes.items()
                if not folder or n.startswith(f"{folder}/")
            }
            found.add(_announced(join_uri(address, folder) if folder else address, store.read(name), beside))
    return found


def on_the_hub(address: str) -> Found:
    """The commit that a revision of a model of Hugging Face stands for: `hf://owner/name`, `hf://owner/name@revision`."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    name, _, revision = address.removeprefix(HUB).partition("@")
    try:
        commit = HfApi().model_info(name, revision=revision or None, timeout=TIMEOUT_S).sha
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        raise Refused(f"{address} is no model on the hub ({brief(error)}); check name and revision") from None
    except (HfHubHTTPError, OSError) as error:
        raise OSError(errno.EIO, f"the hub does not answer as it should ({brief(error)})", address) from None
    if not commit:
        raise OSError(errno.EIO, "the hub names no commit for it", address)
    return Found([Teacher(name.rpartition("/")[2], f"{name}@{commit}", commit)])


def in_a_registry(address: str) -> Found:
    """The teachers that live artifacts of a Kubeflow Model Registry point to: `registry+http://host:port`."""
    found = Found()
    for artifact in _artifacts(address.removeprefix("registry+").rstrip("/")):
        uri, name = artifact.get("uri") or "", artifact.get("name") or artifact.get("id", "")
        if artifact.get("state") != "LIVE":
            continue
        if not is_remote(uri):
            found.passed_over.append(
                f"artifact {name!r} of {address} lies at {uri or 'no address'}, not on a bucket"
            )
            continue
        found.add(_pointed_to(uri, f"artifact {name!r} of {address}"))
    return found


def _artifacts(host: str) -> Iterator[dict[str, Any]]:
    import requests

    query = {"pageSize": str(PAGE)}
    while True:
        where = f"{host}/api/model_registry/v1/model_artifacts"
        try:
            answer = requests.get(where, params=query, timeout=TIMEOUT_S)
            answer.raise_for_status()
            page = answer.json()
        except (requests.RequestException, ValueError) as error:
            raise OSError(
                errno.EIO, f"the registry does not answer as it should ({brief(error)})", where
            ) from None
        yield from page.get("items", ())
        if not page.get("nextPageToken"):
            return
        query["nextPageToken"] = page["nextPageToken"]


def _pointed_to(uri: str, who: str) -> Found:
    """A folder that somebody names must be there; one of another kind is none of our business."""
    store = open_store(uri)
    try:
        text = store.read(MANIFEST)
    except FileNotFoundError:
        return Found(passed_over=[f"{who} points to {uri}, where no {MANIFEST} is"])
    return _announced(uri, text, {entry.name: entry.size for entry in store.list_objects()})


def _announced(folder: str, text: bytes, sizes: dict[str, int]) -> Found:
    """The teacher of a manifest, if all of its files are there."""
    try:
        manifest = Manifest.model_validate_json(text)
    except ValidationError as error:
        where = join_uri(folder, MANIFEST)
        return Found(passed_over=[f"{where} is not a manifest of this version ({brief(error)})"])
    if manifest.kind != "teacher":
        return Found()
    if missing := [file.path for file in manifest.files if sizes.get(file.path) != file.size]:
        return Found(
            passed_over=[
                f"{folder} is announced, but {missing[0]} and perhaps more of it is not there as the manifest says; "
                "copy the manifest last"
            ]
        )
    return Found([Teacher(folder.rstrip("/").rpartition("/")[2], folder, manifest.digest)])
