"""A package is copied to where models are kept.

Files are only created there, never replaced or deleted, so that the account of a pipeline's steps needs no right to do
so. An interrupted copy is completed by the same command: what is there is compared by digest, the manifest comes last.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from dmd2.errors import Refused
from dmd2.io.artifact import MANIFEST, ArtifactFile, Manifest, open_artifact, read_manifest
from dmd2.io.local import sha256
from dmd2.io.storage import open_store
from dmd2.io.store import CONCURRENT_REQUESTS, Store


def publish(package: str, out: str) -> Manifest:
    """Copy a package to where models are kept, its manifest last. A published package is never replaced.

    Args:
        package: Folder of the package.
        out: Folder to copy it to, local or gs://.
    """
    manifest, target = read_manifest(package, "package"), open_store(out)
    if not target.version(MANIFEST):
        _check_names(manifest, target)
        _copy_files(open_artifact(package, manifest), manifest, target)
        _copy_manifest(open_store(package), target)
    published = read_manifest(out, "package")
    if published.digest != manifest.digest:
        raise Refused(
            f"{out} holds another package ({published.digest[:16]}, not {manifest.digest[:16]}); choose another --out"
        )
    return published


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
