"""Where a run lies."""

from __future__ import annotations

from dmd2.errors import Refused
from dmd2.io.storage import is_remote, join_uri


def place(root: str, run: str, artifact: str) -> str:
    """The folder of a run: the one that is given, or one among the artifacts that the platform keeps of it.

    Args:
        root: What the user gave; empty to choose.
        run: The platform's name of the run, which is part of the address of everything it keeps of it.
        artifact: Address of any artifact of the run.
    """
    if root:
        return root.rstrip("/")
    before, found, _ = artifact.partition(run)
    if not (run and found and is_remote(artifact)):
        raise Refused(
            f"root is empty, and the artifacts of this run lie at {artifact}, which is not an address on a bucket with the run in it; "
            "give a root, as gs://bucket/folder"
        )
    return join_uri(before + run, "dmd2")
