"""Making an artifact: a draft in a hidden folder, resumed after an interruption, published when it is complete.

One process at a time makes an artifact: on one machine a lock keeps others out, on a bucket the process that started
last takes over (`dmd2.io.destination`). What an unfinished draft was started with is written down, and another
configuration or other inputs cannot continue it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from fnmatch import fnmatch
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dmd2.config import Config
from dmd2.errors import Interrupted, Refused
from dmd2.io.artifact import MANIFEST, ArtifactFile, Manifest, config_difference
from dmd2.io.destination import (
    CONTENTS,
    SECONDS,
    STARTED_WITH,
    STARTS,
    Destination,
    LocalDestination,
    RemoteDestination,
)
from dmd2.io.exchange import Exchange
from dmd2.io.local import LocalStore, file_lock, sha256
from dmd2.io.storage import cache, open_store
from dmd2.io.store import Store

RESUMABLE_FILES = (
    "checkpoints/[0-9]*", ".units/*", ".digests/*", ".tars/.units/*", ".tars/.digests/*", ".blocks/*/*",
    "curve/*",
)  # fmt: skip
"""A draft is kept after a failure if it has one of these."""

IMAGE = "DMD2_IMAGE"
"""Variable of the environment with the reference of the image that this process runs in, which the pipeline sets. It counts in pods only:
kfp's local runner sets it too, and runs no image."""


@dataclass
class Draft:
    """An artifact that is being made."""

    path: Path
    """The folder in which the stage writes its files."""
    destination: Destination
    exchange: Exchange
    facts: dict[str, Any] = field(default_factory=dict)
    """`Manifest.facts`."""
    stored_files: list[ArtifactFile] = field(default_factory=list)
    """Files that the stage has written to `store` by itself."""
    indexed_files: set[str] = field(default_factory=set)
    """Names of files that an index lists, which is itself one of the files, and the manifest does not."""
    digests: dict[str, str] = field(default_factory=dict)
    """SHA-256 of files of the draft that were computed while they were written."""
    stopwatch: Stopwatch | None = None
    """Of the process that publishes the draft."""

    @property
    def store(self) -> Store:
        """Where the files end up: the folder `path` itself, or a bucket."""
        return self.destination.store

    def list_files(self) -> list[ArtifactFile]:
        """All files of the draft, sorted by name. They are complete, and not read again for the manifest."""
        self.stored_files = _list_files(self)
        return self.stored_files

    def save(self) -> None:
        """Save the present files so that another start can resume, on another machine too if `store` is a bucket."""
        self.destination.save(self.exchange.parts())


@contextmanager
def draft_artifact(
    out: str | Path,
    kind: str,
    config: Config | None,
    inputs: dict[str, str],
    *,
    resumable: bool = False,
    part: bool = False,
) -> Iterator[Draft]:
    """Yield a draft of the artifact `out`, and publish it when the block ends.

    After an exception the draft is deleted, unless it is `resumable` and holds something to resume from.

    Args:
        part: Several processes write into the same draft at once. It is not published; a later call without `part` does.

    Raises:
        Refused: `out` holds other files, another process works at it, or the draft was started with another
            configuration or other inputs.
    """
    with _lock_draft(out, kind, config, inputs, resumable=resumable, part=part) as draft:
        if part:
            yield draft
            return
        draft.stopwatch = stopwatch = Stopwatch(draft.store if resumable else None)
        try:
            yield draft
            files, seconds = _list_files(draft), round(stopwatch.elapsed(), 2)
            manifest = Manifest(
                kind=kind,
                config=config,
                inputs=inputs,
                files=files,
                facts=draft.facts,
                versions=package_versions(),
                seconds=seconds,
            )
            draft.save()
            draft.destination.publish(manifest)
        except BaseException as error:
            _clean_up(draft, stopwatch, resumable and _is_resumable(draft, error))
            raise


def join_draft(out: str | Path, kind: str) -> Draft:
    """The draft that the main process of the same run has started."""
    destination = _destination(out, kind)
    return Draft(destination.draft, destination, Exchange(destination.draft, destination.store))


@contextmanager
def _lock_draft(
    out: str | Path,
    kind: str,
    config: Config | None,
    inputs: dict[str, str],
    *,
    resumable: bool,
    part: bool,
) -> Iterator[Draft]:
    """The draft, locked, with the files of an earlier start of the same work."""
    draft = join_draft(out, kind)
    try:
        with file_lock(draft.path / ".lock", wait=False, shared=part):
            if not part and not (resumable and draft.store.local_folder):
                _clear(draft.path)  # files on a bucket are downloaded again: only uploaded ones count
            if resumable:
                _check_same_start(draft.store, kind, config, inputs)
            if resumable and not part:
                draft.destination.restore()
            yield draft
    except BlockingIOError:
        raise Refused(
            f"another process is working in {draft.path}; wait for it, or choose another --out"
        ) from None


