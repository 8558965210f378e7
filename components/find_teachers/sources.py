"""Sources of teachers: each is a function from an address to the teachers that are there now.

The sources are read side by side, each within a time limit; one that cannot be read is named, and the others are used.

A folder has a teacher where a `manifest.json` of a teacher is, which is written last. A model on the hub is the commit of
its revision; a Model Registry lists folders. A teacher is identified by the digest of its content, never by name or date.
What is not a complete teacher is skipped with a reason.
"""

from __future__ import annotations

import errno
import json
import logging
import re
import threading
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from components.find_teachers.ledger import describe
from dmd2.errors import Refused, brief
from dmd2.io.artifact import MANIFEST, MIRRORED_TEACHER, Manifest
from dmd2.io.storage import is_remote, join_uri, open_store
from dmd2.io.store import CONCURRENT_REQUESTS, ObjectInfo, Store

logger = logging.getLogger(__name__)

HUB = "hf://"
REGISTRY = re.compile(r"registry\+(https?://.+)")
PAGE = 100
"""Number of artifacts per request to a registry."""
PAGES = 1000
"""Largest number of pages of a registry."""
PAGE_BYTES = 16 * 2**20
"""Largest page of a registry."""
TIMEOUT_S = 60
"""Seconds to wait for an answer of a hub or a registry."""
SOURCE_S = 600.0
"""Seconds in which a source must have been read."""


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
    """One sentence for each teacher that was skipped, and for each source that could not be read."""

    def add(self, other: Announcements) -> None:
        self.teachers += other.teachers
        self.skipped += other.skipped


def find(addresses: str, limit_s: float = SOURCE_S) -> Announcements:
    """The teachers of several addresses, separated by spaces: each once, in the given order.

    Raises:
        Refused, OSError: None of the sources can be read.
    """
    if not addresses.split():
        raise Refused(
            "teachers is empty; give a folder, as gs://bucket/teachers, hf://owner/name@revision or registry+https://host"
        )
    found, end, failed = Announcements(), time.monotonic() + limit_s, list[Exception]()
    reading = {address: _start_reading(address) for address in addresses.split()}
    for address, future in reading.items():
        try:
            found.add(future.result(max(0.0, end - time.monotonic())))
        except Exception as error:  # of whatever kind: the other sources do not depend on it
            silence = OSError(errno.ETIMEDOUT, f"it has not answered within {limit_s:g} s")
            failed.append(error if future.done() else silence)
            found.skipped.append(f"{address} cannot be read: {describe(failed[-1])}")
    if len(failed) == len(reading):
        raise failed[0]
    once: dict[str, AnnouncedTeacher] = {}
    for teacher in found.teachers:
        once.setdefault(teacher.digest, teacher)
    return Announcements(list(once.values()), found.skipped)


def _start_reading(address: str) -> Future[Announcements]:
    """Read a source in a thread that does not keep the process alive."""
    future: Future[Announcements] = Future()

    def read() -> None:
        try:
            future.set_result(reader_of(address)(address))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=read, daemon=True).start()
    return future


def reader_of(address: str) -> Callable[[str], Announcements]:
    """The function that reads this kind of address."""
    if address.startswith(HUB):
        return read_hub
    if REGISTRY.fullmatch(address):
        return read_registry
    return read_folder


def read_folder(address: str) -> Announcements:
    """The teachers in a folder, local or `gs://`, at any depth."""
    store = open_store(address)
    objects = sorted(store.list_objects())
    names = [entry.name for entry in objects]
    folders = [
        name.removesuffix(MANIFEST) for name in names if name.rpartition("/")[2] == MANIFEST
    ]  # each with its slash, or empty
    with ThreadPoolExecutor(CONCURRENT_REQUESTS) as pool:
        read = pool.map(lambda folder: _read_in(store, folder, _below(objects, names, folder)), folders)
        found = Announcements()
        for each in read:
            found.add(each)
    return found


