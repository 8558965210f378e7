"""Kubeflow's Model Registry: a catalogue of models, versions and where each version lies, over its REST API.

https://www.kubeflow.org/docs/components/model-registry/reference/rest-api/
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlencode, urlsplit
from urllib.request import Request, urlopen

from dmd2.errors import Refused, brief

VERSIONS = ("v1", "v1alpha3")
"""Versions of the API, which agree in what is used here. Older servers know the second only."""
TOKEN_FILE = "KF_PIPELINES_SA_TOKEN_PATH"
"""Variable of the environment with the path of a token, as the registry's own client reads it."""
TIMEOUT_S = 60
Properties = Mapping[str, str | float]


def check_registry_address(address: str) -> None:
    """Raise Refused for what is no address of a web server."""
    if urlsplit(address).scheme not in ("http", "https") or not urlsplit(address).netloc:
        raise Refused(f"the registry {address!r:.80} is no address; give http:// or https:// with a host")


class ModelRegistry:
    """A Model Registry at an address such as http://model-registry-service.kubeflow.svc:8080."""

    def __init__(self, address: str) -> None:
        check_registry_address(address)
        self.address = address.rstrip("/")
        self.api = ""
        for version in VERSIONS:
            self.api = f"{self.address}/api/model_registry/{version}"
            if self._get("registered_models", pageSize=1) is not None:
                return
        raise Refused(f"{address} answers as no Model Registry does; give the address of its REST service")

    def register(self, model: str, version: str, uri: str, properties: Properties) -> None:
        """Add a version to a model, which is made if it is new, and where its files lie. What is there already is left as it is.

        Raises:
            Refused: This version has another address there.
        """
        found = self._get("registered_model", name=model) or self._post("registered_models", {"name": model})
        at = self._get("model_version", name=version, parentResourceId=found["id"]) or self._post(
            "model_versions",
            {"name": version, "registeredModelId": found["id"], "customProperties": _custom(properties)},
        )
        artifacts = f"model_versions/{at['id']}/artifacts"
        known = [each.get("uri") for each in (self._get(artifacts) or {}).get("items") or []]
        if not known:
            artifact = {"artifactType": "model-artifact", "name": model, "uri": uri}
            self._post(artifacts, artifact | {"modelFormatName": "dmd2", "modelFormatVersion": "1"})
        elif known != [uri]:
            raise Refused(
                f"version {version} of {model} in {self.address} lies at {known[0]}, not at {uri}, and is never changed; remove it there, "
                "or publish to that address"
            )

    def _get(self, path: str, **query: str | int) -> Any:
        """The answer; None if there is no such thing."""
        return self._ask(Request(f"{self.api}/{path}?{urlencode(query)}", headers=_headers()))

    def _post(self, path: str, body: Mapping[str, Any]) -> Any:
        data, headers = json.dumps(body).encode(), _headers() | {"Content-Type": "application/json"}
        answer = self._ask(Request(f"{self.api}/{path}", data, headers))
        if answer is None:
            raise Refused(f"{self.address} knows no {path}; it is of a version that is not supported")
        return answer

    def _ask(self, request: Request) -> Any:
        where = request.full_url.partition("?")[0]
        try:
            with urlopen(request, timeout=TIMEOUT_S) as answer:
                return json.load(answer)
        except HTTPError as error:
            if error.code == 404:
                return None
            if error.code < 500:
                said = " ".join(error.read(300).decode(errors="replace").split())
                raise Refused(
                    f"{where} refused with status {error.code} ({said}); check the address and the account ({TOKEN_FILE})"
                ) from None
            raise OSError(errno.EIO, f"the registry failed with status {error.code}", where) from None
        except (URLError, TimeoutError, ConnectionError, ValueError) as error:
            raise OSError(
                errno.EIO, f"the registry does not answer as it should ({brief(error)})", where
            ) from None


def _headers() -> dict[str, str]:
    if not (path := os.environ.get(TOKEN_FILE)):
        return {}
    return {"Authorization": f"Bearer {Path(path).read_text().strip()}"}


def _custom(properties: Properties) -> dict[str, dict[str, str | float]]:
    """Values as the API spells them."""
    return {
        name: {"metadataType": "MetadataStringValue", "string_value": value}
        if isinstance(value, str)
        else {"metadataType": "MetadataDoubleValue", "double_value": value}
        for name, value in properties.items()
    }
