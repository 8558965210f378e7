"""A folder of images with a metadata.jsonl, as Hugging Face's imagefolder has it."""

from __future__ import annotations

import json
import posixpath

from dmd2.data.archives import (
    refuse_broken,
)
from dmd2.data.captions import TEXT
from dmd2.data.decode import IMAGE_SUFFIXES
from dmd2.data.listing import Listing, find_one, with_siblings
from dmd2.data.sources import (
    ListedImage,
    Source,
    check_caption,
    source_of_listing,
)
from dmd2.errors import Refused

PATTERN_METADATA = r"(.*/)?metadata\.jsonl"


def metadata(listing: Listing) -> Source:
    """Images and a metadata.jsonl beside them: file_name, text or caption, label."""
    listing, name = with_siblings(listing, find_one(listing, PATTERN_METADATA, "metadata.jsonl"))
    uri, below = listing.uri(name), posixpath.dirname(name)
    there = {entry.name for entry in listing.entries}
    rows = []
    with refuse_broken(
        uri, "JSON Lines file with a file_name per line", ValueError, KeyError, TypeError, AttributeError
    ):
        lines = [json.loads(line) for line in listing.store.read(name).splitlines() if line.strip()]
        for line in lines:
            file = posixpath.join(below, line["file_name"])
            if file not in there:
                raise Refused(f"{uri} names {file}, which is not there; add the image or drop its line")
            text = next((line[key] for key in TEXT if line.get(key) is not None), "")
            rows.append(ListedImage(file, line.get("label"), check_caption(text, f"{uri}: {file}")))
    extra = {n for n in there if n.lower().endswith(IMAGE_SUFFIXES)} - {row.name for row in rows}
    if extra:
        raise Refused(f"{uri} has no line for {min(extra)}; add one or remove the image")
    return source_of_listing(listing, rows, listing.store.read)
