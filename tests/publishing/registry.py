"""Kubeflow's Model Registry, as far as versions of models are registered, with the rules of its OpenAPI."""

from __future__ import annotations

import json
import re
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import parse_qs, urlsplit

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


class Registry(BaseHTTPRequestHandler):
    """A subclass for each test has its own `rows`, and says which `version` of the API it has."""

    protocol_version = "HTTP/1.1"
    rows: dict[str, list[dict[str, Any]]]
    version = "v1"
    token = ""

    def log_message(self, *args: Any) -> None: ...

    def do_GET(self) -> None:
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
            self._answer(*(200, found[0]) if found else (404, {"code": "404", "message": "no such thing"}))
        else:
            name, parent = self._place(collection)
            items = [row for row in self.rows[name] if parent in (None, row.get("parent"))]
            self._answer(200, {"items": items, "size": len(items), "pageSize": 1, "nextPageToken": ""})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        collection, _ = self._asked()
        if collection is None:
            return
        name, parent = self._place(collection)
        if why := self._mistake(name, body):
            self._answer(400, {"code": "400", "message": why})
            return
        body |= {"parent": parent} if parent else {}
        same = ("name", "registeredModelId", "parent")
        if any(all(row.get(key) == body.get(key) for key in same) for row in self.rows[name]):
            self._answer(409, {"code": "409", "message": "already exists"})
            return
        number = str(sum(map(len, self.rows.values())) + 1)
        row = body | {"id": number, "createTimeSinceEpoch": "1", "lastUpdateTimeSinceEpoch": "1"}
        self.rows[name].append(row)
        self._answer(201, row)

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
            self._answer(401, {"message": "who are you"})
            return None, ""
        base = f"/api/model_registry/{self.version}/"
        if not url.path.startswith(base):
            self._answer(404, {"message": "page not found"})
            return None, ""
        return url.path.removeprefix(base), url.query

    def _answer(self, status: int, value: Any) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
