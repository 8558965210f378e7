"""A stage's single output file, local or on a bucket."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dmd2.io.storage import at, is_local, local


@contextmanager
def delivered(out: str) -> Iterator[Path]:
    """A local path for a file that ends up at `out`, wherever that is."""
    if is_local(out):
        yield local(out)
        return
    folder, _, name = out.rpartition("/")
    with tempfile.TemporaryDirectory() as place:
        yield Path(place) / name
        at(folder).put(Path(place) / name, name)
