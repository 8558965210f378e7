"""Artifacts: folders with a manifest, local or on a bucket.

Every stage reads artifacts and makes one. An artifact exists if and only if it has a `manifest.json`, which is written
last and names the kind, the Config, the digests of the inputs, every file with size and sha256, results and versions. It ends with a
sha256 of itself, so that a manifest that was edited is refused by whoever reads it.
The digest of an artifact is computed from its kind and files, so equal content has an equal digest wherever and whenever it was made. The
content of an evaluation and of a decision is in the manifest, so their digests cover facts and inputs as well.
Reading is here; making is in `dmd2.io.staging`.
"""

from __future__ import annotations

import errno
import functools
import json
import logging
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, NonNegativeInt, ValidationError

from dmd2.config import Config
from dmd2.errors import Refused
from dmd2.io.local import atomic_write, json_digest, sha256
from dmd2.io.storage import cache, join_uri, open_store
from dmd2.io.store import Store
from dmd2.log import UNPRINTABLE

logger = logging.getLogger(__name__)

MIRRORED_TEACHER = "teacher"
"""Folder of the teacher in that of a mirror (`dmd2 mirror`)."""
MANIFEST = "manifest.json"
"""Written last: an artifact exists if and only if its manifest does."""
RELEVANT_FIELDS: dict[str, tuple[str, ...]] = {
    "shards": ("seed", "family", "data"),
    "latents": ("encode",),
    "teacher": ("seed", "family", "loader.shuffle_block", "loader.lanes", "teach"),
    "pairs": ("seed", "family", "pairs"),
    "run": ("seed", "family", "loader.shuffle_block", "loader.lanes", "distill"),
    "scores": (),
    "curve": ("seed", "family", "distill", "evaluate"),
    "evaluation": ("family", "evaluate"),
    "gate": ("gate",),
    "package": (),
}
"""kind -> prefixes of the Config fields that decide the content of an artifact. Only these are compared."""
CONTENT_IN_FACTS = ("evaluation", "scores", "gate")
"""Kinds whose content is in the facts of the manifest: their digests cover facts and inputs."""
IGNORED_FIELDS = ("data.max_broken", "distill.best.inception.uri", "evaluate.protocol")
"""Fields below those prefixes that do not change the content."""


def check_file_name(name: str) -> str:
    """Return the name of a file in a folder.

    Raises:
        ValueError: It would lead out of the folder, is no relative name with forward slashes, or has control characters.
    """
    parts = name.split("/")
    if "\\" in name or any(part in ("", ".", "..") or len(part.encode()) > MAX_NAME for part in parts):
        raise ValueError(f"{name[:80]!r} is no name of a file in a folder")
    if UNPRINTABLE.search(name) or "\n" in name or "\t" in name:
        raise ValueError(f"{name[:80]!r} has control characters, which no file of an artifact has")
    return name


MAX_NAME = 255
"""Bytes of one component of a path."""


class ArtifactFile(BaseModel):
    """One file of an artifact."""

    model_config = ConfigDict(frozen=True)
    path: Annotated[str, AfterValidator(check_file_name)]
    """Relative to the folder, with forward slashes."""
    size: NonNegativeInt
    """Bytes."""
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Manifest(BaseModel):
    """The content of `manifest.json`."""

    model_config = ConfigDict(frozen=True)
    kind: str
    """A key of `RELEVANT_FIELDS`."""
    config: Config | None
    """The Config that the stage was given."""
    inputs: dict[str, str]
    """name -> digest of an input."""
    files: list[ArtifactFile]
    facts: dict[str, Any]
    """Results of the stage: counts, scores, decisions."""
    versions: dict[str, str]
    """package -> version."""
    seconds: float
    """Wall-clock time of the stage over all its starts, in seconds."""
    seal: str = ""
    """sha256 of everything else in the file; empty in a manifest of version 0.1.0."""

    @property
    def digest(self) -> str:
        content: list[Any] = [self.kind, [file.model_dump() for file in self.files]]
        if self.seal and self.kind in CONTENT_IN_FACTS:
            content += [self.inputs, self.facts]
        return json_digest(content)


def sealed_text(manifest: Manifest) -> str:
    """The content of `manifest.json`."""
    seal = _seal(manifest.model_dump_json())
    return manifest.model_copy(update={"seal": seal}).model_dump_json(indent=1)


def _seal(text: str | bytes) -> str:
    """The seal that belongs to the text of a manifest."""
    content = json.loads(text)
    content.pop("seal", None)
    return json_digest(content)


