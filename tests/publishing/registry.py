"""Kubeflow's Model Registry, as far as versions of models are registered, with the rules of its OpenAPI."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from tests.bucket import QuietHandler, serve

FIELDS: dict[str, dict[str, type]] = {
    "registered_models": {"name": str},
    "model_versions": {"name": str, "registeredModelId": str},
    "artifacts": {"artifactType": str, "name": str, "uri": str, "modelFormatName": str, "modelFormatVersion": str},
}  # fmt: skip
OPTIONAL = {"customProperties", "description", "externalId", "owner", "author", "state"} | {
    "storageKey", "storagePath", "serviceAccountName", "modelSourceKind", "modelSourceClass", "modelSourceGroup",
    "modelSourceId", "modelSourceName",
}  # fmt: skip
PARENTS = {
    "registered_model": ("registered_models", ""),
    "model_version": ("model_versions", "registeredModelId"),
    "model_artifact": ("artifacts", "parent"),
}
"""What is found by its name -> (table, field with the id of what it belongs to)."""
VALUES: dict[str, tuple[str, Any]] = {
    "MetadataStringValue": ("string_value", str),
    "MetadataDoubleValue": ("double_value", (int, float)),
}


class Registry(QuietHandler):
    """A subclass for each test has its own `rows`, and says which `version` of the API it has."""

    rows: dict[str, list[dict[str, Any]]]
    version = "v1"
    token = ""

    def do_GET(self) -> None:  # noqa: N802 - as the base class calls it
        collection, query = self._asked()
        if collection is None:
            return
        given = {name: values[0] for name, values in parse_qs(query).items()}
        if collection in PARENTS:
            table, parent_field = PARENTS[collection]
            wanted = {"name": given["name"]} | (
                {parent_field: given["parentResourceId"]} if parent_field else {}
            )
            found = [row for row in self.rows[table] if row.items() >= wanted.items()]
            self.send_json(*(found[0], 200) if found else ({"code": "404", "message": "no such thing"}, 404))
        else:
            name, parent = self._place(collection)
            items = [row for row in self.rows[name] if parent in (None, row.get("parent"))]
            self.send_json({"items": items, "size": len(items), "pageSize": 1, "nextPageToken": ""})

    def do_POST(self) -> None:  # noqa: N802 - as the base class calls it
        body = json.loads(self.body())
        collection, _ = self._asked()
        if collection is None:
            return
        name, parent = self._place(collection)
        if why := self._mistake(name, body):
            self.send_json({"code": "400", "message": why}, 400)
            return
        body |= {"parent": parent} if parent else {}
        same = ("name", "registeredModelId", "parent")
        if any(all(row.get(key) == body.get(key) for key in same) for row in self.rows[name]):
            self.send_json({"code": "409", "message": "already exists"}, 409)
            return
        number = str(sum(map(len, self.rows.values())) + 1)
        row = body | {"id": number, "createTimeSinceEpoch": "1", "lastUpdateTimeSinceEpoch": "1"}
        self.rows[name].append(row)
        self.send_json(row, 201)

    def _mistake(self, name: str, body: dict[str, Any]) -> str:
        for field, kind in FIELDS[name].items():
            if not isinstance(body.get(field), kind) or not body[field]:
                return f"{field} is missing"
        if unknown := body.keys() - FIELDS[name].keys() - OPTIONAL:
            return f"unknown: {unknown}"
        if name == "model_versions" and all(
            r["id"] != body["registeredModelId"] for r in self.rows["registered_models"]
        ):
            return "no such model"
        if name == "artifacts" and body["artifactType"] != "model-artifact":
            return "artifactType"
        for value in body.get("customProperties", {}).values():
            field, kind = VALUES[value["metadataType"]]
            if value.keys() != {"metadataType", field} or not isinstance(value[field], kind):
                return f"customProperties: {value}"
        return ""

    def _place(self, collection: str) -> tuple[str, str | None]:
        """(table, id of the version that its rows belong to)."""
        if match := re.fullmatch(r"model_versions/(\d+)/artifacts", collection):
            return "artifacts", match[1]
        return collection, None

    def _asked(self) -> tuple[str | None, str]:
        url = urlsplit(self.path)
        if self.token and self.headers.get("Authorization") != f"Bearer {self.token}":
            self.send_json({"message": "who are you"}, 401)
            return None, ""
        base = f"/api/model_registry/{self.version}/"
        if not url.path.startswith(base):
            self.send_json({"message": "page not found"}, 404)
            return None, ""
        return url.path.removeprefix(base), url.query


@pytest.fixture
def registry() -> Iterator[tuple[Any, str]]:
    """(the registry, its address)."""

    class ThisRegistry(Registry):
        rows = {"registered_models": [], "model_versions": [], "artifacts": []}  # noqa: RUF012

    with serve(ThisRegistry) as address:
        yield ThisRegistry, address
