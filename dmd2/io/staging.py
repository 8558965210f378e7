"""A folder while it is being made: drafted, resumed, brought to a bucket, and given its name at last."""

from __future__ import annotations

import hashlib
import json
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
from dmd2.io.artifact import MANIFEST, ArtifactFile, Manifest, check_file_name, config_difference
from dmd2.io.local import LocalStore, file_lock, sha256, write_text
from dmd2.io.storage import cache, local_path, open_store, upload_files
from dmd2.io.store import CONCURRENT_REQUESTS, Store

CONTENTS = ".contents.json"
"""On a bucket: what a draft consists of. Written after its files, so that a draft is never taken up half-sent."""
STARTED_WITH, SECONDS = ".begun.json", ".seconds"
"""What an unfinished folder was begun with, and the time it has taken."""
RESUMABLE_FILES = ("checkpoints/[0-9]*", ".units/*", ".digests/*", ".tars/.units/*", ".tars/.digests/*")
"""What an unfinished folder must hold to be continued."""


@dataclass
class Draft:
    """A folder while it is being made."""

    path: Path
    """Where the stage writes."""
    store: Store
    """Where the files end up: the same folder, or a bucket."""
    facts: dict[str, Any] = field(default_factory=dict)
    delivered: list[ArtifactFile] = field(default_factory=list)
    """Files that the stage has brought to the store itself."""
    version: str | None = None
    """Of the contents on the bucket: when it changes, another process has taken the draft over."""
    meeting: int = 0
    """What the processes that work at it call this start of theirs."""
    apart: bool = False
    """Whether this is the folder of another machine than the main process's, which gives its files to the bucket itself."""
    given: dict[str, ArtifactFile] = field(default_factory=dict)
    """By name: what other machines have brought to the bucket."""
    _sent: dict[str, str] = field(default_factory=dict)

    @property
    def remote(self) -> bool:
        return self.store.local_folder is None

    def push(self) -> None:
        """Have on the bucket what is here, so that another machine can go on."""
        if not self.remote:
            return
        self._claim()  # nothing is sent over what another process has there
        if self.store.version(MANIFEST):
            self.store.delete([CONTENTS])
            raise Refused(
                f"{self.store.uri} was finished by another process meanwhile; this result is dropped"
            )
        self.given = {name: file for name, file in self.given.items() if (self.path / name).parent.is_dir()}
        here = self._here() | {name: file.sha256 for name, file in self.given.items()}
        before = self._sent | {name: file.sha256 for name, file in self.given.items()}
        changed = [name for name, state in here.items() if before.get(name) != state]
        upload_files(self.path, changed, self.store)
        self._sent = here
        self._claim()
        self.store.delete(before.keys() - here.keys())

    def pull(self) -> None:
        """Have here what another machine left on the bucket, and go on in its place."""
        if not self.remote:
            return
        for name in json.loads(self.store.read(CONTENTS)) if self.version else ():
            self.store.download(name, self.path / check_file_name(name))
        self._sent = self._here()
        self._claim()

    def call(self, meeting: int) -> None:
        """Let other processes see whether they are on this machine."""
        for earlier in self.path.glob(".[0-9]*.lock"):
            earlier.unlink()
        self.meeting = meeting
        (self.path / f".{meeting}.lock").touch()

    def answer(self, meeting: int) -> None:
        """The other side of `call`."""
        self.meeting, self.apart = meeting, not (self.path / f".{meeting}.lock").exists()
        if self.apart and not self.remote:
            raise Refused(
                f"{self.path} is not there on a machine of this run; on several machines choose an --out on a bucket, or on "
                "a disk that all of them share"
            )

    def take(self, folders: str) -> None:
        """Have here the last of these folders that the bucket has, as `checkpoints/`."""
        shutil.rmtree(self.path, ignore_errors=True)
        self.path.mkdir(parents=True)
        there = json.loads(self.store.read(CONTENTS)) if self.version else []
        names = [check_file_name(name) for name in there if name.startswith(folders)]
        last = max((name.split("/")[1] for name in names), default="")
        wanted = [name for name in names if name.split("/")[1] == last]
        with ThreadPoolExecutor(CONCURRENT_REQUESTS) as pool:
            list(pool.map(lambda name: self.store.download(name, self.path / name), wanted))

    def complete(self, folder: str) -> None:
        """Have here also what other machines have brought to a folder on the bucket, by the manifest that it has of its own."""
        if not self.remote:
            return
        names = json.loads(self.store.read(f"{folder}/{MANIFEST}"))["files"]
        wanted = [f"{folder}/{check_file_name(name)}" for name in (*names, MANIFEST)]
        missing = [name for name in wanted if not (self.path / name).exists()]
        with ThreadPoolExecutor(CONCURRENT_REQUESTS) as pool:
            list(pool.map(lambda name: self.store.download(name, self.path / name), missing))

    def give(self, path: Path, folder: str, who: int) -> None:
        """Bring what is at `path` to the bucket as a part of `folder`, and tell the main process."""

        def sent(name: str, size: int) -> ArtifactFile:
            self.store.upload(path / name, f"{folder}/{name}")
            return ArtifactFile(path=f"{folder}/{name}", size=size, sha256=sha256(path / name))

        with ThreadPoolExecutor(CONCURRENT_REQUESTS) as pool:
            files = list(
                pool.map(lambda entry: sent(entry.name, entry.size), LocalStore(path).list_objects())
            )
        told = json.dumps([file.model_dump() for file in files])
        self.store.write(f"{self._parts(folder)}{who}.json", told.encode())

    def receive(self, folder: str) -> list[ArtifactFile]:
        """What all the others gave to it."""
        if not self.remote:
            return []
        told = [
            json.loads(self.store.read(entry.name)) for entry in self.store.list_objects(self._parts(folder))
        ]
        files = [ArtifactFile.model_validate(file) for part in told for file in part]
        self.given |= {file.path: file for file in files}
        return files

    def _parts(self, folder: str) -> str:
        return f".given/{self.meeting}/{folder}/"

    def leave(self) -> None:
        """Give up a place on the bucket where nothing is worth keeping; what lies there already stays ours."""
        if self.remote:
            with suppress(OSError, Refused):
                self._claim()
                if {entry.name for entry in self.store.list_objects()} <= {STARTED_WITH, SECONDS, CONTENTS}:
                    self.store.delete([STARTED_WITH, SECONDS, CONTENTS])

    def _here(self) -> dict[str, str]:
        """What belongs on the bucket, and in which state it is."""
        return {
            e.name: e.fingerprint
            for e in LocalStore(self.path).list_objects()
            if not e.name.startswith(".tars/")
        }

    def _claim(self) -> None:
        """Say on the bucket what the draft consists of; only the process that started last may."""
        text = json.dumps(sorted(self._sent)).encode()
        try:
            self.version = self.store.compare_and_swap(CONTENTS, text, self.version)
        except FileExistsError:
            raise Refused(
                f"another process has begun to work in {self.store.uri}; this one gives way to it"
            ) from None


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
    """Make `out` in a hidden folder beside it, and give it its name once its manifest is written.

    A failure removes the hidden folder, unless it is `resumable` and holds something to continue from. A `part` is
    made beside others, in the same hidden folder, and leaves the manifest to whoever has the whole.
    """
    with _lock_draft(out, kind, config, inputs, resumable=resumable, part=part) as draft:
        clock = Stopwatch(draft.store if resumable and not part else None)
        try:
            yield draft
            if part:
                return
            manifest = Manifest(
                kind=kind,
                config=config,
                inputs=inputs,
                files=_list_files(draft),
                facts=draft.facts,
                versions=package_versions(),
                seconds=round(clock.read(), 2),
            )
            _publish(draft, out, manifest.model_dump_json(indent=1))
        except BaseException as error:
            if not part:
                _clean_up(draft, clock, resumable and _is_resumable(draft, error))
            raise


