"""`python -c THIS EXECUTOR_INPUT COMMAND ...`: what KFP's launcher, a Go program that is not here, does around the command of a step.

Input artifacts are brought from the bucket to where KFP's executor looks for them, /gcs/BUCKET/PATH; then the command runs; then its
outputs are taken to the bucket, with what the executor says of them.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dmd2.io.storage import open_store

OUTPUT = "output_metadata.json"


def main(given: dict[str, Any], command: list[str]) -> int:
    """Run the command -> its exit status."""
    for uri, path in _files(given["inputs"]):
        folder, _, name = uri.rpartition("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        open_store(folder).download(name, path)
    if status := subprocess.run(command).returncode:
        return status
    for uri, path in _files(given["outputs"]):
        folder, _, name = uri.rpartition("/")
        if path.exists():
            open_store(folder).upload(path, name)
    output = Path(given["outputs"]["outputFile"])
    open_store(given["outputs"]["folder"]).write(OUTPUT, output.read_bytes() if output.exists() else b"{}")
    return 0


def _files(side: dict[str, Any]) -> Iterator[tuple[str, Path]]:
    """(address, path) of the artifacts of one side."""
    for found in side["artifacts"].values():
        for one in found["artifacts"]:
            yield one["uri"], Path(one["uri"].replace("gs://", "/gcs/"))


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1]), sys.argv[2:]))
