"""A package is copied to where models are kept."""

from __future__ import annotations

import shutil

from dmd2.errors import Refused
from dmd2.io.artifact import MANIFEST, Manifest, open_artifact, read_manifest
from dmd2.io.staging import draft_artifact
from dmd2.io.storage import open_store


def publish(package: str, out: str) -> Manifest:
    """Copy a package to where models are kept, its manifest last. A published package is never replaced.

    Args:
        package: Folder of the package.
        out: Folder to copy it to, local or gs://.
    """
    manifest = read_manifest(package, "package")
    if open_store(out).version(MANIFEST):
        published = read_manifest(out, "package")
        if published.digest != manifest.digest:
            raise Refused(
                f"{out} holds another package ({published.digest[:16]}, not {manifest.digest[:16]}); choose another --out"
            )
        return published
    with draft_artifact(out, "package", manifest.config, manifest.inputs) as draft:
        folder = open_artifact(package, manifest)
        for file in manifest.files:
            (draft.path / file.path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / file.path, draft.path / file.path)
        draft.facts |= manifest.facts
    return read_manifest(out, "package")
