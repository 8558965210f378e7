"""The emoji as a source: 3,786 captioned pictures of 64x64 pixels, from the npm package `emoji-datasource-google`.

`python -m tests.emoji.source --out runs/emoji/source` makes a folder of PNGs with a `metadata.jsonl`, a layout that
`dmd2 shard` knows. The captions are the names of the characters, with their skin tones.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

import tyro

PACKAGE = "emoji-datasource-google@16.0.0"
PICTURES = "package/img/google/64/"
TONES = {
    "1F3FB": "light skin tone",
    "1F3FC": "medium-light skin tone",
    "1F3FD": "medium skin tone",
    "1F3FE": "medium-dark skin tone",
    "1F3FF": "dark skin tone",
}


def main(out: Path) -> None:
    """Fetch the emoji with npm.

    Args:
        out: Folder to make.
    """
    print(f"{len(list(source(out).glob('*.png')))} emoji in {out}")


def source(out: Path) -> Path:
    """The folder, made if it is not there."""
    if (out / "metadata.jsonl").is_file():
        return out
    shutil.rmtree(out, ignore_errors=True)  # of an earlier, interrupted call
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        draft = Path(scratch) / "source"
        draft.mkdir()
        subprocess.run(["npm", "pack", "--silent", PACKAGE, "--pack-destination", scratch], check=True)
        listing = _unpacked(next(Path(scratch).glob("*.tgz")), draft)
        lines = [
            {"file_name": name, "text": text} for name, text in captions(listing) if (draft / name).is_file()
        ]
        (draft / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        shutil.move(draft, out)
    return out


def _unpacked(package: Path, folder: Path) -> list[dict[str, object]]:
    """Pictures go to the folder; the listing is returned."""
    listing: list[dict[str, object]] = []
    with tarfile.open(package) as archive:
        for member in archive:
            wanted = member.name.startswith(PICTURES) or member.name == "package/emoji.json"
            content = archive.extractfile(member) if wanted and member.isfile() else None
            if content and member.name.startswith(PICTURES):
                (folder / Path(member.name).name).write_bytes(content.read())
            elif content:
                listing = json.load(content)
    return listing


def captions(listing: list[dict[str, object]]) -> Iterator[tuple[str, str]]:
    """(file, caption) of each emoji and of its variations."""
    for emoji in sorted(listing, key=lambda e: str(e["image"])):
        name = str(emoji["name"]).lower()
        yield str(emoji["image"]), name
        variations = emoji.get("skin_variations", {})
        assert isinstance(variations, dict)
        for tones, variation in sorted(variations.items()):
            told = dict.fromkeys(TONES[tone] for tone in tones.split("-"))
            yield variation["image"], f"{name}, {', '.join(told)}"


if __name__ == "__main__":
    tyro.cli(main)
