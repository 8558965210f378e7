"""A package is copied to where models are kept: a folder, a bucket or the Hugging Face Hub, and noted in a Model Registry.

In a folder or bucket files are only created, never replaced or deleted, so that the account of a pipeline's steps needs no
right to do so. An interrupted copy is completed by the same command: what is there is compared by digest, the manifest comes
last. On the hub a package is one commit with a tag.
"""

from __future__ import annotations

import logging
import math
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from dmd2.errors import Refused
from dmd2.io.artifact import MANIFEST, ArtifactFile, Manifest, open_artifact, read_manifest
from dmd2.io.hub import HUB, commit_to_hub, read_from_hub
from dmd2.io.local import sha256
from dmd2.io.model_registry import ModelRegistry
from dmd2.io.storage import join_uri, open_store
from dmd2.io.store import CONCURRENT_REQUESTS, Store

logger = logging.getLogger(__name__)
SHOWN_DIGITS = 16
"""Digits of a digest in an address, a tag and a version."""


def publish(
    package: str, out: str, *, by_teacher: bool = False, registry: str = "", model: str = ""
) -> Manifest:
    """Copy a package to where models are kept, its manifest last. A published package is never replaced.

    Args:
        package: Folder of the package.
        out: Folder to copy it to, local or gs://; or hf://owner/name, a repository of the Hugging Face Hub, where the package gets a tag.
        by_teacher: `out` is the folder of all models, and the package goes to `<family>/<teacher>/<version>` in it: the first 16
            digits of the digests of teacher and package.
        registry: Address of a Kubeflow Model Registry to note it in, with its digest and scores; empty = none.
        model: Name of the model there; by default that of the recipe.
    """
    manifest = read_manifest(package, "package")
    if by_teacher:
        out = _place_by_teacher(package, manifest, out)
    catalogue = ModelRegistry(registry) if registry else None
    published = (_publish_on_hub if out.startswith(HUB) else _publish_in_folder)(package, manifest, out)
    if published.digest != manifest.digest:
        raise Refused(
            f"{out} holds another package ({published.digest[:16]}, not {manifest.digest[:16]}); choose another --out"
        )
    logger.info("published: %s (digest %s)", out, manifest.digest[:SHOWN_DIGITS])
    if catalogue:
        named = model or (manifest.config.recipe if manifest.config else "dmd2")
        uri = out if "://" in out else Path(out).resolve().as_uri()
        uri += f"@{manifest.digest[:SHOWN_DIGITS]}" if out.startswith(HUB) else ""
        catalogue.register(named, manifest.digest[:SHOWN_DIGITS], uri, _properties(manifest))
        logger.info("registered: %s, version %s in %s", named, manifest.digest[:SHOWN_DIGITS], registry)
    return published


def _place_by_teacher(package: str, manifest: Manifest, models: str) -> str:
    teacher = manifest.facts.get("scored", {}).get("teacher")
    if not teacher or not manifest.config:
        raise Refused(
            f"{package} does not say of which teacher it is: it is of an older version, package the run again"
        )
    if models.startswith(HUB):
        raise Refused("--by-teacher is for folders and buckets; on the hub each package has a tag")
    return join_uri(
        models, f"{manifest.config.family.kind}/{teacher[:SHOWN_DIGITS]}/{manifest.digest[:SHOWN_DIGITS]}"
    )


def _properties(manifest: Manifest) -> dict[str, str | float]:
    """What a catalogue says of a package: digests, recipe, and the scores of the student."""
    told: dict[str, str | float] = {
        "digest": manifest.digest,
        "recipe": str(manifest.facts.get("recipe", "")),
    }
    told |= manifest.inputs
    scores = {name: value for name, value in manifest.facts.items() if name.endswith("_student")}
    return told | {n: float(v) for n, v in scores.items() if isinstance(v, int | float) and math.isfinite(v)}


def _publish_on_hub(package: str, manifest: Manifest, address: str) -> Manifest:
    """The manifest under the tag of this package, which is made if it is not there."""
    tag = manifest.digest[:SHOWN_DIGITS]
    if (found := read_from_hub(address, tag, MANIFEST)) is None:
        folder = open_artifact(package, manifest)
        files: dict[str, Path | bytes] = {file.path: folder / file.path for file in manifest.files}
        files[MANIFEST] = found = open_store(package).read(MANIFEST)
        commit_to_hub(address, tag, files, f"Package {tag}")
    return Manifest.model_validate_json(found)


def _publish_in_folder(package: str, manifest: Manifest, out: str) -> Manifest:
    target = open_store(out)
    if not target.version(MANIFEST):
        _check_names(manifest, target)
        _copy_files(open_artifact(package, manifest), manifest, target)
        _copy_manifest(open_store(package), target)
    return read_manifest(out, "package")


def _check_names(manifest: Manifest, target: Store) -> None:
    """Only files of this package may be there, of a copy that was interrupted."""
    names = {info.name for info in target.list_objects()} - {
        MANIFEST,
        *(file.path for file in manifest.files),
    }
    if names:
        raise Refused(f"{target.uri} holds other things, {min(names)!r} for one; choose another --out")


def _copy_files(folder: Path, manifest: Manifest, target: Store) -> None:
    with ThreadPoolExecutor(CONCURRENT_REQUESTS) as pool:
        list(pool.map(lambda file: _create(folder / file.path, file, target), manifest.files))


def _create(path: Path, file: ArtifactFile, target: Store) -> None:
    """Create the file, or compare the one that is there."""
    try:
        target.create(path, file.path)
    except FileExistsError:
        if _digest(target, file.path) != file.sha256:
            raise Refused(
                f"{target.uri}/{file.path} is there with another content, and nothing is replaced; choose another --out"
            ) from None


def _digest(target: Store, name: str) -> str:
    with TemporaryDirectory() as folder:
        target.download(name, copy := Path(folder) / "copy")
        return sha256(copy)


def _copy_manifest(package: Store, target: Store) -> None:
    with TemporaryDirectory() as folder, suppress(FileExistsError):  # another process was faster
        package.download(MANIFEST, copy := Path(folder) / MANIFEST)
        target.create(copy, MANIFEST)
