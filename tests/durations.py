"""Recorded processor time of the test files, and the order of the tests: the file that takes longest first.

`pytest --record-durations` shows them and writes `durations.json`. These are hooks of pytest, which `conftest.py` imports.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Generator
from operator import itemgetter
from pathlib import Path

import pytest

from tests import warm

PATH = Path(__file__).with_name("durations.json")
SHOWN = 30
UNKNOWN_S = 15.0
"""Seconds that are assumed of a file without a recorded time."""


def pytest_addoption(parser: pytest.Parser) -> None:
    text = f"show the seconds of processor time of files and tests, and write those of files to {PATH.name}"
    parser.addoption("--record-durations", action="store_true", help=text)


def pytest_configure(config: pytest.Config) -> None:
    """Workers of pytest are forks of the warm server, which saves each 9 s of imports."""
    warm.announce()
    if set(workers := getattr(config.option, "tx", ())) == {"popen"}:
        config.option.tx = [f"popen//python={warm.python()}"] * len(workers)
    if config.getoption("--record-durations"):
        config.pluginmanager.register(Recorder())


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort by recorded time, the longest file first, so that two workers of pytest end at about the same time."""
    seconds: dict[str, float] = json.loads(PATH.read_text())
    items.sort(key=lambda item: -seconds.get(file_of(item.nodeid), UNKNOWN_S))


def file_of(nodeid: str) -> str:
    return nodeid.partition("::")[0]


def processor_s() -> float:
    """Of this process, of those it has waited for, and of the warm ones."""
    return sum(os.times()[:4]) + warm.processor_s()


class Recorder:
    """In a worker it measures each phase of a test; where the reports arrive it adds them up."""

    def __init__(self) -> None:
        self.until = 0.0
        self.seconds: dict[str, float] = defaultdict(float)

    def pytest_runtest_logstart(self) -> None:
        self.until = processor_s()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        now = processor_s()
        report.user_properties.append(("processor_s", round(now - self.until, 2)))
        self.until = now
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.seconds[report.nodeid] += float(str(dict(report.user_properties)["processor_s"]))

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        files: dict[str, float] = defaultdict(float)
        for test, seconds in self.seconds.items():
            files[file_of(test)] += seconds
        for title, found in (("files", files), ("tests", self.seconds)):
            terminalreporter.section(f"{title} by seconds of processor time")
            for name, seconds in sorted(found.items(), key=itemgetter(1), reverse=True)[:SHOWN]:
                terminalreporter.write_line(f"{seconds:8.1f} {name}")
        terminalreporter.write_line(f"{sum(files.values()):8.1f} in all")
        known = json.loads(PATH.read_text()) | {name: round(seconds) for name, seconds in files.items()}
        kept = {name: seconds for name, seconds in sorted(known.items()) if Path(name).exists()}
        PATH.write_text(json.dumps(kept, indent=0) + "\n")
