from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from dmd2.config import Config
from dmd2.errors import Refused
from dmd2.io.artifact import MANIFEST, find_finished, open_artifact, read_manifest
from dmd2.io.staging import draft_artifact
from dmd2.io.storage import local_path


def make(out: Path, config: Config | None = None, text: str = "content") -> None:
    with draft_artifact(out, "shards", config, {"a": "b"}) as draft:
        (draft.path / "sub").mkdir()
        (draft.path / "sub" / "file.txt").write_text(text)
        draft.facts["count"] = 1


def test_a_manifest_has_files_config_inputs_and_facts(tmp_path: Path, micro: Config) -> None:
    make(tmp_path / "out", micro)
    manifest = read_manifest(tmp_path / "out", "shards")
    assert [file.path for file in manifest.files] == ["sub/file.txt"]
    assert (manifest.config, manifest.inputs, manifest.facts) == (micro, {"a": "b"}, {"count": 1})
    assert manifest.versions["torch"]
    open_artifact(tmp_path / "out", manifest)


def test_equal_content_has_an_equal_digest(tmp_path: Path, micro: Config) -> None:
    make(tmp_path / "one", micro)
    make(tmp_path / "two")
    make(tmp_path / "three", text="other")
    one, two, three = (read_manifest(tmp_path / name, "shards").digest for name in ("one", "two", "three"))
    assert one == two != three


def test_a_failure_leaves_no_files(tmp_path: Path) -> None:
    def fail() -> None:
        with draft_artifact(tmp_path / "out", "shards", None, {}) as draft:
            (draft.path / "half").write_text("x")
            raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        fail()
    assert not list(tmp_path.iterdir())


def test_a_resumable_failure_keeps_its_files_and_its_time(tmp_path: Path, micro: Config) -> None:
    for attempt in range(2):
        try:
            with draft_artifact(tmp_path / "out", "run", micro, {}, resumable=True) as draft:
                assert (draft.path / "checkpoints" / "1").exists() == (attempt == 1)
                (draft.path / "checkpoints" / "1").mkdir(parents=True, exist_ok=True)
                (draft.path / "checkpoints" / "1" / "half").write_text("x")
                if attempt == 0:
                    raise RuntimeError
        except RuntimeError:
            assert float((draft.path / ".seconds").read_text()) >= 0
    assert [file.path for file in read_manifest(tmp_path / "out", "run").files] == ["checkpoints/1/half"]
    assert not list((tmp_path / "out").glob(".*"))


def test_a_draft_of_another_config_is_not_resumed(
    tmp_path: Path, micro: Config, refusal: Callable[..., str]
) -> None:
    def stop() -> None:
        with draft_artifact(tmp_path / "out", "run", micro, {}, resumable=True) as draft:
            (draft.path / "checkpoints" / "1").mkdir(parents=True)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        stop()
    other = micro.model_copy(update={"seed": 7})

    def go_on() -> None:
        with draft_artifact(tmp_path / "out", "run", other, {}, resumable=True):
            pass

    assert "seed: 0 -> 7" in refusal(go_on)


def test_a_folder_that_is_no_artifact_of_the_kind_is_refused(
    tmp_path: Path, refusal: Callable[..., str]
) -> None:
    assert "does not exist" in refusal(lambda: read_manifest(tmp_path / "none", "run"))
    (tmp_path / "empty").mkdir()
    assert "never finished" in refusal(lambda: read_manifest(tmp_path / "empty", "run"))
    make(tmp_path / "out")
    assert "is a shards folder; a run folder is needed" in refusal(
        lambda: read_manifest(tmp_path / "out", "run")
    )
    (tmp_path / "out" / MANIFEST).write_text('{"kind": "run"')
    assert "not a manifest" in refusal(lambda: read_manifest(tmp_path / "out", "run"))


def test_a_folder_with_other_files_is_not_overwritten(tmp_path: Path, refusal: Callable[..., str]) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    assert "exists and is not" in refusal(lambda: make(tmp_path / "out"))
    assert (tmp_path / "out" / "thesis.tex").read_text() == "years of work"


def test_an_artifact_of_other_inputs_is_refused(tmp_path: Path) -> None:
    make(tmp_path / "out")
    assert find_finished(tmp_path / "out", "shards", None, {"a": "b"})
    with pytest.raises(Refused, match="other inputs"):
        find_finished(tmp_path / "out", "shards", None, {"a": "c"})


