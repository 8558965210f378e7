"""Folders that explain themselves.

Every stage turns folders into one folder, local or on a bucket. A folder is there if and only if it has a
`manifest.json`, which is written last: kind, Config, digests of the inputs, every file with size and sha256, facts,
versions. The digest of a folder is that of its kind and files, so equal content has an equal digest wherever and
whenever it was made. A folder on a bucket is drafted on this machine, and read through a cache on it.
"""

from __future__ import annotations

import errno
import hashlib
import json
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from dmd2.config import Config
from dmd2.errors import Refused
from dmd2.io.local import replaced, sha256
from dmd2.io.storage import at, cache, is_local, join, local
from dmd2.io.store import Store

MANIFEST = "manifest.json"
READS: dict[str, tuple[str, ...]] = {
    "shards": ("seed", "family", "data"),
    "latents": ("encode",),
    "teacher": ("seed", "family", "loader.shuffle_block", "loader.lanes", "teach"),
    "pairs": ("seed", "family", "pairs"),
    "run": ("seed", "family", "loader.shuffle_block", "loader.lanes", "distill"),
    "evaluation": ("family", "evaluate"),
    "gate": ("gate",),
    "package": (),
}
"""The parts of the Config that decide what a folder of this kind holds; only these are compared."""
LIMITS = ("data.max_broken", "distill.best.inception.uri")
"""Decide only whether it is made at all."""


def plain(name: str) -> str:
    """A name that stays inside its folder, whoever wrote it; anything else is a ValueError."""
    if "\\" in name or any(part in ("", ".", "..") for part in name.split("/")):
        raise ValueError(f"{name!r} is no name of a file in a folder")
    return name


class File(BaseModel):
    """One file of a folder."""

    model_config = ConfigDict(frozen=True)
    path: Annotated[str, AfterValidator(plain)]
    """Relative to the folder, with forward slashes."""
    size: int
    """Bytes."""
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Manifest(BaseModel):
    """What a folder says about itself."""

    model_config = ConfigDict(frozen=True)
    kind: str
    """What the folder is: a key of `READS`."""
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


def read(folder: str | Path, *kinds: str) -> Manifest:
    """The manifest of a finished folder of one of these kinds."""
    kind = " or ".join(kinds)
    text = _manifest(folder)
    if text is None:
        raise Refused(
            f"{folder} has no manifest.json, so it does not exist or was never finished; "
            f"expected a {kind} folder (dmd2 --help lists which verb makes it)"
        )
    try:
        manifest = Manifest.model_validate_json(text)
    except ValidationError as error:
        raise Refused(
            f"{join(folder, MANIFEST)} is not a manifest of this version: {_first(error)}; remove the folder and make it again"
        ) from None
    if manifest.kind not in kinds:
        raise Refused(f"{folder} is a {manifest.kind} folder; a {kind} folder is needed here")
    return manifest


def point(folder: str | Path, kind: str, card: str | Path) -> dict[str, str]:
    """What a pipeline hands on instead of the folder: where it is and its digest; `card` gets the manifest."""
    manifest = read(folder, kind)
    Path(card).write_bytes(at(folder).read(MANIFEST))
    return {"uri": str(folder), "digest": manifest.digest}


def opened(folder: str | Path, manifest: Manifest, *patterns: str) -> Path:
    """A local folder with the files of the manifest (those that fit a pattern, if any is given), compared with it.
    From a bucket, they are copied into the cache first."""
    path = local(folder) if is_local(folder) else cache() / "folders" / manifest.digest
    store = at(folder)
    wanted = [file for file in manifest.files if any(fnmatch(file.path, p) for p in patterns or ("*",))]
    for file in wanted:
        if is_local(folder):
            check_file(path / file.path, file)
        elif not _intact(path / file.path, file):
            bring(store, file, path / file.path)
    return path


def bring(store: Store, file: File, path: Path) -> None:
    """Copy a file to a local path if it is what the manifest says."""
    with replaced(path) as draft:
        with suppress(FileNotFoundError):  # `check_file` says what is missing
            store.fetch(file.path, draft)
        check_file(draft, file, join(store.uri, file.path))


def _intact(path: Path, file: File) -> bool:
    return path.is_file() and path.stat().st_size == file.size and sha256(path) == file.sha256


def check_file(path: Path, file: File, name: str = "") -> None:
    """Refuse what is not as the manifest says; `name` is what to call it, if not by its path."""
    name = name or str(path)
    if not path.is_file():
        raise Refused(f"{name} is missing, though the manifest lists it; remove the folder and make it again")
    if (found := path.stat().st_size) != file.size:
        raise Refused(
            f"{name} has {found} bytes, its manifest says {file.size}: truncated or replaced; remove the folder and make it again"
        )
    if sha256(path) != file.sha256:
        raise Refused(
            f"{name} was changed after its manifest was written (sha256 differs); remove the folder and make it again"
        )


def finished(out: str | Path, kind: str, config: Config | None, inputs: dict[str, str]) -> Manifest | None:
    """The manifest of `out` if it is already the result of this very stage; an error if it is another one."""
    if _manifest(out) is None:
        return None
    there = read(out, kind)
    if there.inputs != inputs:
        raise Refused(f"{out} was made from other inputs; choose another --out or remove it")
    if change := _difference(kind, there.config, config):
        raise Refused(
            f"{out} was made with another configuration ({change}); choose another --out or remove it"
        )
    return there


def _manifest(folder: str | Path) -> bytes | None:
    try:
        return at(folder).read(MANIFEST)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR):
            return None
        raise


def _difference(kind: str, old: Config | None, new: Config | None) -> str:
    """`distill.steps: 100 -> 200`, for the first few fields that differ among those the kind depends on."""
    a, b = (_flat(c.model_dump(mode="json")) if c else {} for c in (old, new))
    read = [
        key
        for key in sorted(a.keys() | b.keys())
        if f"{key}.".startswith(tuple(f"{r}." for r in READS[kind]))
    ]
    changes = [
        f"{key}: {a.get(key)} -> {b.get(key)}"
        for key in read
        if a.get(key) != b.get(key) and key not in LIMITS
    ]
    return ", ".join(changes[:3]) + (f" and {len(changes) - 3} more" if len(changes) > 3 else "")


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _first(error: ValidationError) -> str:
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