def _clean_up(draft: Draft, clock: Stopwatch, keep: bool) -> None:
    """What is left after a failure: what can be continued, in the place where it is continued."""
    if keep:
        clock.stop()
    else:
        draft.leave()
    if draft.remote or not keep:
        shutil.rmtree(draft.path)


def _is_resumable(draft: Draft, error: BaseException) -> bool:
    if any(any(draft.path.glob(pattern)) for pattern in RESUMABLE_FILES):
        return True
    if not draft.remote:
        return False
    if isinstance(error, OSError | Interrupted):  # something may still be on its way to the bucket
        return True
    return any(
        fnmatch(entry.name, pattern) for entry in draft.store.list_objects() for pattern in RESUMABLE_FILES
    )


def join_draft(out: str | Path, kind: str) -> Draft:
    """The hidden folder that another process of the same run has begun, on this machine."""
    return _make_draft(out, kind)


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
    """The hidden folder, locked, with what an earlier start of the same work has left in it."""
    draft = _make_draft(out, kind)
    try:
        with file_lock(draft.path / ".lock", wait=False, shared=part):
            if not part and (draft.remote or not resumable):
                _clear(draft.path)  # the truth of a draft on a bucket is what reached the bucket
            if resumable:
                _check_same_start(draft.store, kind, config, inputs)
            if resumable and not part:
                draft.pull()
            yield draft
    except BlockingIOError:
        raise Refused(
            f"another process is working in {draft.path}; wait for it, or choose another --out"
        ) from None


