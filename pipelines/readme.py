"""components/README.md: inputs and outputs of each component, from its signature and docstring."""

from __future__ import annotations

import inspect
from importlib import import_module
from pathlib import Path
from typing import Any

from docstring_parser import parse
from kfp.dsl.base_component import BaseComponent

FOLDER = Path(__file__).parents[1] / "components"
PATH = FOLDER / "README.md"
HEAD = """# Components

One component per stage: a signature, a docstring, and a body that calls one function of the library. `make compile` writes this page
from them.

Large data is passed as addresses: a KFP artifact holds the manifest of a folder, with `uri` and `digest` of the folder in its metadata.

KFP's cache is off (`enable_caching`). Its key consists of the arguments, the input artifacts, the names and types of the outputs, the
command and the name of the image. It does not include environment variables, the image behind a tag or the data behind an address, and
a hit does not check whether the result still exists. Instead, a stage that is done finds its own folder, compares the digests of its
inputs, and returns at once.
"""


def components() -> dict[str, BaseComponent]:
    """{name: component} of every folder below `components/` that has a `component.py`."""
    names = sorted(path.parent.name for path in FOLDER.glob("*/component.py"))
    return {name: getattr(import_module(f"components.{name}.component"), name) for name in names}


def text() -> str:
    return "\n".join([HEAD, *(_section(name, one) for name, one in components().items())])


def _section(name: str, component: Any) -> str:
    parsed = parse(inspect.getdoc(component.python_func) or "")
    words: dict[str, str | None] = {one.arg_name: one.description for one in parsed.params}
    spec = component.component_spec
    ports = [("in", spec.inputs or {}), ("out", spec.outputs or {})]
    rows = [
        (way, port, one.type, one.description or words[port])
        for way, specs in ports
        for port, one in specs.items()
    ]
    table = [f"| {way} | `{port}` | {_kind(kind)} | {_line(what)} |" for way, port, kind, what in rows]
    what = "\n\n".join(filter(None, (parsed.short_description, parsed.long_description)))
    return "\n".join(
        [f"## {name}", "", what, "", "| | name | type | what |", "|---|---|---|---|", *table, ""]
    )


def _kind(kind: str) -> str:
    return kind.removeprefix("system.").partition("@")[0]


def _line(text: str | None) -> str:
    return " ".join((text or "").split())
