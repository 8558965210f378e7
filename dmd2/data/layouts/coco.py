"""Images and a JSON file of captions, as COCO has them."""

from __future__ import annotations

import json
import posixpath
from functools import partial

from dmd2.data.account import Account
from dmd2.data.archives import refuse_broken
from dmd2.data.captions import FURTHER, caption_of, decode_text
from dmd2.data.listing import Listing, find_one, same_name, with_siblings
from dmd2.data.sources import ListedImage, Source, optional_caption, source_of_listing
from dmd2.errors import Refused

PATTERN_COCO = r"(.*/)?captions[^/]*\.json"


def coco(listing: Listing) -> Source:
    """Images and a JSON file of captions; of several captions of an image, the one with the smallest id is used."""
    name = find_one(listing, PATTERN_COCO, "captions file (annotations/captions_*.json)")
    listing, name = with_siblings(listing, name)
    uri = listing.uri(name)
    with refuse_broken(uri, "captions file of COCO", ValueError, KeyError, TypeError, AttributeError):
        notes = json.loads(decode_text(listing.read(name), uri))
        captions: dict[int, str] = {}
        for note in sorted(notes["annotations"], key=lambda note: note["id"]):
            captions.setdefault(note["image_id"], note["caption"])
        wanted = [(str(image["file_name"]), captions.get(image["id"])) for image in notes["images"]]
        orphans = captions.keys() - {image["id"] for image in notes["images"]}
        further = len(notes["annotations"]) - len(captions)
    files: dict[str, list[str]] = {}
    for entry in listing.entries:
        files.setdefault(posixpath.basename(same_name(entry.name)), []).append(entry.name)
    rows: dict[str, ListedImage] = {}
    again = Account()
    for file, text in wanted:
        found, where = _match_file(file, files, uri), f"{uri}: {file}"
        read = partial(caption_of, text, where, again)
        caption = optional_caption(read, listing.wanted.captions, where, again)
        if found in rows:
            again.remark("further entries of an image, of which the first with a caption is used", where)
        if found not in rows or not rows[found].text:
            rows[found] = ListedImage(found, text=caption)
    account = listing.account({name: "lists of captions"}, rows)
    account.add(again)
    account.remark("captions of images that the list does not have", uri, len(orphans))
    account.remark(FURTHER, uri, further)
    return source_of_listing(listing, sorted(rows.values(), key=lambda row: row.name), account)


def _match_file(file: str, files: dict[str, list[str]], where: str) -> str:
    """The name of the image that an entry of a captions file refers to."""
    named = same_name(file)
    same = files.get(posixpath.basename(named), [])
    found = [name for name in same if f"/{same_name(name)}".endswith(f"/{named}")]
    if len(found) != 1:
        state = "is not there" if not found else f"is there {len(found)} times"
        raise Refused(
            f"{where} names {file}, which {state}; keep the folder of exactly those images beside it"
        )
    return found[0]
