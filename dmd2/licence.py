"""Under which terms weights and data may be used: as whoever packages them says, or as their own cards say.

What a card says travels from artifact to artifact, in the facts of their manifests, up to the model card of the student.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any, NamedTuple

from dmd2.errors import Refused, brief
from dmd2.io.artifact import Manifest
from dmd2.io.hub import HUB_NAME
from dmd2.io.storage import fetch_file, open_store

logger = logging.getLogger(__name__)
CARD = "README.md"
"""File with the card of a model or data set; its YAML header names the licence, as the Hugging Face Hub wants it."""
MAX_CARD = 2**20
"""Bytes of the largest card that is read."""
IDENTIFIER = re.compile(r"[a-z0-9][a-z0-9.+-]{0,62}")
"""A licence as the Hub spells it."""
LINK = re.compile(r"https?://[^\s<>()]+")
LICENCES = "licenses"
"""Key in the facts of a manifest: {`teacher` or `data`: what its card says}."""


class Terms(NamedTuple):
    """Under which terms something may be used."""

    license: str = ""
    """Identifier of the Hugging Face Hub, such as openrail++; `other` for one without; empty = not said."""
    link: str = ""
    restrictions: str = ""
    """What users must not do, in Markdown."""
    name: str = ""
    """Of a licence without an identifier."""

    def check(self) -> None:
        """Raise Refused for what the Hub does not take."""
        if self.license and not IDENTIFIER.fullmatch(self.license):
            raise Refused(
                f"license is {self.license[:80]!r}; give an identifier of the Hugging Face Hub, such as openrail++ or apache-2.0, or other"
            )
        if self.link and not LINK.fullmatch(self.link):
            raise Refused(f"license-link is {self.link[:80]!r}; give an address that starts with https://")

    @property
    def sentence(self) -> str:
        """The licence in Markdown; empty if it is not known."""
        if self.license in ("", "other") and not (self.link or self.name):
            return ""
        return f"{self.name or f'`{self.license}`'}{', ' if self.link else ''}{self.link}"

    @property
    def title(self) -> str:
        """The licence in a word: its name, its identifier, or the address of its text; empty if it is not known."""
        return self.name or (self.license if self.license != "other" else "") or self.link


UNSTATED = Terms()


def terms_of_use(made: Manifest, said: Terms) -> tuple[Terms, Terms]:
    """(terms of a student, those of its data): what the user says of the student, or else what the teacher's card said."""
    teacher, data = (Terms(**made.facts.get(LICENCES, {}).get(of, {})) for of in ("teacher", "data"))
    if said.license or said.link:
        return said, data
    return teacher._replace(restrictions=said.restrictions), data


def stated_licence(of: str, source: str) -> dict[str, Any]:
    """What the card of a source says, as facts of the artifact that is made of it; empty if it says nothing.

    Args:
        of: `teacher` or `data`.
        source: A folder (local, gs://) with a README.md, a name on the Hugging Face Hub, or a .safetensors file whose metadata name
            the licence (modelspec.license).
    """
    found = _read_safetensors(source) if source.endswith(".safetensors") else _read_header(source)
    license, link, name = (_plain(found.get(key)) for key in ("license", "license_link", "license_name"))
    if not IDENTIFIER.fullmatch(license.lower()):
        license, name = "other" if license else "", name or license
    terms = Terms(license.lower(), _absolute(link, source), name=name)
    if not terms.sentence:
        return {}
    logger.info("%s: license %s", source, terms.sentence)
    return {LICENCES: {of: {key: value for key, value in terms._asdict().items() if value}}}


def carried_licences(*inputs: Manifest) -> dict[str, Any]:
    """The licences of the inputs of an artifact, as facts of its own; empty if none is known."""
    known = {of: terms for each in inputs for of, terms in each.facts.get(LICENCES, {}).items()}
    return {LICENCES: known} if known else {}


def _read_safetensors(source: str) -> dict[str, Any]:
    from safetensors import safe_open

    with safe_open(fetch_file(source), framework="np") as file:
        return {"license": (file.metadata() or {}).get("modelspec.license")}


def _read_header(source: str) -> dict[str, Any]:
    """The header of the card of a folder or repository; empty without one."""
    from huggingface_hub import metadata_load
    from yaml import YAMLError

    path = _fetch_card(source)
    if not path or not path.is_file() or path.stat().st_size > MAX_CARD:
        return {}
    try:
        return metadata_load(path) or {}
    except (ValueError, YAMLError) as error:
        logger.warning("%s of %s cannot be read (%s): its licence is not known", CARD, source, brief(error))
        return {}


def _fetch_card(source: str) -> Path | None:
    store = open_store(source)
    if not store.local_folder:
        return fetch_file(f"{source.rstrip('/')}/{CARD}") if store.version(CARD) else None
    if store.local_folder.exists() or not HUB_NAME.fullmatch(source):
        return store.local_folder / CARD
    from dmd2.encoders.pipeline_folder import fetch_files

    try:
        return fetch_files(source, [CARD]) / CARD
    except Refused as error:  # a copy in the cache has its networks, and perhaps no card
        logger.warning("%s: the licence is not known, because its card cannot be read (%s)", source, error)
        return None


def _plain(value: object) -> str:
    """Text from outside without what Markdown or HTML would interpret; empty for anything else."""
    return re.sub(r"[^\w .,:/+?=&%#~-]", "", value)[:200].strip() if isinstance(value, str) else ""


def _absolute(link: str, source: str) -> str:
    """The link, or the address on the hub of a file beside the card; empty for another one."""
    if not link or LINK.fullmatch(link):
        return link
    if not HUB_NAME.fullmatch(source) or Path(source).exists():
        return ""
    name, _, revision = source.partition("@")
    return f"https://huggingface.co/{name}/blob/{revision or 'main'}/{link}"
