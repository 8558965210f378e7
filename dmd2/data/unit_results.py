"""The results of units of work, by number: kept as the JSON texts of their files, and parsed one at a time.

A parsed result takes kilobytes, and there may be 1,000,000 of them.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Generic, TypeVar

from pydantic import BaseModel

from dmd2.io.store import CONCURRENT_REQUESTS, Store

RESULTS = ".units"
"""Folder of the files in an unfinished artifact."""
Result = TypeVar("Result", bound=BaseModel)


class UnitResults(Generic[Result]):
    """Results in the order of the numbers of their units."""

    def __init__(self, kind: type[Result], texts: Mapping[int, str | bytes]) -> None:
        self.kind, self._texts = kind, dict(texts)

    def add(self, number: int, text: str | bytes) -> Result:
        """Keep the result of a unit; return it."""
        self._texts[number] = text
        return self[number]

    def __getitem__(self, number: int) -> Result:
        return self.kind.model_validate_json(self._texts[number])

    def __contains__(self, number: int) -> bool:
        return number in self._texts

    def __len__(self) -> int:
        return len(self._texts)

    def __iter__(self) -> Iterator[Result]:
        return (self[number] for number in sorted(self._texts))


def read_unit_files(store: Store, folder: str, units: Container[int] | None = None) -> dict[int, bytes]:
    """{number of the unit: content} of the files that were written for units, or for these units, in this folder."""
    found = list_unit_files(store, folder)
    names = {number: name for number, name in found.items() if units is None or number in units}
    with ThreadPoolExecutor(CONCURRENT_REQUESTS) as pool:
        return dict(zip(names, pool.map(store.read, names.values()), strict=True))


def list_unit_files(store: Store, folder: str) -> dict[int, str]:
    """{number of the unit: name} of the files in this folder."""
    listed = (name for name, _, _ in store.list_objects(f"{folder}/"))
    return {int(Path(name).stem): name for name in listed if not name.split("/")[-1].startswith(".")}
