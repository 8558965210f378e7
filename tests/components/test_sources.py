"""Sources of teachers: what each finds, and that a bad one keeps no other back."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from components.find_teachers import sources
from components.find_teachers.sources import AnnouncedTeacher, find
from dmd2.io.storage import join_uri, open_store
from tests.bucket import DOWNLOAD, Proxy, QuietHandler, serve
from tests.pipelines.retraining import announce, teacher


@pytest.fixture(params=["folder", "bucket"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    root = request.getfixturevalue("bucket") if request.param == "bucket" else str(tmp_path)
    return join_uri(root, "teachers")


def test_a_teacher_is_there_once_its_manifest_is(place: str) -> None:
    open_store(join_uri(place, "half")).write("network.safetensors", b"weights")
    assert find(place).teachers == []
    digest = teacher(join_uri(place, "deep/down/a"), "a")
    assert find(place).teachers == [AnnouncedTeacher("a", join_uri(place, "deep/down/a"), digest)]


def test_the_address_may_be_that_of_the_teacher_itself(place: str) -> None:
    digest = teacher(place)
    assert find(place).teachers == [AnnouncedTeacher("teachers", place, digest)]


def test_folders_of_another_kind_are_no_teachers(place: str) -> None:
    announce(join_uri(place, "shards"), "shards")
    found = find(place)
    assert (found.teachers, found.skipped) == ([], [])


def test_the_same_teacher_is_found_once_wherever_it_lies(place: str) -> None:
    for name in ("a", "b"):
        teacher(join_uri(place, name), "same")
    teacher(join_uri(place, "c"), "other")
    assert [one.name for one in find(f"{place} {place}/b").teachers] == ["a", "c"]


def test_a_teacher_that_was_copied_with_its_manifest_first_is_passed_over_for_now(place: str) -> None:
    teacher(join_uri(place, "a"))
    open_store(join_uri(place, "a")).delete(["network.safetensors"])
    found = find(place)
    assert found.teachers == []
    assert found.skipped == [
        f"{join_uri(place, 'a')} has a manifest, but network.safetensors is missing or has another size than the manifest "
        "says; copy the manifest last"
    ]
    teacher(join_uri(place, "a"))
    assert len(find(place).teachers) == 1


def test_a_manifest_that_is_none_does_not_keep_the_others_back(place: str) -> None:
    open_store(join_uri(place, "broken")).write("manifest.json", b'{"kind": "teacher"')
    teacher(join_uri(place, "a"))
    found = find(place)
    assert [one.name for one in found.teachers] == ["a"]
    assert f"{join_uri(place, 'broken/manifest.json')} is not a manifest" in found.skipped[0]


def test_no_source_is_refused(refusal: Callable[..., str]) -> None:
    assert "teachers is empty" in refusal(lambda: find(" "))


@contextmanager
def answering(answers: dict[str, tuple[int, Any]]) -> Iterator[tuple[str, list[str]]]:
    """A server that has these answers -> its address, and what it was asked."""
    asked: list[str] = []

    class Answers(QuietHandler):
        def do_GET(self) -> None:  # noqa: N802 - as the base class calls it
            asked.append(self.path)
            status, answer = answers.get(self.path, (404, {"error": "nothing there"}))
            headers = {"X-Error-Code": "RepoNotFound"} if status == 404 else {}
            self.send(status, json.dumps(answer).encode(), **headers)

    with serve(Answers) as url:
        yield url, asked


COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    model = {
        "id": "owner/model",
        "sha": COMMIT,
        "siblings": [],
        "tags": [],
        "private": False,
        "downloads": 0,
        "likes": 0,
    }
    answers = {f"/api/models/owner/model{revision}": (200, model) for revision in ("", "/revision/v1")}
    answers["/api/models/owner/down"] = (500, {"error": "down"})
    with answering(answers) as (url, _):
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url)
        monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", url)
        yield


@pytest.mark.parametrize("address", ["hf://owner/model", "hf://owner/model@v1"])
def test_a_name_on_the_hub_stands_for_its_commit(hub: None, address: str) -> None:
    assert find(address).teachers == [AnnouncedTeacher("model", f"owner/model@{COMMIT}", COMMIT)]


@pytest.mark.parametrize("address", ["hf://owner/none", "hf://owner/model@none", "hf://a/b/c"])
def test_a_name_that_the_hub_does_not_know_is_refused(
    hub: None, address: str, refusal: Callable[..., str]
) -> None:
    assert f"{address} is no model on the hub" in refusal(lambda: find(address))


def test_a_hub_that_is_down_is_an_error_of_the_moment(hub: None) -> None:
    with pytest.raises(OSError, match="the hub does not answer as it should"):
        find("hf://owner/down")


def test_a_registry_points_to_teachers(bucket: str) -> None:
    digest = teacher(f"{bucket}/t/a")
    announce(f"{bucket}/students/s", "package")

    def artifact(name: str, uri: str | None, state: str = "LIVE") -> dict[str, Any]:
        return {"id": name, "name": name, "artifactType": "model-artifact", "uri": uri, "state": state}

    pages = [
        [artifact("a", f"{bucket}/t/a"), artifact("old", f"{bucket}/t/old", "MARKED_FOR_DELETION")],
        [
            artifact("s", f"{bucket}/students/s"),
            artifact("gone", f"{bucket}/t/gone"),
            artifact("s3", "s3://b/x"),
        ],
    ]
    path = "/api/model_registry/v1/model_artifacts?pageSize=100"
    answers = {
        path: (200, {"items": pages[0], "nextPageToken": "two", "pageSize": 100, "size": 2}),
        f"{path}&nextPageToken=two": (
            200,
            {"items": pages[1], "nextPageToken": "", "pageSize": 100, "size": 3},
        ),
    }
    with answering(answers) as (url, asked):
        found = find(f"registry+{url}")
    assert len(asked) == 2
    assert found.teachers == [AnnouncedTeacher("a", f"{bucket}/t/a", digest)]
    assert [sentence.split(" of ")[0] for sentence in found.skipped] == [
        "artifact 'gone'",
        "artifact 's3'",
    ]
    with answering({}) as (url, _), pytest.raises(OSError, match="the registry does not answer as it should"):
        find(f"registry+{url}")


# Bad ones


def test_a_bad_source_keeps_no_other_back(hub: None, place: str) -> None:
    teacher(join_uri(place, "a"))
    found = find(
        f"hf://owner/down s3://b/teachers registry+http://127.0.0.1:9 hf://a/b/c {place} hf://owner/model"
    )
    assert [one.name for one in found.teachers] == ["a", "model"]
    assert [sentence.partition(" cannot be read: ")[0] for sentence in found.skipped] == [
        "hf://owner/down", "s3://b/teachers", "registry+http://127.0.0.1:9", "hf://a/b/c",
    ]  # fmt: skip


def test_a_source_that_never_answers_keeps_no_other_back(place: str) -> None:
    teacher(join_uri(place, "a"))
    with listening() as silent:
        found = find(f"registry+{silent} {place}", limit_s=1)
    assert [one.name for one in found.teachers] == ["a"]
    assert found.skipped == [f"registry+{silent} cannot be read: it has not answered within 1 s"]


@contextmanager
def listening() -> Iterator[str]:
    """A server that accepts connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def live(*uris: Any) -> list[dict[str, Any]]:
    return [{"id": str(n), "name": f"n{n}", "uri": uri, "state": "LIVE"} for n, uri in enumerate(uris)]