def _destination(out: str | Path, kind: str) -> LocalDestination | RemoteDestination:
    """Where `out` is; refused if there are other files."""
    store = open_store(out)
    if store.local_folder is None:
        names = {info.name for info in store.list_objects()}
        if names and not names & {STARTED_WITH, CONTENTS}:
            raise Refused(
                f"{out} holds other things, {min(names)!r} for one; choose another --out or remove them"
            )
        folder = cache() / "drafts" / hashlib.sha256(str(out).encode()).hexdigest()[:32]
        return RemoteDestination(folder, store)
    target = store.local_folder.absolute()
    if (target.exists() and not target.is_dir()) or (target.is_dir() and any(target.iterdir())):
        raise Refused(
            f"{target} exists and is not a finished {kind} folder; choose another --out or remove it"
        )
    return LocalDestination(draft_folder(target), target)


def draft_folder(target: Path) -> Path:
    """The folder beside `target` in which an artifact of this machine is made."""
    return target.with_name(f".{target.name}.partial")


def _clean_up(draft: Draft, stopwatch: Stopwatch, keep: bool) -> None:
    """After a failure: keep what can be resumed, in the place from which it is resumed."""
    if keep:
        stopwatch.save()
    else:
        draft.destination.release()
    if not (keep and draft.store.local_folder):
        shutil.rmtree(draft.path)


def _is_resumable(draft: Draft, error: BaseException) -> bool:
    if any(any(draft.path.glob(pattern)) for pattern in RESUMABLE_FILES):
        return True
    if draft.store.local_folder:
        return False
    if isinstance(error, OSError | Interrupted):  # an upload may still arrive
        return True
    names = [info.name for info in draft.store.list_objects()]
    return any(fnmatch(name, pattern) for name in names for pattern in RESUMABLE_FILES)


class Stopwatch:
    """Wall-clock seconds of a stage and the number of its starts, over all starts if there is a store to remember them."""

    def __init__(self, store: Store | None) -> None:
        self.store, self.before, self.restarts = store, 0.0, 0
        if store:
            with suppress(FileNotFoundError):
                self.before = float(store.read(SECONDS))
            with suppress(FileNotFoundError):
                self.restarts = int(store.read(STARTS))
            store.write(STARTS, str(self.restarts + 1).encode())
        self.start = time.monotonic()

    def elapsed(self) -> float:
        return self.before + time.monotonic() - self.start

    def save(self) -> None:
        if self.store:
            with suppress(
                OSError
            ):  # on a full disk only the time is lost, not the error that stopped the stage
                self.store.write(SECONDS, str(self.elapsed()).encode())


def package_versions() -> dict[str, str]:
    """Versions of the packages that decide results, and in a container of a pipeline the reference of its image."""
    names = ("dmd2", "torch", "numpy", "pillow", "clean-fid", "webdataset")
    image = os.environ.get(IMAGE) if "KUBERNETES_SERVICE_HOST" in os.environ else None
    return {name: version(name) for name in names} | ({"image": image} if image else {})


def _list_files(draft: Draft) -> list[ArtifactFile]:
    """All files of the draft without hidden ones, sorted by name. A manifest is there if an earlier start was killed
    just before it could publish."""
    files = {file.path: file for file in (*draft.stored_files, *draft.exchange.parts().values())}
    known = files.keys() | draft.indexed_files | {MANIFEST}
    found = [entry for entry in LocalStore(draft.path).list_objects() if entry.name not in known]
    visible = [entry for entry in found if not any(part.startswith(".") for part in entry.name.split("/"))]
    with ThreadPoolExecutor() as pool:
        digests = pool.map(lambda e: draft.digests.get(e.name) or sha256(draft.path / e.name), visible)
        for entry, digest in zip(visible, digests, strict=True):
            files[entry.name] = ArtifactFile(path=entry.name, size=entry.size, sha256=digest)
    return [files[name] for name in sorted(files)]


def _clear(folder: Path) -> None:
    """Delete what a killed process has left."""
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != ".lock":
            path.unlink()


def _check_same_start(store: Store, kind: str, config: Config | None, inputs: dict[str, str]) -> None:
    """Write down what a draft is started with; refuse to resume it with another configuration or other inputs."""
    begun = {"config": config.model_dump(mode="json") if config else None, "inputs": inputs}
    try:
        store.compare_and_swap(STARTED_WITH, json.dumps(begun).encode(), None)
        return
    except FileExistsError:
        old = json.loads(store.read(STARTED_WITH))
    if old["inputs"] != inputs:
        raise Refused(f"the unfinished {store.uri} was begun with other inputs; remove it to start anew")
    try:
        was = Config.model_validate(old["config"]) if old["config"] else None
    except ValueError:
        raise Refused(
            f"the unfinished {store.uri} was begun by another version; remove it to start anew"
        ) from None
    if change := config_difference(kind, was, config):
        raise Refused(
            f"the unfinished {store.uri} was begun with another configuration ({change}); give the same one to continue, or remove it to start anew"
        )
