"""The list of an artifact's shards: in its manifest, or, if they are many, in index files that the manifest lists instead of them.

A manifest of 1,000,000 shards would have 300 MB, and reading it would take gigabytes of memory. An index file has the
entries of `SHARDS_PER_INDEX` shards; readers go through one after the other and keep about 100 bytes of each shard. The
manifest has the digests of the index files and these have those of the shards, so the digest of the artifact covers all.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from dmd2.io.artifact import ArtifactFile, Manifest, open_artifact
from dmd2.io.staging import Draft

SHARDS_PER_INDEX = 10_000
"""More shards than these are listed in index files of so many each."""
DIGEST_BYTES = 32
SPLITS = TRAIN, HOLDOUT = "train", "holdout"


class ShardInfo(BaseModel):
    """One tar file."""

    file: str
    split: str
    images: int = 0
    size: int = 0
    """Bytes."""
    sha256: str = ""
    crc32c: str = ""
    """Hexadecimal."""
    histogram: dict[int, int] = {}
    """Images by class."""


def register_shards(shards: Iterable[ShardInfo], draft: Draft) -> dict[str, Any]:
    """Add the shards, which are already in their final place, to the draft's files; return the facts of the manifest that list them."""
    rest = iter(shards)
    pieces = iter(lambda: list(itertools.islice(rest, SHARDS_PER_INDEX)), [])
    first, second = next(pieces, []), next(pieces, [])
    if second:
        return {
            "shard_index": [
                _write_piece(n, piece, draft)
                for n, piece in enumerate(itertools.chain((first, second), pieces))
            ]
        }
    draft.stored_files += [ArtifactFile(path=s.file, size=s.size, sha256=s.sha256) for s in first]
    return {"shards": [shard.model_dump(exclude={"size", "sha256"}) for shard in first]}


def _write_piece(number: int, shards: Sequence[ShardInfo], draft: Draft) -> str:
    """Write an index file; return its name."""
    name = f"index/{number:06d}.json"
    text = json.dumps([shard.model_dump() for shard in shards]).encode()
    draft.store.write(name, text)
    digest = hashlib.sha256(text).hexdigest()
    draft.stored_files.append(ArtifactFile(path=name, size=len(text), sha256=digest))
    draft.indexed_files.update(shard.file for shard in shards)
    return name


class ShardTable:
    """The files of the shards of a split that have images, and their numbers of images."""

    def __init__(self, folder: str | Path, manifest: Manifest, split: str) -> None:
        self.counts = array("q")
        self._sizes, self._digests, self._names, self._ends = array("q"), bytearray(), bytearray(), array("q")
        for piece in _pieces(folder, manifest):
            for shard in piece:
                if shard["split"] == split and shard["images"]:
                    self._append(shard)

    def _append(self, shard: dict[str, Any]) -> None:
        self.counts.append(shard["images"])
        self._sizes.append(shard["size"])
        self._digests += bytes.fromhex(shard["sha256"])
        self._names += shard["file"].encode()
        self._ends.append(len(self._names))

    def __len__(self) -> int:
        return len(self.counts)

    def __getitem__(self, index: int) -> ArtifactFile:
        if not 0 <= index < len(self):
            raise IndexError(index)
        name = self._names[self._ends[index - 1] if index else 0 : self._ends[index]]
        digest = self._digests[index * DIGEST_BYTES : (index + 1) * DIGEST_BYTES]
        return ArtifactFile(path=name.decode(), size=self._sizes[index], sha256=digest.hex())


def _pieces(folder: str | Path, manifest: Manifest) -> Iterator[list[dict[str, Any]]]:
    """The entries of all shards, with size and sha256, some at a time."""
    if "shard_index" not in manifest.facts:
        listed = {file.path: {"size": file.size, "sha256": file.sha256} for file in manifest.files}
        yield [shard | listed[shard["file"]] for shard in manifest.facts["shards"]]
        return
    path = open_artifact(folder, manifest, "index/*")
    for name in manifest.facts["shard_index"]:
        yield json.loads((path / name).read_bytes())
