"""A stage's single output file, local or on a bucket."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dmd2.io.storage import is_local, local_path, open_store


@contextmanager
def delivered(out: str) -> Iterator[Path]:
    """A local path for a file that ends up at `out`, wherever that is."""
    if is_local(out):
        yield local_path(out)
        return
    folder, _, name = out.rpartition("/")
    with tempfile.TemporaryDirectory() as place:
        yield Path(place) / name
        open_store(folder).put(Path(place) / name, name)
