"""Retraining: sources of teachers, the platform's API over HTTP, the watcher, and many of them that are killed."""

from __future__ import annotations

import json
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from http.server import BaseHTTPRequestHandler
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest
import yaml
from kfp import compiler, local

from components.find_teachers import run_reports
from components.find_teachers.ledger import Claim, Ledger, LedgerEntry, RetrainLimits
from components.find_teachers.runs import UploadedPipeline
from components.find_teachers.sources import AnnouncedTeacher, find
from components.find_teachers.watch import (
    RESULT_SETTINGS,
    RUN_SETTINGS,
    Watcher,
    find_and_start,
    run_name,
    table,
)
from dmd2.io.storage import join_uri, open_store
from pipelines.distill import distill
from pipelines.retrain import retrain
from tests.bucket import Proxy, serve, wait_until
from tests.pipelines.recorded import recorded
from tests.pipelines.retraining import (
    V2,
    Platform,
    World,
    announce,
    distillation,
    forked,
    teacher,
    watcher,
)

CREATE = rf"POST {V2}/runs$"


@pytest.fixture(autouse=True)
def no_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the user's own, as the client of the platform would read it."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("KF_PIPELINES_ENDPOINT", raising=False)


@pytest.fixture
def platform(monkeypatch: pytest.MonkeyPatch) -> Iterator[Platform]:
    with Platform().serving() as platform:
        platform.upload("dmd2@sha256:1")
        monkeypatch.setenv("KF_PIPELINES_ENDPOINT", platform.url)
        yield platform
    assert not platform.refused


