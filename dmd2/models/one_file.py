"""Python code of this library as one file that imports none of it, for users of a package who do not install the library.

The file is put together from the source of the definitions themselves, so it cannot differ from what the library runs.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

LIBRARY = "dmd2"


def one_file(module: str) -> str:
    """The source of a module with everything of this library that it uses, and nothing else of it.

    What another module of the library defines and only annotations name is `Any`: they are not evaluated.

    Raises:
        ValueError: Two of the modules define the same name, or one imports a module of the library as a whole.
    """
    found = _Found()
    first = _Module.read(module)
    for name in first.definitions:
        _collect(first, name, found)
    head = f"# SPDX-License-Identifier: Apache-2.0\n# Generated from {LIBRARY}; edit the library, not this file.\n"
    unknown = sorted(found.annotations - found.definitions.keys())
    body = ["\n".join(f"{name} = Any" for name in unknown), *found.definitions.values()]
    imports = "\n".join(sorted(found.imports | {"from typing import Any"}))
    top = f'{head}"""{first.doc}"""\n\nfrom __future__ import annotations\n\n{imports}'
    return "\n\n\n".join([top, *filter(None, body)]) + "\n"


@dataclass
class _Found:
    definitions: dict[str, str] = field(default_factory=dict)
    """Name -> source, in an order in which they can be executed."""
    places: dict[str, str] = field(default_factory=dict)
    """Name -> module that defines it."""
    imports: set[str] = field(default_factory=set)
    annotations: set[str] = field(default_factory=set)
    """Names of the library in annotations."""


@dataclass(frozen=True)
class _Module:
    """The source of a module by its names."""

    name: str
    doc: str
    lines: list[str]
    definitions: dict[str, ast.stmt]
    imports: dict[str, tuple[str, str]]
    """Name -> (module, what is imported from it; empty for the module itself)."""

    @classmethod
    def read(cls, name: str) -> _Module:
        spec = find_spec(name)
        assert spec
        assert spec.origin
        text = Path(spec.origin).read_text()
        tree = ast.parse(text)
        imports = {
            alias.asname or alias.name: (str(node.module), alias.name)
            if isinstance(node, ast.ImportFrom)
            else (alias.name, "")
            for node in tree.body
            if isinstance(node, ast.Import | ast.ImportFrom)
            for alias in node.names
        }
        definitions = {name: node for node in tree.body for name in _names(node)}
        return cls(name, ast.get_docstring(tree, clean=False) or "", text.splitlines(), definitions, imports)

    def source(self, node: ast.stmt) -> str:
        first = min([node.lineno, *(each.lineno for each in getattr(node, "decorator_list", []))])
        return "\n".join(self.lines[first - 1 : node.end_lineno])


def _names(node: ast.stmt) -> list[str]:
    """What a statement at the top of a module defines."""
    match node:
        case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
            return [name]
        case ast.Assign(targets=targets):
            return [target.id for target in targets if isinstance(target, ast.Name)]
        case ast.AnnAssign(target=ast.Name(id=name)):
            return [name]
    return []


def _collect(module: _Module, name: str, found: _Found) -> None:
    """Add a name of a module, and before it what it needs."""
    if name not in module.definitions:
        _collect_import(module, name, found)
        return
    if found.places.setdefault(name, module.name) != module.name:
        raise ValueError(f"{name} is defined in {found.places[name]} and in {module.name}; rename one")
    if name in found.definitions:
        return
    node = module.definitions[name]
    found.definitions[name] = ""  # it may need itself
    used, named = set(_used_names(node)), {each.id for each in ast.walk(node) if isinstance(each, ast.Name)}
    for other in sorted(named & (module.definitions.keys() | module.imports.keys())):
        if other in used or not is_ours(module.imports.get(other, ("", ""))[0]):
            _collect(module, other, found)
        else:
            found.annotations.add(other)
    del found.definitions[name]
    found.definitions[name] = module.source(node)


def _collect_import(module: _Module, name: str, found: _Found) -> None:
    source, original = module.imports[name]
    if not is_ours(source):
        line = f"from {source} import {original}" if original else f"import {source}"
        found.imports.add(line if name == (original or source) else f"{line} as {name}")
        return
    other = _Module.read(source)
    if name != original or original not in other.definitions:
        raise ValueError(
            f"{module.name} imports {original} of {source} in another form than a definition by its name"
        )
    _collect(other, original, found)


def is_ours(module: str) -> bool:
    """Whether a module belongs to this library."""
    return module.partition(".")[0] == LIBRARY


def _used_names(node: ast.AST) -> Iterator[str]:
    """Names that are evaluated: all but those in annotations."""
    if isinstance(node, ast.Name):
        yield node.id
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield from _used_names(child)