def read_manifest(folder: str | Path, *kinds: str) -> Manifest:
    """The manifest of an artifact.

    Raises:
        Refused: It has no readable manifest, or one that was edited, or is not of one of these kinds.
    """
    kind = " or ".join(kinds)
    text = _read_manifest_bytes(folder)
    if text is None:
        raise Refused(
            f"{folder} has no manifest.json, so it does not exist or was never finished; "
            f"expected a {kind} folder (dmd2 --help lists which verb makes it)"
        )
    try:
        manifest = Manifest.model_validate_json(text)
    except ValidationError as error:
        raise Refused(
            f"{join_uri(folder, MANIFEST)} is not a manifest of this version: {_first_error(error)}; remove the folder and make it again"
        ) from None
    if manifest.kind not in kinds:
        raise Refused(f"{folder} is a {manifest.kind} folder; a {kind} folder is needed here")
    if not manifest.seal:
        _warn_unsealed(join_uri(folder, MANIFEST))
    elif manifest.seal != _seal(text):
        raise Refused(
            f"{join_uri(folder, MANIFEST)} was changed after it was written (its seal, a sha256, differs); remove the folder and make it again"
        )
    return manifest


@functools.cache
def _warn_unsealed(name: str) -> None:
    """Once per manifest."""
    logger.warning(
        "%s is of a version that did not seal manifests, so it cannot be told whether it was changed", name
    )


def write_pointer(folder: str | Path, kind: str, path: str | Path) -> dict[str, str]:
    """Copy the manifest to `path`, and return the address and digest of the artifact: what a pipeline passes between its
    steps instead of the files."""
    manifest = read_manifest(folder, kind)
    Path(path).write_bytes(open_store(folder).read(MANIFEST))
    return {"uri": str(folder), "digest": manifest.digest}


def write_part(made: Manifest, path: str | Path) -> dict[str, str]:
    """Write what a part of an artifact has made to `path`, and return which part it is: there is nothing to point to before all
    parts are put together."""
    Path(path).write_text(made.model_dump_json())
    return {"part": made.facts["part"]}


def open_artifact(folder: str | Path, manifest: Manifest, *patterns: str) -> Path:
    """A local folder with the files of an artifact, of which size and sha256 are checked. Remote files are downloaded into
    the cache, once.

    Args:
        patterns: As of `fnmatch`: only files that match one of them. Without any, all files.

    Raises:
        Refused: A file is missing or differs from the manifest.
    """
    store = open_store(folder)
    path = store.local_folder or cache() / "folders" / manifest.digest
    wanted = [file for file in manifest.files if any(fnmatch(file.path, p) for p in patterns or ("*",))]
    for file in wanted:
        if store.local_folder:
            check_file(path / file.path, file)
        elif not _is_intact(path / file.path, file):
            copy_verified(store, file, path / file.path)
    return path


def copy_verified(store: Store, file: ArtifactFile, path: Path) -> None:
    """Download a file of an artifact to a local path; refused if it differs from the manifest."""
    with atomic_write(path) as draft:
        with suppress(FileNotFoundError):  # check_file raises the error
            store.download(file.path, draft)
        check_file(draft, file, join_uri(store.uri, file.path))


def _is_intact(path: Path, file: ArtifactFile) -> bool:
    return path.is_file() and path.stat().st_size == file.size and sha256(path) == file.sha256


def check_file(path: Path, file: ArtifactFile, name: str = "") -> None:
    """Compare a local file with the manifest.

    Args:
        name: The name of the file in errors, if that is not its path.

    Raises:
        Refused: It is missing, or its size or sha256 differs.
    """
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


def find_finished(
    out: str | Path, kind: str, config: Config | None, inputs: dict[str, str]
) -> Manifest | None:
    """The manifest of `out` if the stage has already made it from the same Config and inputs; None if there is none.

    Raises:
        Refused: The artifact was made from another Config or other inputs.
    """
    if _read_manifest_bytes(out) is None:
        return None
    found = read_manifest(out, kind)
    if found.inputs != inputs:
        names = ", ".join(
            name for name in found.inputs | inputs if found.inputs.get(name) != inputs.get(name)
        )
        raise Refused(f"{out} was made from other inputs ({names}); choose another --out or remove it")
    if change := config_difference(kind, found.config, config):
        raise Refused(
            f"{out} was made with another configuration ({change}); choose another --out or remove it"
        )
    return found


def _read_manifest_bytes(folder: str | Path) -> bytes | None:
    try:
        return open_store(folder).read(MANIFEST)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR):
            return None
        raise


def config_difference(kind: str, old: Config | None, new: Config | None) -> str:
    """The first three relevant fields that differ, as `distill.steps: 100 -> 200`; empty if none does."""
    a, b = (_flat(c.model_dump(mode="json")) if c else {} for c in (old, new))
    relevant = [
        key
        for key in sorted(a.keys() | b.keys())
        if f"{key}.".startswith(tuple(f"{r}." for r in RELEVANT_FIELDS[kind]))
    ]
    changes = [
        f"{key}: {a.get(key)} -> {b.get(key)}"
        for key in relevant
        if a.get(key) != b.get(key) and key not in IGNORED_FIELDS
    ]
    return ", ".join(changes[:3]) + (f" and {len(changes) - 3} more" if len(changes) > 3 else "")


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _first_error(error: ValidationError) -> str:
    first = error.errors()[0]
    return ": ".join(part for part in (".".join(map(str, first["loc"])), first["msg"]) if part)
