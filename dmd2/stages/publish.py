"""A package is copied to where models are kept."""

from __future__ import annotations

import shutil

from dmd2.errors import Refused
from dmd2.io.artifact import MANIFEST, Manifest, opened, read
from dmd2.io.staging import drafted
from dmd2.io.storage import at


def publish(package: str, out: str) -> Manifest:
    """Copy a package to where models are kept, its manifest last. What is published is never replaced.

    Args:
        package: Folder of the package.
        out: Folder to make, local or gs://.
    """
    made = read(package, "package")
    if at(out).generation(MANIFEST):
        there = read(out, "package")
        if there.digest != made.digest:
            raise Refused(
                f"{out} holds another package ({there.digest[:16]}, not {made.digest[:16]}); choose another --out"
            )
        return there
    with drafted(out, "package", made.config, made.inputs) as draft:
        whole = opened(package, made)
        for file in made.files:
            (draft.path / file.path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(whole / file.path, draft.path / file.path)
        draft.facts |= made.facts
    return read(out, "package")