@pytest.fixture
def faults(platform: Platform, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """Stands before the platform."""
    with Proxy(platform.url).serving() as proxy:
        monkeypatch.setenv("KF_PIPELINES_ENDPOINT", proxy.url)
        yield proxy


@pytest.fixture
def pipeline(platform: Platform) -> UploadedPipeline:
    return UploadedPipeline("dmd2-distill")


# Sources


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

    class Answers(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            status, answer = answers.get(self.path, (404, {"error": "nothing there"}))
            self.send_response(status)
            if status == 404:
                self.send_header("X-Error-Code", "RepoNotFound")
            self.end_headers()
            self.wfile.write(json.dumps(answer).encode())

        def log_message(self, *_: Any) -> None:
            pass

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


# The platform


def test_a_run_is_started_found_by_its_name_and_asked(platform: Platform, pipeline: UploadedPipeline) -> None:
    run = pipeline.start("retrain-a-1", {"teacher": "gs://b/a", "recipe": "edm-digits"})
    made = platform.runs[run]
    assert made["display_name"] == "retrain-a-1"
    assert made["runtime_config"]["parameters"] == {"teacher": "gs://b/a", "recipe": "edm-digits"}
    assert made["pipeline_version_reference"]["pipeline_version_id"] == "version-0"
    assert pipeline.find("retrain-a-1") == run
    assert pipeline.find("retrain-a") == ""
    for state, health in {"RUNNING": "alive", "PENDING": "alive", "CANCELING": "alive", "SUCCEEDED": "succeeded",
                          "FAILED": "failed", "CANCELED": "cancelled"}.items():  # fmt: skip
        made["state"] = state
        assert pipeline.state(run).health == health
    made |= {"state": "FAILED", "why": "no space"}
    assert pipeline.state(run).reason == "the run ended as FAILED: step distill: no space"
    del platform.runs[run]
    assert pipeline.state(run).health == "gone"


def test_the_newest_version_is_run_and_its_images_are_part_of_the_work(platform: Platform) -> None:
    images = [UploadedPipeline("dmd2-distill").image]
    platform.upload("dmd2@sha256:2")
    images.append(UploadedPipeline("dmd2-distill").image)
    platform.upload("dmd2@sha256:1")
    images.append(UploadedPipeline("dmd2-distill").image)
    assert images[0] == images[2] != images[1]
    run = UploadedPipeline("dmd2-distill").start("a", {})
    assert platform.runs[run]["pipeline_version_reference"]["pipeline_version_id"] == "version-2"


def test_runs_may_have_a_service_account(platform: Platform) -> None:
    run = UploadedPipeline("dmd2-distill", "distiller").start("a", {})
    assert platform.runs[run]["service_account"] == "distiller"


def test_a_pipeline_that_was_not_uploaded_is_refused(platform: Platform, refusal: Callable[..., str]) -> None:
    assert "pipeline 'dmd3' is not there; upload it first" in refusal(lambda: UploadedPipeline("dmd3").image)


def test_what_the_platform_says_is_an_error_of_its_kind(
    platform: Platform, faults: Proxy, refusal: Callable[..., str]
) -> None:
    pipeline = UploadedPipeline("dmd2-distill")
    assert "unknown parameters ['nodez']" in refusal(lambda: pipeline.start("a", {"nodez": 2}))
    faults.fail(f"GET {V2}/runs", "403", times=1)
    with pytest.raises(PermissionError, match="not allowed by the platform"):
        pipeline.find("a")
    faults.fail(f"GET {V2}/runs", "503", times=1)
    with pytest.raises(OSError, match="does not answer as it should"):
        pipeline.find("a")
    faults.fail(CREATE, "lost", times=1)
    with pytest.raises(OSError, match="the platform does not answer"):
        pipeline.start("a", {})


def test_two_watchers_may_make_the_experiment_at_once(platform: Platform) -> None:
    pipelines = [UploadedPipeline("dmd2-distill") for _ in range(2)]
    barrier = threading.Barrier(2)
    found: list[str] = []

    def make(pipeline: UploadedPipeline) -> None:
        pipeline._client.get_experiment = _at_once(pipeline._client.get_experiment, barrier)
        compute = vars(UploadedPipeline)["_experiment"].func  # a cached property computes one at a time
        found.append(compute(pipeline))

    threads = [threading.Thread(target=make, args=(pipeline,)) for pipeline in pipelines]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert found == ["experiment-0"] * 2


def _at_once(call: Callable[..., Any], barrier: threading.Barrier) -> Callable[..., Any]:
    """The first time, the answer is only handed on once both have asked."""
    first = [True]

    def both(**arguments: Any) -> Any:
        try:
            return call(**arguments)
        finally:
            if first:
                first.clear()
                barrier.wait(30)

    return both


# One watcher


@pytest.fixture
def watch(pipeline: UploadedPipeline, tmp_path: Path) -> Watcher:
    ledger = Ledger(open_store(tmp_path / "ledger"))
    settings = {"recipe": "edm-digits"}
    return Watcher(ledger, pipeline, settings, str(tmp_path / "root"), 8, RetrainLimits(2, 100), "watcher-1")


TEACHERS = [AnnouncedTeacher(name, f"gs://b/t/{name}", f"digest-of-{name}") for name in ("a", "b", "c")]


def states(watch: Watcher) -> dict[str, str]:
    return {entry.teacher.rpartition("/")[2]: entry.state for entry in watch.ledger.entries()}


def only(watch: Watcher) -> LedgerEntry:
    (entry,) = watch.ledger.entries()
    return entry


def claim_of(platform: Platform, run: str) -> Claim:
    return Claim.read(platform.runs[run]["runtime_config"]["parameters"]["claim"])


def test_each_new_teacher_gets_one_run_as_far_as_there_is_room(watch: Watcher, platform: Platform) -> None:
    started = watch.start(TEACHERS)
    assert watch.start(TEACHERS) == []
    assert states(watch) == {"a": "running", "b": "running"}
    parameters = platform.runs[started[0]]["runtime_config"]["parameters"]
    claim = Claim.read(parameters["claim"])
    assert parameters == {
        "teacher": "gs://b/t/a", "recipe": "edm-digits", "root": join_uri(watch.root, claim.key), "claim": claim.text,
    }  # fmt: skip
    assert watch.ledger.begin(claim, started[0]).owner == "watcher-1"
    watch.ledger.done(claim, started[0], "rejected", "")
    assert len(watch.start(TEACHERS)) == 1
    assert states(watch) == {"a": "done", "b": "running", "c": "running"}


def test_another_recipe_source_or_image_is_new_work_and_more_gpus_are_not(
    watch: Watcher, platform: Platform
) -> None:
    def key(watch: Watcher) -> str:
        return watch.work(TEACHERS[0]).key

    assert key(replace(watch, settings={"recipe": "edm-digits", "queue": "q"})) == key(watch)
    keys = {
        key(replace(watch, settings={"recipe": "edm-digits"} | more))
        for more in ({"source": "s"}, {"recipe": "r"})
    }
    platform.upload("dmd2@sha256:2")
    keys.add(key(replace(watch, runs=UploadedPipeline("dmd2-distill"))))
    assert len(keys | {key(watch)}) == 4


def test_what_it_sets_and_compares_are_parameters_of_the_pipeline() -> None:
    assert {*RESULT_SETTINGS, *RUN_SETTINGS} <= {*distill.pipeline_spec.root.input_definitions.parameters}


def test_teachers_that_never_failed_come_first(watch: Watcher, platform: Platform) -> None:
    (run,) = watch.start(TEACHERS[:1])
    watch.ledger.failed(claim_of(platform, run), run, "why")
    assert [platform.runs[run]["display_name"].split("-")[1] for run in watch.start(TEACHERS)] == ["b", "c"]


def test_a_run_whose_creation_was_not_answered_is_found_and_not_started_again(
    watch: Watcher, platform: Platform, faults: Proxy
) -> None:
    faults.fail(CREATE, "lost", times=1)
    started = watch.start(TEACHERS[:1])
    assert started == list(platform.runs)
    assert faults.injected["lost"] == 1
    assert (only(watch).state, only(watch).run) == ("running", started[0])


def test_a_run_that_could_not_be_created_gives_its_claim_back(
    watch: Watcher, platform: Platform, faults: Proxy
) -> None:
    faults.fail(CREATE, "503", times=1)
    with pytest.raises(OSError, match="does not answer as it should"):
        watch.start(TEACHERS[:1])
    assert only(watch).state == "waiting"
    assert "does not answer as it should" in only(watch).reason
    assert len(watch.start(TEACHERS[:1])) == 1


def test_a_run_that_the_platform_refuses_gives_its_claim_back(
    watch: Watcher, refusal: Callable[..., str]
) -> None:
    wrong = replace(watch, settings={"nodez": 2})
    assert "nodez" in refusal(lambda: wrong.start(TEACHERS[:1]))
    assert only(watch).state == "waiting"


def lost(watch: Watcher) -> Watcher:
    """The same watcher, when every lease is over."""
    return replace(
        watch,
        ledger=replace(watch.ledger, clock=lambda: Ledger(watch.ledger.store).clock() + timedelta(days=1)),
    )


def test_the_run_of_a_watcher_that_was_lost_is_found_by_its_name(watch: Watcher, platform: Platform) -> None:
    claim = watch.ledger.claim(watch.work(TEACHERS[0]), TEACHERS[0].address, "lost", 8, watch.limits)
    assert claim
    run = watch.runs.start(run_name(TEACHERS[0].address, claim), {"claim": claim.text})
    watch.reconcile()
    assert only(watch).state == "claimed"  # it may be at it
    lost(watch).reconcile()
    assert (only(watch).state, only(watch).run) == ("running", run)
    assert lost(watch).start(TEACHERS[:1]) == []


def test_the_claim_of_a_watcher_that_was_lost_before_it_started_a_run_is_given_back(watch: Watcher) -> None:
    watch.ledger.claim(watch.work(TEACHERS[0]), TEACHERS[0].address, "lost", 8, watch.limits)
    lost(watch).reconcile()
    assert (only(watch).state, only(watch).reason) == (
        "waiting",
        "watcher lost died before it started a run",
    )
    assert len(watch.start(TEACHERS[:1])) == 1


def test_a_run_that_died_is_started_again_and_after_three_times_quarantined(
    watch: Watcher, platform: Platform
) -> None:
    for _ in range(3):
        (run,) = watch.start(TEACHERS[:1])
        watch.reconcile()
        assert only(watch).state == "running"
        platform.runs[run] |= {"state": "FAILED", "why": "out of memory"}
        watch.reconcile()
    assert only(watch).state == "quarantined"
    assert (
        only(watch).reason == "failed 3 times, at last: the run ended as FAILED: step distill: out of memory"
    )
    assert watch.start(TEACHERS[:1]) == []
    roots = {run["runtime_config"]["parameters"]["root"] for run in platform.runs.values()}
    assert len(roots) == 1, "each attempt goes on where the last one stopped"


def test_a_run_that_a_person_stopped_stays_stopped(watch: Watcher, platform: Platform) -> None:
    (run,) = watch.start(TEACHERS[:1])
    platform.runs[run]["state"] = "CANCELED"
    watch.reconcile()
    assert (only(watch).state, only(watch).reason) == ("quarantined", "the run ended as CANCELED")


def test_a_run_that_was_deleted_is_a_failure(watch: Watcher, platform: Platform) -> None:
    (run,) = watch.start(TEACHERS[:1])
    del platform.runs[run]
    watch.reconcile()
    assert only(watch).state == "failed"


def test_a_run_that_ended_well_without_a_word_is_done(watch: Watcher, platform: Platform) -> None:
    (run,) = watch.start(TEACHERS[:1])
    platform.runs[run]["state"] = "SUCCEEDED"
    watch.reconcile()
    assert (only(watch).state, only(watch).decision) == ("done", "unknown")


def test_the_table_has_a_row_for_each_entry(watch: Watcher) -> None:
    watch.start(TEACHERS)
    assert table(watch.ledger.entries()).count("| running | 1 | 0 |") == 2


# The whole look, as the component does it


def looked(place: Path, **changes: Any) -> str:
    arguments: dict[str, Any] = {
        "teachers": str(place / "teachers"), "ledger": str(place / "ledger"), "root": str(place / "root"),
        "settings": {"recipe": "edm-digits"}, "pipeline": "dmd2-distill", "service_account": "",
        "max_runs": 2, "max_gpu_hours": 100, "gpu_hours": 8, "owner": "watcher",
    }  # fmt: skip
    return find_and_start(**(arguments | changes))


def test_a_look_starts_what_is_new_and_shows_the_ledger(platform: Platform, tmp_path: Path) -> None:
    teacher(str(tmp_path / "teachers/a"))
    for _ in range(2):
        assert looked(tmp_path).count("| running |") == 1
        assert len(platform.runs) == 1


def test_wrong_settings_are_refused_before_anything_is_claimed(
    platform: Platform, tmp_path: Path, refusal: Callable[..., str]
) -> None:
    teacher(str(tmp_path / "teachers/a"))
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"settings": {"recipi": "edm-digits"}}, "has no parameter 'recipi'; did you mean 'recipe'?"),
        ({"settings": {"recipe": "edm-digit"}}, "recipe is 'edm-digit'; did you mean 'edm-digits'?"),
        ({"settings": {"teacher": "t"}}, "settings has 'teacher', which retraining sets"),
        ({"max_runs": 0}, "max_runs is 0"),
        ({"gpu_hours": 101}, "no distillation could start"),
        ({"teachers": ""}, "teachers is empty"),
    ]
    for changes, sentence in wrong:
        assert sentence in refusal(lambda changes=changes: looked(tmp_path, **changes))
    assert Ledger(open_store(tmp_path / "ledger")).entries() == []


