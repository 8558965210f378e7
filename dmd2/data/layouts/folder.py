"""A folder of images, with one sub-folder per class."""

from __future__ import annotations

from dmd2.data.listing import Listing
from dmd2.data.sources import (
    ListedImage,
    Source,
    source_of_listing,
)
from dmd2.errors import Refused


def folder(listing: Listing) -> Source:
    """Images; the first sub-folder is the class. Without sub-folders there is a single class."""
    rows = [ListedImage(e.name, e.name.split("/")[0] if "/" in e.name else None, "") for e in listing.entries]
    stray = [row.name for row in rows if row.label is None]
    if stray and len(stray) < len(rows):
        raise Refused(
            f"{listing.uri(stray[0])} lies beside the class folders of {listing.store.uri}; put it into one of them or remove it"
        )
    return source_of_listing(listing, rows, listing.store.read)
