"""Folders that explain themselves.

Every stage turns folders into one folder. A folder is there if and only if it has a `manifest.json`, which is
written last: kind, Config, digests of the inputs, every file with size and sha256, facts, versions. The digest
of a folder is that of its kind and files, so equal content has an equal digest wherever and whenever it was made.
Only local paths for now; `local()` is the one place where another scheme will be understood.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

from pydantic import BaseModel, ConfigDict, ValidationError

from dmd2.config import Config
from dmd2.errors import Refused

MANIFEST = "manifest.json"


class File(BaseModel):
    """One file of a folder."""

    model_config = ConfigDict(frozen=True)
    path: str
    """Relative to the folder, with forward slashes."""
    size: int
    """Bytes."""
    sha256: str


class Manifest(BaseModel):
    """What a folder says about itself."""

    model_config = ConfigDict(frozen=True)
    kind: str
    """What the folder is: shards, teacher, run, evaluation, gate, package, report."""
    config: Config | None
    """The Config it was made with."""
    inputs: dict[str, str]
    """Digest of each input folder, by name."""
    files: list[File]
    facts: dict[str, Any]
    """What the stage found out: counts, scores, the outcome."""
    versions: dict[str, str]
    seconds: float
    """Wall-clock time of the stage, in seconds, interruptions left out."""

    @property
    def digest(self) -> str:
        files = [file.model_dump() for file in self.files]
        return hashlib.sha256(json.dumps([self.kind, files], sort_keys=True).encode()).hexdigest()


@dataclass
class Draft:
    """A folder while it is being made."""

    path: Path
    facts: dict[str, Any] = field(default_factory=dict)


def local(uri: str | Path) -> Path:
    """The local path that a URI names."""
    scheme, separator, rest = str(uri).partition("://")
    if separator and scheme != "file":
        raise Refused(f"{uri}: storage of scheme {scheme!r} is not supported; give a local path")
    return Path(rest if separator else str(uri)).expanduser()


def read(folder: str | Path, kind: str) -> Manifest:
    """The manifest of a finished folder of that kind."""
    path = local(folder) / MANIFEST
    if not path.is_file():
        state = "has no manifest.json, so it was never finished" if path.parent.is_dir() else "does not exist"
        raise Refused(f"{folder} {state}; expected a {kind} folder (dmd2 --help lists which verb makes it)")
    try:
        manifest = Manifest.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise Refused(
            f"{path} is not a manifest of this version: {_first(error)}; remove the folder and make it again"
        ) from None
    if manifest.kind != kind:
        raise Refused(f"{folder} is a {manifest.kind} folder; a {kind} folder is needed here")
    return manifest


def point(folder: str | Path, kind: str, card: str | Path) -> dict[str, str]:
    """What a pipeline hands on instead of the folder: where it is and its digest; `card` gets the manifest."""
    manifest = read(folder, kind)
    shutil.copyfile(local(folder) / MANIFEST, card)
    return {"uri": str(folder), "digest": manifest.digest}


def check(folder: str | Path, manifest: Manifest) -> None:
    """Compare every file with the manifest."""
    for file in manifest.files:
        check_file(local(folder) / file.path, file)


def check_file(path: Path, file: File) -> None:
    if not path.is_file():
        raise Refused(f"{path} is missing, though the manifest lists it; remove the folder and make it again")
    if path.stat().st_size != file.size:
        found = path.stat().st_size
        raise Refused(
            f"{path} has {found} bytes, its manifest says {file.size}: truncated or replaced; remove the folder and make it again"
        )
    if sha256(path) != file.sha256:
        raise Refused(
            f"{path} was changed after its manifest was written (sha256 differs); remove the folder and make it again"
        )


def sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    draft = path.with_name(f".{path.name}.partial")
    draft.write_text(text)
    flush(draft)
    draft.replace(path)


def flush(path: Path) -> None:
    """Have the file on the disk before anything refers to it: a name may survive a lost node, its content not."""
    with path.open("rb") as stream:
        os.fsync(stream.fileno())


def finished(out: str | Path, kind: str, config: Config | None, inputs: dict[str, str]) -> Manifest | None:
    """The manifest of `out` if it is already the result of this very stage; an error if it is another one."""
    if not (local(out) / MANIFEST).is_file():
        return None
    there = read(out, kind)
    if there.inputs != inputs:
        raise Refused(f"{out} was made from other inputs; choose another --out or remove it")
    if there.config != config:
        raise Refused(
            f"{out} was made with another configuration ({_difference(there.config, config)}); choose another --out or remove it"
        )
    return there


@contextmanager
def drafted(
    out: str | Path, kind: str, config: Config | None, inputs: dict[str, str], *, resumable: bool = False
) -> Iterator[Draft]:
    """Make `out` in a hidden folder beside it, and give it its name once its manifest is written.

    A failure removes the hidden folder, unless it is `resumable` and holds a checkpoint: then the next call continues.
    """
    target = local(out).absolute()
    if (target.exists() and not target.is_dir()) or (target.is_dir() and any(target.iterdir())):
        raise Refused(
            f"{target} exists and is not a finished {kind} folder; choose another --out or remove it"
        )
    draft = Draft(target.with_name(f".{target.name}.partial"))
    draft.path.mkdir(parents=True, exist_ok=True)
    with _locked(draft.path):
        if resumable:
            _same_beginning(draft.path, config, inputs)
        else:
            _clear(draft.path)
        clock = Clock(draft.path / ".seconds" if resumable else None)
        try:
            yield draft
            manifest = Manifest(
                kind=kind,
                config=config,
                inputs=inputs,
                files=_files(draft.path),
                facts=draft.facts,
                versions=versions(),
                seconds=round(clock.read(), 2),
            )
            write(draft.path / MANIFEST, manifest.model_dump_json(indent=1))
            draft.path.replace(target)
        except BaseException:
            if resumable and any(draft.path.glob("checkpoints/[0-9]*")):
                clock.stop()
            else:
                shutil.rmtree(draft.path)
            raise
        for note in (".begun.json", ".seconds", ".lock"):
            (target / note).unlink(missing_ok=True)


class Clock:
    """Seconds spent, over several starts if it has a file to remember them in."""

    def __init__(self, memory: Path | None) -> None:
        self.memory = memory
        self.before = float(memory.read_text()) if memory and memory.is_file() else 0.0
        self.start = time.monotonic()

    def read(self) -> float:
        return self.before + time.monotonic() - self.start

    def stop(self) -> None:
        if self.memory:
            with suppress(OSError):  # on a full disk only the time is lost, not the reason for stopping
                write(self.memory, str(self.read()))


def versions() -> dict[str, str]:
    return {name: version(name) for name in ("dmd2", "torch", "numpy", "pillow", "clean-fid", "webdataset")}


def _files(folder: Path) -> list[File]:
    """All files below, but the hidden ones."""
    paths = sorted(
        p
        for p in folder.rglob("*")
        if p.is_file() and not any(part.startswith(".") for part in p.relative_to(folder).parts)
    )
    return [
        File(path=p.relative_to(folder).as_posix(), size=p.stat().st_size, sha256=sha256(p)) for p in paths
    ]


def _locked(folder: Path) -> IO[str]:
    """Hold the folder for this process, as long as the result is open; the kernel lets go if the process dies."""
    lock = (folder / ".lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise Refused(
            f"another process is working in {folder}; wait for it, or choose another --out"
        ) from None
    return lock


def _clear(folder: Path) -> None:
    """Drop what a killed process left."""
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != ".lock":
            path.unlink()


def _same_beginning(folder: Path, config: Config | None, inputs: dict[str, str]) -> None:
    """Remember what an unfinished folder was begun with; refuse to go on with something else."""
    path = folder / ".begun.json"
    begun = {"config": config.model_dump(mode="json") if config else None, "inputs": inputs}
    if not path.exists():
        write(path, json.dumps(begun))
    elif (old := json.loads(path.read_text())) != begun:
        if old["inputs"] != inputs:
            raise Refused(f"the unfinished {folder} was begun with other inputs; remove it to start anew")
        was = Config.model_validate(old["config"])
        raise Refused(
            f"the unfinished {folder} was begun with another configuration ({_difference(was, config)}); give the same one to continue, or remove it to start anew"
        )


def _difference(old: Config | None, new: Config | None) -> str:
    """`distill.steps: 100 -> 200`, for the first few fields that differ."""
    a, b = (_flat(c.model_dump(mode="json")) if c else {} for c in (old, new))
    changes = [f"{k}: {a.get(k)} -> {b.get(k)}" for k in sorted(a.keys() | b.keys()) if a.get(k) != b.get(k)]
    return ", ".join(changes[:3]) + (f" and {len(changes) - 3} more" if len(changes) > 3 else "")


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _first(error: ValidationError) -> str:
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
