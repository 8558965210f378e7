"""The contract of an HTTP API, from the client that its makers generated from their OpenAPI, as strict as it can be read.

What may be asked is taken from the client's functions (path, method, names of the query, type of the body), what
may be sent and answered from its models. A field that no model knows, a wrong type, a word that is no value of an
enumeration, a name of the query that the operation does not have: each is an offence.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from types import ModuleType
from typing import Any

INT64 = {"max_concurrency", "interval_second", "long_value", "offset"}
"""Fields whose type is written as text in the OpenAPI, as JSON knows no 64 bits; the server takes numbers as well."""


@dataclass(frozen=True)
class Operation:
    name: str
    method: str
    path: re.Pattern[str]
    query: frozenset[str]
    required: frozenset[str]
    body: str
    """Name of a model; empty if there is none."""
    file: str
    answer: str


def operations(interfaces: Iterable[type]) -> list[Operation]:
    """Of every function of these interfaces."""
    return [
        _operation(name.removesuffix("_with_http_info"), inspect.getsource(function))
        for interface in interfaces
        for name, function in inspect.getmembers(interface, inspect.isfunction)
        if name.endswith("_with_http_info")
    ]


def _operation(name: str, source: str) -> Operation:
    path, method = re.search(r"call_api\(\s*'([^']+)', '([A-Z]+)'", source).groups()  # type: ignore[union-attr]
    body = re.search(r"body_params = local_var_params\['(\w+)'\]", source)
    answer = re.search(r"response_type='([^']+)'", source)
    file = re.search(r"local_var_files\['(\w+)'\]", source)
    return Operation(
        name=name,
        method=method,
        path=re.compile(re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>[^/:]+)", re.escape(path))),
        query=frozenset(re.findall(r"query_params\.append\(\('(\w+)'", source)),
        required=frozenset(re.findall(r"Missing the required parameter `(\w+)`", source)),
        body=re.search(rf":type {body[1]}: (\S+)|:param (\S+) {body[1]}:", source)[1] if body else "",  # type: ignore[index]
        file=file[1] if file else "",
        answer=answer[1] if answer else "",
    )


def offences(value: Any, kind: str, models: ModuleType, where: str = "") -> list[str]:
    """What is wrong with a value of this type, in words; nothing if it keeps to the contract."""
    if inner := re.fullmatch(r"list\[(.+)\]", kind):
        if not isinstance(value, list):
            return [f"{where}: {value!r} is no list"]
        return [o for i, one in enumerate(value) for o in offences(one, inner[1], models, f"{where}[{i}]")]
    if inner := re.fullmatch(r"dict\(str, (.+)\)", kind):
        if not isinstance(value, dict):
            return [f"{where}: {value!r} is no object"]
        return [o for key, one in value.items() for o in offences(one, inner[1], models, f"{where}.{key}")]
    if kind == "object":
        return []
    if kind in ("str", "int", "bool", "float", "datetime"):
        return _plain(value, kind, where)
    model = getattr(models, kind)
    if allowed := getattr(model, "allowable_values", None):
        return [] if value in allowed else [f"{where}: {value!r} is none of {allowed}"]
    if not isinstance(value, dict):
        return [f"{where}: {value!r} is no {kind}"]
    fields = {model.attribute_map[name]: type_ for name, type_ in model.openapi_types.items()}
    unknown = [f"{where}.{name}: {kind} has no such field" for name in value if name not in fields]
    known = [(name, one) for name, one in value.items() if name in fields]
    return unknown + [
        o for name, one in known for o in offences(one, fields[name], models, f"{where}.{name}")
    ]


def _plain(value: Any, kind: str, where: str) -> list[str]:
    if kind == "datetime":
        try:
            datetime.fromisoformat(value)
        except (TypeError, ValueError):
            return [f"{where}: {value!r} is no time"]
        return []
    types: dict[str, Any] = {"str": str, "int": int, "bool": bool, "float": (int, float)}
    if kind == "str" and where.rpartition(".")[2] in INT64 and type(value) is int:
        return []
    right = isinstance(value, types[kind]) and (kind == "bool" or not isinstance(value, bool))
    return [] if right else [f"{where}: {value!r} is no {kind}"]