def test_the_compiled_pipeline_is_uncached_repeated_and_described(tmp_path: Path) -> None:
    compiler.Compiler().compile(retrain, str(tmp_path / "retrain.yaml"))
    spec, kubernetes = yaml.safe_load_all((tmp_path / "retrain.yaml").read_text())
    task = spec["root"]["dag"]["tasks"]["find-teachers"]
    assert not task["cachingOptions"].get("enableCache")
    assert task["retryPolicy"]["maxRetryCount"] == 2
    assert task["inputs"]["parameters"]["run_id"]["runtimeValue"]["constant"] == "{{$.pipeline_job_uuid}}"
    parameters = spec["root"]["inputDefinitions"]["parameters"]
    assert all(parameter["description"] for parameter in parameters.values())
    assert {n for n, p in parameters.items() if "defaultValue" not in p} == {
        "teachers",
        "ledger",
        "root",
        "settings",
    }
    executor = kubernetes["platforms"]["kubernetes"]["deploymentSpec"]["executors"]["exec-find-teachers"]
    assert executor["securityContext"]["runAsNonRoot"]
    assert executor["activeDeadlineSeconds"]


@pytest.fixture
def locally(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """KFP's own runner, a process per task."""
    monkeypatch.chdir(Path(__file__).parents[2])
    local.init(runner=local.SubprocessRunner(use_venv=False), pipeline_root=str(tmp_path / "kfp"))
    return tmp_path


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_the_pipeline_starts_runs(platform: Platform, locally: Path) -> None:
    for name in "abc":
        teacher(str(locally / "teachers" / name), name)
    retrain(
        teachers=str(locally / "teachers"), ledger=str(locally / "ledger"), root=str(locally / "root"),
        settings={"recipe": "edm-digits"}, max_runs=2, api="",
    )  # fmt: skip
    assert len(platform.runs) == 2
    entries = Ledger(open_store(locally / "ledger")).entries()
    assert [entry.state for entry in entries] == ["running"] * 2
    assert len({entry.owner for entry in entries}) == 1
    assert entries[0].owner
    (page,) = (locally / "kfp").rglob("table")
    assert page.read_text().count("| running |") == 2


# What a distillation says


def begun(ledger: Ledger, watch: Watcher, run: str) -> Claim:
    claim = ledger.claim(watch.work(TEACHERS[0]), "t", "w", 1, RetrainLimits(1, 1e9))
    assert claim
    assert run_reports.report_start(claim.text, run).endswith(f"is running by run {run}")
    return claim


@pytest.mark.parametrize("decision", ["accepted", "rejected"])
def test_a_run_records_that_it_is_done_and_where_its_package_is(
    watch: Watcher, tmp_path: Path, decision: str
) -> None:
    root = str(tmp_path / "run")
    announce(join_uri(root, "gate"), "gate", decision=decision)
    announce(join_uri(root, "package"), "package")
    claim = begun(watch.ledger, watch, "run-1")
    run_reports.report_end(claim.text, "run-1", root, "SUCCEEDED", "")
    assert (only(watch).state, only(watch).decision) == ("done", decision)
    assert only(watch).package == (join_uri(root, "package") if decision == "accepted" else "")


def test_a_run_that_a_person_has_started_records_nothing(tmp_path: Path) -> None:
    assert run_reports.NO_CLAIM in run_reports.report_start("", "run")
    assert run_reports.NO_CLAIM in run_reports.report_end("", "run", str(tmp_path), "FAILED", "why")


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_run_whose_stages_fail_still_records_so(watch: Watcher, locally: Path) -> None:
    """Through KFP's runner, whose exit task is told how the others ended."""
    claim = begun(watch.ledger, watch, "run-1")
    with pytest.raises(RuntimeError, match="stage"):
        recorded(claim=claim.text, run="run-1", root=str(locally), fail=True)
    assert only(watch).state == "failed"
    assert only(watch).reason.endswith("failed.")


# Many watchers

LIMIT_S = 600
"""Only not to wait for ever."""


@pytest.mark.parametrize(
    ("count", "teachers", "deaths"), [(8, 3, 2), pytest.param(50, 8, 10, marks=pytest.mark.slow)]
)
def test_many_watchers_that_are_killed_distil_every_teacher_once_or_say_why_not(
    bucket: str,
    object_store: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    count: int,
    teachers: int,
    deaths: int,
) -> None:
    names = [f"teacher-{n}" for n in range(teachers)] + ["poison"]
    for name in names:
        teacher(f"{bucket}/teachers/{name}", name)
    environment = {"STORAGE_EMULATOR_HOST": object_store, "DMD2_RETRY_S": "30", "HOME": str(tmp_path)}
    world = World(
        environment,
        f"{bucket}/teachers",
        f"{bucket}/ledger",
        f"{bucket}/root",
        tmp_path,
        RetrainLimits(3, 1e9),
    )
    dice = random.Random(0)

    def begin(run: dict[str, Any]) -> ForkServerProcess:
        return forked(
            distillation, world, run["run_id"], run["runtime_config"]["parameters"], dice.getrandbits(32)
        )

    def health(run: dict[str, Any]) -> str:
        status = run["begun"].exitcode
        return "RUNNING" if status is None else "FAILED" if status else "SUCCEEDED"

    ledger = Ledger(open_store(world.ledger))
    with Platform(begin, health).serving() as platform:
        platform.upload("dmd2@sha256:1")
        environment["KF_PIPELINES_ENDPOINT"] = platform.url

        def another() -> ForkServerProcess:
            with platform.lock:
                return forked(watcher, world, dice.getrandbits(32))

        watchers = [another() for _ in range(count)]
        killed, limit = 0, time.monotonic() + LIMIT_S
        while not _settled(entries := ledger.entries(), len(names)):
            assert time.monotonic() < limit, table(entries)
            time.sleep(0.3)
            victim = dice.randrange(count)
            with platform.lock:
                killed += watchers[victim].is_alive()
                watchers[victim].kill()
            watchers = [another() if one.exitcode is not None else one for one in watchers]
        with platform.lock:
            for one in watchers:
                one.kill()
        wait_until(lambda: all(health(run) != "RUNNING" for run in platform.runs.values()))
        before, again = len(world.noted("gave-way")), list(platform.runs.values())
        monkeypatch.setenv("KF_PIPELINES_ENDPOINT", platform.url)
        for run in again:  # as if each creation had been repeated by somebody, long after
            UploadedPipeline("dmd2-distill").start(run["display_name"], run["runtime_config"]["parameters"])
        wait_until(lambda: all(health(run) != "RUNNING" for run in platform.runs.values()))
    assert len(world.noted("gave-way")) == before + len(again)
    assert not platform.refused
    entries = ledger.entries()
    by_name = {entry.teacher.rpartition("/")[2]: entry for entry in entries}
    assert set(by_name) == {*names}
    assert world.noted("overlap") == []
    assert world.noted("crowded") == []
    began = Counter(line.split()[0] for line in world.noted("began"))
    distilled = Counter(line.split()[0] for line in world.noted("distilled"))
    for name, entry in by_name.items():
        assert began[name] == len(entry.failures) + (entry.state == "done"), name
        if entry.state == "done":
            assert (distilled[name], entry.decision) == (1, "accepted")
            assert open_store(entry.package).version("manifest.json")
        else:
            assert entry.state == "quarantined"
            assert len(entry.failures) == 3
            assert entry.reason.startswith("failed 3 times, at last: ")
    assert all(by_name[name].state == "quarantined" for name in names if "poison" in name)
    assert killed + len(world.noted("died")) >= deaths
    print(
        Counter(line.split()[0] for line in (tmp_path / "journal").read_text().splitlines()),
        killed,
        len(platform.runs),
    )


def _settled(entries: list[LedgerEntry], count: int) -> bool:
    return len(entries) == count and all(entry.state in ("done", "quarantined") for entry in entries)