def _below(objects: Sequence[ObjectInfo], names: Sequence[str], folder: str) -> Sequence[ObjectInfo]:
    """The objects of a sorted listing whose name starts with `folder`: they are neighbours."""
    first = bisect_left(names, folder)
    return objects[first : bisect_left(names, folder + chr(0x10FFFF), first)]


def _read_in(store: Store, folder: str, objects: Sequence[ObjectInfo]) -> Announcements:
    """The teacher of a folder of the store, which has a manifest."""
    where = join_uri(store.uri, folder.rstrip("/")) if folder else store.uri
    try:
        text = store.read(folder + MANIFEST)
    except OSError as error:
        return Announcements(skipped=[f"{where} cannot be read: {describe(error)}"])
    return _read_teacher(where, text, {entry.name.removeprefix(folder): entry.size for entry in objects})


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
    for number, page in enumerate(_pages(address.removeprefix("registry+").rstrip("/"))):
        if isinstance(page, OSError):
            if not number:
                raise page
            found.skipped.append(f"{address} cannot be read to its end: {describe(page)}")
            break
        for artifact in page.get("items") or ():
            found.add(_read_artifact(artifact, address))
    return found


def _pages(host: str) -> Iterator[dict[str, Any] | OSError]:
    """The pages of a registry, the last one an error if they cannot be read to their end."""
    where = f"{host}/api/model_registry/v1/model_artifacts"
    query, seen = {"pageSize": str(PAGE)}, {""}
    try:
        while len(seen) <= PAGES:
            page = _get_page(where, query)
            yield page
            token = str(page.get("nextPageToken") or "")
            if not token:
                return
            if token in seen:
                break
            seen.add(token)
            query["nextPageToken"] = token
        raise OSError(errno.EIO, f"the registry's list has no end after {len(seen)} pages", where)
    except OSError as error:
        yield error


def _get_page(where: str, query: dict[str, str]) -> dict[str, Any]:
    """A page of the registry, of at most PAGE_BYTES and TIMEOUT_S seconds: it may send without an end."""
    import requests

    end, data = time.monotonic() + TIMEOUT_S, bytearray()
    try:
        with requests.get(where, params=query, timeout=TIMEOUT_S, stream=True) as answer:
            answer.raise_for_status()
            for chunk in answer.iter_content(2**16):
                data += chunk
                if len(data) > PAGE_BYTES or time.monotonic() > end:
                    raise ValueError(f"a page of more than {PAGE_BYTES} bytes or {TIMEOUT_S} s")
        page = json.loads(data)
    except (requests.RequestException, ValueError) as error:
        raise OSError(
            errno.EIO, f"the registry does not answer as it should ({brief(error)})", where
        ) from None
    if not isinstance(page, dict):
        raise OSError(errno.EIO, f"the registry answers with {data[:80]!r}, which is no page", where)
    return page


def _read_artifact(artifact: Any, address: str) -> Announcements:
    """The teacher that an artifact of a registry points to."""
    if not isinstance(artifact, dict) or artifact.get("state") != "LIVE":
        return Announcements()
    uri, name = str(artifact.get("uri") or ""), artifact.get("name") or artifact.get("id", "")
    who = f"artifact {name!r} of {address}"
    try:
        return _read_registered(uri, who)
    except (Refused, OSError) as error:
        return Announcements(skipped=[f"{who} points to {uri}, which cannot be read: {describe(error)}"])


def _read_registered(uri: str, who: str) -> Announcements:
    """The teacher in a folder that a registry points to; folders of other kinds are ignored."""
    if not is_remote(uri):
        return Announcements(skipped=[f"{who} lies at {uri or 'no address'}, not on a bucket"])
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
    return Announcements([AnnouncedTeacher(name_of(folder), folder, manifest.digest)])


def name_of(folder: str) -> str:
    """The last part of the address that tells teachers apart: `dmd2 mirror` calls all of them `teacher`."""
    return folder.rstrip("/").removesuffix(f"/{MIRRORED_TEACHER}").rpartition("/")[2]
