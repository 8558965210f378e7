"""The output file of a stage that writes a file instead of a folder."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dmd2.io.storage import open_store


@contextmanager
def local_output(out: str) -> Iterator[Path]:
    """Yield a local path to write to; when the block ends, upload the file if `out` is on a bucket."""
    if path := open_store(out).local_folder:
        yield path
        return
    folder, _, name = out.rpartition("/")
    with tempfile.TemporaryDirectory() as scratch:
        yield Path(scratch) / name
        open_store(folder).upload(Path(scratch) / name, name)
