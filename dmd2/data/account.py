"""What became of every file, member of an archive, row and line of a source.

Each of these items has one outcome: it is used, as an image, a caption or something else, or it is left out for a reason. The items
that are left out are counted by reason, with the name of the first as an example, so that nothing disappears unseen. Accounts of
parts of a source are added up.
"""

from __future__ import annotations

from pydantic import BaseModel

from dmd2.log import printable


class Tally(BaseModel):
    """A number of items, and the name of the first of them."""

    count: int = 0
    example: str = ""


class Account(BaseModel):
    """Counts of the outcomes of items."""

    used: dict[str, int] = {}
    """By use: number of items."""
    left_out: dict[str, Tally] = {}
    """By reason: items that are not used."""
    remarks: dict[str, Tally] = {}
    """What else is to be known. These do not add to the number of items."""

    def use(self, purpose: str, count: int = 1) -> None:
        if count:
            self.used[purpose] = self.used.get(purpose, 0) + count

    def leave_out(self, reason: str, name: str, count: int = 1) -> None:
        _count(self.left_out, reason, name, count)

    def remark(self, what: str, name: str = "", count: int = 1) -> None:
        _count(self.remarks, what, name, count)

    def add(self, other: Account) -> None:
        """Add the counts of another part of the source."""
        for purpose, count in other.used.items():
            self.use(purpose, count)
        for mine, theirs in ((self.left_out, other.left_out), (self.remarks, other.remarks)):
            for reason, tally in theirs.items():
                _count(mine, reason, tally.example, tally.count)

    @property
    def num_left_out(self) -> int:
        return sum(tally.count for tally in self.left_out.values())

    @property
    def num_items(self) -> int:
        return sum(self.used.values()) + self.num_left_out

    def lines(self) -> list[str]:
        """The account as text: one line for what is used, one for each reason and remark."""
        used = ", ".join(f"{purpose} {count:,}" for purpose, count in sorted(self.used.items()))
        return [
            f"{self.num_items:,} files, members of archives, rows and lines: {self.num_left_out:,} are left out",
            f"used: {used or 'nothing'}",
            *(f"left out: {_line(reason, tally)}" for reason, tally in sorted(self.left_out.items())),
            *(f"note: {_line(what, tally)}" for what, tally in sorted(self.remarks.items())),
        ]


def _count(tallies: dict[str, Tally], key: str, name: str, count: int) -> None:
    if count:
        tally = tallies.setdefault(printable(key), Tally(example=printable(name)))
        tally.count += count


def _line(what: str, tally: Tally) -> str:
    return f"{what}: {tally.count:,}" + (f" ({tally.example})" if tally.example else "")
