"""The zip or folder of EDM's dataset tool."""

from __future__ import annotations

import json
import os
from functools import partial

from dmd2.data.archives import (
    is_hidden,
    open_zip,
    read_zip_member,
    refuse_broken,
)
from dmd2.data.decode import IMAGE_SUFFIXES
from dmd2.data.listing import Listing, find_one
from dmd2.data.sources import (
    ListedImage,
    Source,
    source_of_listing,
)
from dmd2.errors import Refused

PATTERN_EDM = r"dataset\.json|[^/]*\.zip"


def edm(listing: Listing) -> Source:
    """The zip or folder of EDM's dataset tool (Karras et al. 2022): images, and labels in dataset.json."""
    name = find_one(listing, PATTERN_EDM, "dataset.json or zip file")
    read, names = listing.store.read, [entry.name for entry in listing.entries]
    uri = listing.store.uri
    if name.endswith(".zip"):
        uri = listing.uri(name)
        read = partial(read_zip_member, uri)
        names = [n for n in open_zip(uri, os.getpid()).namelist() if not is_hidden(n)]
    if "dataset.json" not in names:
        raise Refused(
            f"{uri} has no dataset.json; make it with EDM's dataset_tool.py, or choose another layout"
        )
    with refuse_broken(f"{uri}/dataset.json", "list of labels", ValueError, KeyError, TypeError):
        pairs = json.loads(read("dataset.json"))["labels"] or []
        labels = {str(file): label for file, label in pairs}
    images = sorted(n for n in names if n.lower().endswith(IMAGE_SUFFIXES))
    if lost := set(labels) - set(images):
        raise Refused(f"{uri}/dataset.json has a label for {min(lost)}, which is not there; make it again")
    return source_of_listing(listing, [ListedImage(n, labels.get(n), "") for n in images], read, uri)
