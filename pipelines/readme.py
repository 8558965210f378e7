"""What each component takes and gives, as a page, from its signature and its docstring."""

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

One per stage: a signature, a docstring, and a body that calls one function of the library. `make compile` writes this page from them.

Large things travel as addresses: an artifact is the manifest of a folder, with `uri` and `digest` of the folder in its metadata.

Nothing is cached by the platform. Its fingerprint is made of the arguments, the input artifacts, the names and types of
the outputs, the command and the name of the image; not of environment variables, nor of what an image's tag stands for, nor of what lies behind
an address, and a hit does not look whether what it promises is still there. A stage of ours that is done looks into its own folder, compares the
digests of what it was made of, and returns at once. So settings are arguments and images are named by digest, and `enable_caching` stays off.
"""


def components() -> dict[str, BaseComponent]:
    """{name: component} of every folder that has one."""
    names = sorted(path.parent.name for path in FOLDER.glob("*/component.py"))
    return {name: getattr(import_module(f"components.{name}.component"), name) for name in names}


def text() -> str:
    return "\n".join([HEAD, *(_section(name, one) for name, one in components().items())])


def _section(name: str, component: Any) -> str:
    said = parse(inspect.getdoc(component.python_func) or "")
    words: dict[str, str | None] = {one.arg_name: one.description for one in said.params}
    returned = said.returns.description if said.returns else ""
    spec = component.component_spec
    rows = [("in", port, one.type, words[port]) for port, one in (spec.inputs or {}).items()]
    rows += [
        ("out", port, one.type, words[port] if one.type.startswith("system.") else returned)
        for port, one in (spec.outputs or {}).items()
    ]
    table = [f"| {way} | `{port}` | {_kind(kind)} | {_line(what)} |" for way, port, kind, what in rows]
    what = "\n\n".join(filter(None, (said.short_description, said.long_description)))
    return "\n".join(
        [f"## {name}", "", what, "", "| | name | type | what |", "|---|---|---|---|", *table, ""]
    )


def _kind(kind: str) -> str:
    return kind.removeprefix("system.").partition("@")[0]


def _line(text: str | None) -> str:
    return " ".join((text or "").split())
