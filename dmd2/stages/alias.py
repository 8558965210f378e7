"""Names of published models that move: `latest`, `candidate`. The models themselves never change.

A name is one small JSON file. It is moved by compare-and-swap, so of two who move it at a time one is refused, and it keeps
where it pointed before. It lies beside the models and not among them: whoever publishes can create there and change nothing.
"""

from __future__ import annotations

import json
import re
from typing import NamedTuple

from dmd2.errors import Refused
from dmd2.io.artifact import read_manifest
from dmd2.io.storage import join_uri, open_store

KEPT = 20
"""Earlier models that a name remembers."""


class Alias(NamedTuple):
    """Where a name points, newest first: {"model": address, "digest": digest of the package}."""

    name: str
    models: list[dict[str, str]]

    def __str__(self) -> str:
        now, *before = [f"{each['model']} ({each['digest'][:16]})" for each in self.models]
        return f"{self.name}: {now}" + (f", before {before[0]}" if before else "")


def alias(name: str, aliases: str, *, model: str = "", expected: str = "", rollback: bool = False) -> Alias:
    """Say which published model a name points to, or move it.

    Args:
        name: The name, such as latest or candidate.
        aliases: Folder of the names, local or gs://.
        model: Published package to point to.
        expected: Digest of the package that the name points to now, or its first digits; another one is refused.
        rollback: Point to what it pointed to before.
    """
    if not re.fullmatch(r"[a-z0-9][a-z0-9._-]{0,62}", name):
        raise Refused(
            f"name is {name[:80]!r}; give up to 63 of a-z, 0-9, '.', '_', '-', a letter or digit first"
        )
    if model and rollback:
        raise Refused("model and rollback are both given; a rollback takes the model from the name itself")
    store, file = open_store(aliases), f"{name}.json"
    version = store.version(file)
    models = _read(join_uri(aliases, file), store.read(file)) if version else []
    if expected and not (models and models[0]["digest"].startswith(expected)):
        raise Refused(
            f"{name} points to {models[0]['digest'][:16] if models else 'nothing'}, not to {expected}; look at it again before you move it"
        )
    if not model and not rollback:
        if not models:
            raise Refused(f"{aliases} has no name {name!r}; give --model to make it")
        return Alias(name, models)
    moved = _move(name, models, model)
    if moved != models:
        try:
            store.compare_and_swap(file, json.dumps({"models": moved}, indent=1).encode(), version)
        except FileExistsError:
            raise Refused(
                f"{name} was moved by another meanwhile; look at it again before you move it"
            ) from None
    return Alias(name, moved)


def _move(name: str, models: list[dict[str, str]], model: str) -> list[dict[str, str]]:
    """The models with another in front, or without the first one for a rollback."""
    if not model:
        if len(models) < 2:
            raise Refused(f"{name} has pointed to no other model before, so nothing can be rolled back to")
        read_manifest(models[1]["model"], "package")
        return models[1:]
    now = {"model": model.rstrip("/"), "digest": read_manifest(model, "package").digest}
    return models if models[:1] == [now] else [now, *models][:KEPT]


def _read(uri: str, data: bytes) -> list[dict[str, str]]:
    try:
        models = [{key: str(each[key]) for key in ("model", "digest")} for each in json.loads(data)["models"]]
    except (ValueError, KeyError, TypeError):
        models = []
    if not models:
        raise Refused(f"{uri} is not a name of a model; restore an earlier version of it, or delete it")
    return models
