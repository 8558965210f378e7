"""The folder of a run, which receives everything its stages make."""

from __future__ import annotations

from urllib.parse import quote

from dmd2.errors import Refused
from dmd2.io.storage import is_remote, join_uri

BROWSER = "https://storage.cloud.google.com/"
"""Where a browser that is signed in at Google reads objects of a bucket."""


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


def progress_page(root: str, training: str) -> str:
    """Address of the page about a training, `first` or `run`, that is rewritten while it goes on."""
    return join_uri(root, f"progress-{training}.html")


def browser_link(uri: str) -> str:
    """An object on a Google bucket as a link in Markdown, any other address as it is."""
    scheme, _, path = uri.partition("://")
    return f"[{uri}]({BROWSER}{quote(path)})" if scheme == "gs" else f"`{uri}`"