PAGES = "/api/model_registry/v1/model_artifacts?pageSize=100"


def test_a_registry_whose_pages_have_no_end_is_read_once_around(bucket: str) -> None:
    teacher(f"{bucket}/t/a")
    page = (200, {"items": live(f"{bucket}/t/a"), "nextPageToken": "again"})
    with answering({PAGES: page, f"{PAGES}&nextPageToken=again": page}) as (url, asked):
        found = find(f"registry+{url}")
    assert [one.name for one in found.teachers] == ["a"]
    assert "the registry's list has no end after 2 pages" in found.skipped[0]
    assert len(asked) == 2


def test_a_registry_that_has_always_another_page_is_read_up_to_a_limit(
    monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    teacher(join_uri(place, "a"))
    monkeypatch.setattr(sources, "PAGES", 3)
    answers = {f"{PAGES}&nextPageToken={n}": (200, {"nextPageToken": str(n + 1)}) for n in range(9)}
    with answering({PAGES: (200, {"nextPageToken": "0"})} | answers) as (url, asked):
        found = find(f"registry+{url} {place}")
    assert len(asked) == 3
    assert [one.name for one in found.teachers] == ["a"]
    assert "has no end" in found.skipped[0]


def test_a_page_that_never_ends_is_given_up(monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    teacher(join_uri(place, "a"))
    monkeypatch.setattr(sources, "PAGE_BYTES", 2**18)

    class Endless(QuietHandler):
        def do_GET(self) -> None:  # noqa: N802 - as the base class calls it
            self.send_response(200)
            self.end_headers()
            with suppress(OSError):
                while True:
                    self.wfile.write(b" " * 2**16)

    with serve(Endless) as url:
        found = find(f"registry+{url} {place}")
    assert [one.name for one in found.teachers] == ["a"]
    assert "a page of more than 262144 bytes" in found.skipped[0]


def test_one_bad_artifact_of_a_registry_keeps_no_other_back(bucket: str) -> None:
    teacher(f"{bucket}/t/a")
    items = [None, "x", *live(7, ["x"], "gs://", "gs://no-such-bucket/t", f"{bucket}/t/a")]
    with answering({PAGES: (200, {"items": items})}) as (url, _):
        found = find(f"registry+{url}")
    assert [one.name for one in found.teachers] == ["a"]
    assert len(found.skipped) == 4


def test_an_answer_that_is_no_page_is_an_error_of_the_registry(place: str) -> None:
    teacher(join_uri(place, "a"))
    with answering({PAGES: (200, [1, 2])}) as (url, _):
        found = find(f"registry+{url} {place}")
    assert [one.name for one in found.teachers] == ["a"]
    assert "which is no page" in found.skipped[0]


def test_a_manifest_that_cannot_be_read_keeps_no_other_back(bucket: str, proxy: Proxy) -> None:
    for name in ("a", "b"):
        teacher(f"{bucket}/t/{name}", name)
    proxy.fail(f"{DOWNLOAD}.*t/b/manifest.json", "403")
    found = find(f"{bucket}/t")
    assert [one.name for one in found.teachers] == ["a"]
    assert f"{bucket}/t/b cannot be read" in found.skipped[0]


def test_teachers_within_and_beside_each_other_keep_their_own_files(place: str) -> None:
    names = ["a", "a-b", "a/inner", "a.b", "b"]
    digests = {name: teacher(join_uri(place, name), name) for name in names}
    found = find(place)
    assert {one.digest for one in found.teachers} == {*digests.values()}
    assert found.skipped == []
