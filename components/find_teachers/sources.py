"""Sources of teachers: each is a function from an address to the teachers that are there now.

A folder has a teacher where a `manifest.json` of a teacher is, which is written last. A model on the hub is the commit of
its revision; a Model Registry lists folders. A teacher is identified by the digest of its content, never by name or date.
What is not a complete teacher is skipped with a reason.
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
"""Number of artifacts per request to a registry."""
TIMEOUT_S = 60


@dataclass(frozen=True)
class AnnouncedTeacher:
    name: str
    """Name for people."""
    address: str
    """Value of the pipeline parameter `teacher`; its content never changes."""
    digest: str


@dataclass
class Announcements:
    teachers: list[AnnouncedTeacher] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    """One sentence for each teacher that was skipped."""

    def add(self, other: Announcements) -> None:
        self.teachers += other.teachers
        self.skipped += other.skipped


def find(addresses: str) -> Announcements:
    """The teachers of several addresses, separated by spaces: each once, in the given order."""
    if not addresses.split():
        raise Refused(
            "teachers is empty; give a folder, as gs://bucket/teachers, hf://owner/name@revision or registry+https://host"
        )
    found = Announcements()
    for address in addresses.split():
        found.add(reader_of(address)(address))
    once: dict[str, AnnouncedTeacher] = {}
    for teacher in found.teachers:
        once.setdefault(teacher.digest, teacher)
    return Announcements(list(once.values()), found.skipped)


def reader_of(address: str) -> Callable[[str], Announcements]:
    """The function that reads this kind of address."""
    if address.startswith(HUB):
        return read_hub
    if REGISTRY.fullmatch(address):
        return read_registry
    return read_folder


def read_folder(address: str) -> Announcements:
    """The teachers in a folder, local or `gs://`, at any depth."""
    store, found = open_store(address), Announcements()
    sizes = {entry.name: entry.size for entry in store.list_objects()}
    for name in sizes:
        folder, _, last = name.rpartition("/")
        if last == MANIFEST:
            files = {
                n.removeprefix(f"{folder}/"): size
                for n, size in sizes.items()
                if not folder or n.startswith(f"{folder}/")
            }
            found.add(
                _read_teacher(join_uri(address, folder) if folder else address, store.read(name), files)
            )
    return found


def read_hub(address: str) -> Announcements:
    """The commit of a revision of a model on the Hugging Face hub: `hf://owner/name` or `hf://owner/name@revision`."""
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
        raise OSError(errno.EIO, "the hub returns no commit for it", address)
    return Announcements([AnnouncedTeacher(name.rpartition("/")[2], f"{name}@{commit}", commit)])


def read_registry(address: str) -> Announcements:
    """The teachers that the live artifacts of a Kubeflow Model Registry point to: `registry+http://host:port`."""
    found = Announcements()
    for artifact in _artifacts(address.removeprefix("registry+").rstrip("/")):
        uri, name = artifact.get("uri") or "", artifact.get("name") or artifact.get("id", "")
        if artifact.get("state") != "LIVE":
            continue
        if not is_remote(uri):
            found.skipped.append(
                f"artifact {name!r} of {address} lies at {uri or 'no address'}, not on a bucket"
            )
            continue
        found.add(_read_registered(uri, f"artifact {name!r} of {address}"))
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


def _read_registered(uri: str, who: str) -> Announcements:
    """The teacher in a folder that a registry points to; folders of other kinds are ignored."""
    store = open_store(uri)
    try:
        text = store.read(MANIFEST)
    except FileNotFoundError:
        return Announcements(skipped=[f"{who} points to {uri}, where no {MANIFEST} is"])
    return _read_teacher(uri, text, {entry.name: entry.size for entry in store.list_objects()})


def _read_teacher(folder: str, text: bytes, sizes: dict[str, int]) -> Announcements:
    """The teacher of a manifest, if all of its files are there with their sizes."""
    try:
        manifest = Manifest.model_validate_json(text)
    except ValidationError as error:
        where = join_uri(folder, MANIFEST)
        return Announcements(skipped=[f"{where} is not a manifest of this version ({brief(error)})"])
    if manifest.kind != "teacher":
        return Announcements()
    if missing := [file.path for file in manifest.files if sizes.get(file.path) != file.size]:
        return Announcements(
            skipped=[
                f"{folder} has a manifest, but {missing[0]} is missing or has another size than the manifest says; "
                "copy the manifest last"
            ]
        )
    return Announcements([AnnouncedTeacher(folder.rstrip("/").rpartition("/")[2], folder, manifest.digest)])
