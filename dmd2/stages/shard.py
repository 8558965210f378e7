"""Images of a source become shards."""

from __future__ import annotations

import logging

from dmd2.config import Config
from dmd2.data.account import Account
from dmd2.errors import Refused
from dmd2.io.artifact import Manifest, find_finished, read_manifest
from dmd2.io.staging import draft_artifact
from dmd2.io.storage import open_store
from dmd2.licence import stated_licence
from dmd2.processors import usable_processors
from dmd2.stages.parts import parse_part, part_manifest

logger = logging.getLogger(__name__)


def shard(config: Config, source: str, out: str, workers: int = 0, part: str = "") -> Manifest:
    """Write the images of a source as shards, with some held out for evaluation.

    The bytes do not depend on the number of workers or parts. Interrupted, the same command continues. To share the work
    among machines, give each a part, `--part 0/4` to `--part 3/4`; then run the command once without `--part`, which
    publishes the folder from the parts.

    Args:
        source: `digits`, a folder of images with one sub-folder per class, or another layout (docs/data.md).
        out: Folder to write the shards to, local or gs://.
        workers: Number of processes; 0 = one per processor that this process, or its container, may use.
        part: `i/n`: only the i-th of n parts, counted from 0; empty = all.
    """
    from dmd2.data.layouts import LAYOUTS, open_source
    from dmd2.data.listing import Wanted
    from dmd2.data.shards import list_shards, summarize, write_shards
    from dmd2.data.units import needs_captions

    data, share = config.data, parse_part(part)
    by_class = config.family.prompts == "classes"
    images = open_source(
        source, Wanted(by_class, needs_captions(config), data.caption_column, data.label_column)
    )
    inputs = {"source": images.fingerprint}
    if done := find_finished(out, "shards", config, inputs):
        return done
    if part and config.data.format == "lmdb" and not open_store(out).local_folder:
        raise Refused(
            "a table on a bucket is made by one machine; leave out --part, or set --data.format tar"
        )
    workers = workers or usable_processors()
    with draft_artifact(out, "shards", config, inputs, resumable=True, part=bool(part)) as draft:
        results = write_shards(images, config, draft, workers, share)
        if part:
            return part_manifest("shards", config, inputs, {"part": part, "units": len(results)})
        draft.facts |= {"source": source} | summarize(images, results, config)
        draft.facts |= list_shards(results, config, draft)
        layout, _, address = source.partition(":")
        draft.facts |= stated_licence("data", address if layout in LAYOUTS else source)
    made = read_manifest(out, "shards")
    _log_account(made)
    return made


def _log_account(made: Manifest) -> None:
    """Log what became of the source; as a warning if images were unreadable or have no caption."""
    account = Account.model_validate(made.facts["account"])
    level = logging.WARNING if made.facts["unreadable"] or made.facts.get("without_caption") else logging.INFO
    logger.log(level, "%s: %s", made.facts["source"], "\n  ".join(account.lines()))
