"""Sets of images that do not depend on the student, kept for later evaluations: those of the teacher, and real images.

What was measured of such a set is an artifact of kind `scores`, in a folder named by the digest of all that decides it: teacher or
shards, sampler, steps, guidance, prompts, seed, precision, and the weights of the networks that measure. So a teacher is sampled
once for all of its students, and a metric that reads the same measurements is computed without sampling.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dmd2.errors import Refused
from dmd2.evaluation.blocks import MeasuredBlocks
from dmd2.io.artifact import MANIFEST, open_artifact, read_manifest
from dmd2.io.local import LocalStore, json_digest
from dmd2.io.staging import draft_artifact
from dmd2.io.storage import join_uri, open_store

logger = logging.getLogger(__name__)
BLOCKS, PICTURE = "blocks", "picture.png"


@dataclass(frozen=True)
class KeptScores:
    """A folder, local or on a bucket, with one artifact for each set of images."""

    uri: str
    """Empty: nothing is kept, and nothing found."""

    def find(self, pins: Mapping[str, Any]) -> Path | None:
        """A local folder with the files of the set that these values decide; None if it is not there."""
        folder = self._folder(pins)
        if not self.uri or open_store(folder).version(MANIFEST) is None:
            return None
        return open_artifact(folder, read_manifest(folder, "scores"))

    def keep(
        self, pins: Mapping[str, Any], blocks: MeasuredBlocks, facts: dict[str, Any], picture: Path | None
    ) -> None:
        """Publish a set whose blocks are complete, unless another evaluation is doing it."""
        try:
            with draft_artifact(self._folder(pins), "scores", None, inputs_of(pins)) as draft:
                draft.facts |= {"card": dict(pins)} | facts
                target = MeasuredBlocks(LocalStore(draft.path), BLOCKS, blocks.prompts, blocks.size)
                for rows in blocks.rows():
                    target.write(rows, blocks.read(rows))
                if picture:
                    (draft.path / PICTURE).write_bytes(picture.read_bytes())
        except Refused as error:
            logger.info("the scores are not kept in %s: %s", self.uri, error)

    def _folder(self, pins: Mapping[str, Any]) -> str:
        return join_uri(self.uri, json_digest(pins)[:32])


def inputs_of(pins: Mapping[str, Any]) -> dict[str, str]:
    """The digests of the artifacts among the values that decide a set."""
    return {name: pins[name] for name in ("teacher", "shards", "reference") if name in pins}
