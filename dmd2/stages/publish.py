"""A package is copied to where models are kept."""

from __future__ import annotations

import shutil

from dmd2.errors import Refused
from dmd2.io.artifact import MANIFEST, Manifest, open_artifact, read_manifest
from dmd2.io.staging import draft_artifact
from dmd2.io.storage import open_store


def publish(package: str, out: str) -> Manifest:
    """Copy a package to where models are kept, its manifest last. What is published is never replaced.

    Args:
        package: Folder of the package.
        out: Folder to make, local or gs://.
    """
    made = read_manifest(package, "package")
    if open_store(out).generation(MANIFEST):
        there = read_manifest(out, "package")
        if there.digest != made.digest:
            raise Refused(
                f"{out} holds another package ({there.digest[:16]}, not {made.digest[:16]}); choose another --out"
            )
        return there
    with draft_artifact(out, "package", made.config, made.inputs) as draft:
        whole = open_artifact(package, made)
        for file in made.files:
            (draft.path / file.path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(whole / file.path, draft.path / file.path)
        draft.facts |= made.facts
    return read_manifest(out, "package")
