"""Names of published models move by compare-and-swap, remember, and roll back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from dmd2 import stages
from dmd2.cli import run
from dmd2.config import Config
from dmd2.io.artifact import read_manifest
from dmd2.io.local import LocalStore
from dmd2.io.staging import draft_artifact

Refusal = Callable[[Callable[[], object]], str]


@pytest.fixture
def models(micro: Config, tmp_path: Path) -> list[str]:
    """Three published packages, by their manifests."""
    for number in range(3):
        with draft_artifact(str(tmp_path / f"made{number}"), "package", micro, {"run": str(number)}) as draft:
            (draft.path / "README.md").write_text(str(number))
        stages.publish(str(tmp_path / f"made{number}"), str(tmp_path / "models" / str(number)))
    return [str(tmp_path / "models" / str(number)) for number in range(3)]


def digest(model: str) -> str:
    return read_manifest(model, "package").digest


def test_a_name_moves_remembers_and_rolls_back(models: list[str], tmp_path: Path, refusal: Refusal) -> None:
    place = str(tmp_path / "aliases")
    assert "give --model to make it" in refusal(lambda: stages.alias("latest", place))
    for model in models:
        moved = stages.alias("latest", place, model=model)
        assert moved.models[0] == {"model": model, "digest": digest(model)}
    assert stages.alias("latest", place, model=models[2]) == moved, "the same again changes nothing"
    assert [each["model"] for each in stages.alias("latest", place).models] == models[::-1]
    assert stages.alias("latest", place, rollback=True).models[0]["model"] == models[1]
    assert stages.alias("latest", place, rollback=True).models[0]["model"] == models[0]
    assert "no other model before" in refusal(lambda: stages.alias("latest", place, rollback=True))
    stages.alias("candidate", place, model=models[2])
    assert stages.alias("latest", place).models[0]["model"] == models[0]


def test_of_two_who_move_a_name_one_is_refused(
    models: list[str], tmp_path: Path, refusal: Refusal, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = str(tmp_path / "aliases")
    stages.alias("latest", place, model=models[0])
    read = LocalStore.read

    def while_another_moves_it(store: LocalStore, name: str) -> bytes:
        monkeypatch.setattr(LocalStore, "read", read)
        data = read(store, name)
        stages.alias("latest", place, model=models[1])
        return data

    monkeypatch.setattr(LocalStore, "read", while_another_moves_it)
    assert "moved by another meanwhile" in refusal(lambda: stages.alias("latest", place, model=models[2]))
    assert stages.alias("latest", place).models[0]["model"] == models[1]
    said = refusal(lambda: stages.alias("latest", place, model=models[2], expected=digest(models[0])[:16]))
    assert f"points to {digest(models[1])[:16]}" in said
    stages.alias("latest", place, model=models[2], expected=digest(models[1])[:16])


def test_mistakes_are_refused(models: list[str], tmp_path: Path, refusal: Refusal) -> None:
    place = str(tmp_path / "aliases")
    for name in ("../latest", "", "Latest", "a/b", 64 * "a"):
        assert "give up to 63" in refusal(lambda name=name: stages.alias(name, place))  # type: ignore[misc]
    assert "both given" in refusal(lambda: stages.alias("a", place, model=models[0], rollback=True))
    assert str(tmp_path) in refusal(lambda: stages.alias("a", place, model=str(tmp_path)))
    Path(place).mkdir()
    for text in ("{", "[]", '{"models": [{}]}', '{"models": []}'):
        (Path(place) / "a.json").write_text(text)
        assert "is not a name of a model" in refusal(lambda: stages.alias("a", place))


def test_the_command_says_where_a_name_points(
    models: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = str(tmp_path / "aliases")
    run(["alias", "latest", "--aliases", place, "--model", models[0]])
    run(["alias", "latest", "--aliases", place, "--model", models[1]])
    assert capsys.readouterr().out.splitlines()[-1] == (
        f"latest: {models[1]} ({digest(models[1])[:16]}), before {models[0]} ({digest(models[0])[:16]})"
    )