def test_an_unknown_scheme_is_refused(refusal: Callable[..., str]) -> None:
    assert "'s3'" in refusal(lambda: local_path("s3://bucket/x"))
    assert local_path("file:///tmp/x") == Path("/tmp/x")


def test_a_config_survives_json(micro: Config) -> None:
    assert Config.model_validate(json.loads(json.dumps(micro.model_dump(mode="json")))) == micro


def test_a_changed_file_fails_the_check(made: Path, tmp_path: Path, refusal: Callable[..., str]) -> None:
    copy = shutil.copytree(made / "teacher", tmp_path / "teacher")
    weights = copy / "network.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert "network.safetensors was changed" in refusal(
        lambda: open_artifact(copy, read_manifest(copy, "teacher"))
    )


def test_two_processes_cannot_make_the_same_folder(tmp_path: Path, refusal: Callable[..., str]) -> None:
    with draft_artifact(tmp_path / "out", "shards", None, {}) as draft:
        (draft.path / "file").write_text("mine")
        assert "another process is working" in refusal(lambda: make(tmp_path / "out"))
        assert (draft.path / "file").read_text() == "mine"
    assert [file.path for file in read_manifest(tmp_path / "out", "shards").files] == ["file"]


def test_the_files_of_a_killed_process_are_deleted_if_the_stage_is_not_resumable(tmp_path: Path) -> None:
    left = tmp_path / ".out.partial"
    (left / "sub").mkdir(parents=True)
    (left / "half").write_text("x")
    make(tmp_path / "out")
    assert [file.path for file in read_manifest(tmp_path / "out", "shards").files] == ["sub/file.txt"]


def test_after_a_failure_without_a_checkpoint_another_config_can_start(tmp_path: Path, micro: Config) -> None:
    with pytest.raises(RuntimeError), draft_artifact(tmp_path / "out", "run", micro, {}, resumable=True):
        raise RuntimeError
    with draft_artifact(tmp_path / "out", "run", micro.model_copy(update={"seed": 7}), {}, resumable=True):
        pass
    assert read_manifest(tmp_path / "out", "run").config != micro


def test_an_output_that_is_a_file_is_refused_before_the_work(
    tmp_path: Path, refusal: Callable[..., str]
) -> None:
    (tmp_path / "out").write_text("mine")
    assert "exists and is not" in refusal(lambda: make(tmp_path / "out"))
    assert (tmp_path / "out").read_text() == "mine"


@pytest.mark.parametrize("name", ["../x", "/etc/x", "vae/../../x", "a//b", "a\\b", "", "."])
def test_a_manifest_names_nothing_outside_its_folder(
    name: str, tmp_path: Path, refusal: Callable[..., str]
) -> None:
    make(tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / MANIFEST).read_text())
    manifest["files"][0]["path"] = name
    (tmp_path / "out" / MANIFEST).write_text(json.dumps(manifest))
    assert "no name of a file in a folder" in refusal(lambda: read_manifest(tmp_path / "out", "shards"))


@pytest.mark.parametrize(
    "name", ["a\0b", "a\nb", "a\tb", "a\x1b[2Jb", "a\u202eb", "../a", "/a", "a//b", "a\\b", "x" * 256]
)
def test_a_name_that_is_no_plain_name_of_a_file_is_refused(
    name: str, tmp_path: Path, refusal: Callable[..., str]
) -> None:
    make(tmp_path / "out")
    path = tmp_path / "out" / MANIFEST
    manifest = json.loads(path.read_text())
    manifest["files"][0]["path"] = name
    path.write_text(json.dumps(manifest))
    sentence = refusal(lambda: read_manifest(tmp_path / "out", "shards"))
    assert "is not a manifest of this version: files.0.path" in sentence
    assert sentence.isprintable()


def test_a_manifest_that_is_nested_without_end_is_refused(
    tmp_path: Path, refusal: Callable[..., str]
) -> None:
    make(tmp_path / "out")
    for deep in ("[" * 200_000 + "]" * 200_000, '{"facts":' * 200_000 + "}" * 200_000, "\0" * 100, "NaN"):
        (tmp_path / "out" / MANIFEST).write_text(deep)
        sentence = refusal(lambda: read_manifest(tmp_path / "out", "shards"))
        assert "is not a manifest of this version: I" in sentence, (
            "Invalid JSON, or Input should be an object"
        )