def _make_draft(out: str | Path, kind: str) -> Draft:
    store = open_store(out)
    if store.local_folder is None:
        names = {entry.name for entry in store.list_objects()}
        if names and not names & {STARTED_WITH, CONTENTS}:
            raise Refused(
                f"{out} holds other things, {min(names)!r} for one; choose another --out or remove them"
            )
        path = cache() / "drafts" / hashlib.sha256(str(out).encode()).hexdigest()[:32]
        return Draft(path, store, version=store.version(CONTENTS))
    target = local_path(out).absolute()
    if (target.exists() and not target.is_dir()) or (target.is_dir() and any(target.iterdir())):
        raise Refused(
            f"{target} exists and is not a finished {kind} folder; choose another --out or remove it"
        )
    path = target.with_name(f".{target.name}.partial")
    return Draft(path, LocalStore(path))


def _publish(draft: Draft, out: str | Path, manifest: str) -> None:
    """Let the folder be there."""
    if draft.remote:
        draft.push()
        try:
            draft.store.compare_and_swap(MANIFEST, manifest.encode(), None)
        except FileExistsError:
            raise Refused(
                f"{out} was finished by another process meanwhile; this result is dropped"
            ) from None
        named = {file["path"] for file in json.loads(manifest)["files"]} | {MANIFEST}
        ours = {
            name.split("/")[0] for name in named if "/" in name
        }  # a neighbour may lie below the same prefix
        names = [entry.name for entry in draft.store.list_objects() if entry.name not in named]
        draft.store.delete(n for n in names if n.startswith(".") or n.split("/")[0] in ours)
        shutil.rmtree(draft.path)
        return
    write_text(draft.path / MANIFEST, manifest)
    target = local_path(out).absolute()
    draft.path.replace(target)
    for hidden in target.glob(".*"):
        shutil.rmtree(hidden) if hidden.is_dir() else hidden.unlink(missing_ok=True)


class Stopwatch:
    """Seconds spent, over several starts if it has a place to remember them."""

    def __init__(self, memory: Store | None) -> None:
        self.memory, self.before = memory, 0.0
        if memory:
            with suppress(FileNotFoundError):
                self.before = float(memory.read(SECONDS))
        self.start = time.monotonic()

    def read(self) -> float:
        return self.before + time.monotonic() - self.start

    def stop(self) -> None:
        if self.memory:
            with suppress(OSError):  # on a full disk only the time is lost, not the reason for stopping
                self.memory.write(SECONDS, str(self.read()).encode())


def package_versions() -> dict[str, str]:
    return {name: version(name) for name in ("dmd2", "torch", "numpy", "pillow", "clean-fid", "webdataset")}


def _list_files(draft: Draft) -> list[ArtifactFile]:
    """All files, but the hidden ones, and the manifest of one that was killed before it could publish."""
    files = {file.path: file for file in (*draft.delivered, *draft.given.values())}
    for name, size, _ in LocalStore(draft.path).list_objects():
        if name not in (*files, MANIFEST) and not any(part.startswith(".") for part in name.split("/")):
            files[name] = ArtifactFile(path=name, size=size, sha256=sha256(draft.path / name))
    return [files[name] for name in sorted(files)]


def _clear(folder: Path) -> None:
    """Drop what a killed process left."""
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != ".lock":
            path.unlink()


def _check_same_start(store: Store, kind: str, config: Config | None, inputs: dict[str, str]) -> None:
    """Remember what an unfinished folder was begun with; refuse to go on with something else."""
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
