"""The folder of a run, which receives everything its stages make."""

from __future__ import annotations

from dmd2.errors import Refused
from dmd2.io.storage import is_remote, join_uri


def run_folder(root: str, run: str, artifact: str) -> str:
    """`root`, or without one the folder `dmd2` beside the KFP artifacts of the run.

    Args:
        root: Folder given by the user, or empty.
        run: KFP id of the run, which is part of the address of all its artifacts.
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
