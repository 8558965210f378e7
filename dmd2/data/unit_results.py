"""The results of units of work, by number: kept as the JSON texts of their files, and parsed one at a time.

A parsed result takes kilobytes, and there may be 1,000,000 of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Generic, TypeVar

from pydantic import BaseModel

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
