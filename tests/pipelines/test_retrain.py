"""Retraining: the platform's API over HTTP, the watcher, and many of them that are killed."""

from __future__ import annotations

import json
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest
import yaml
from kfp import compiler, local

from components.find_teachers import run_reports
from components.find_teachers.entries import Claim, LedgerEntry, WorkItem
from components.find_teachers.ledger import Ledger
from components.find_teachers.limits import RetrainLimits
from components.find_teachers.runs import UploadedPipeline, cause_of
from components.find_teachers.sources import AnnouncedTeacher, find
from components.find_teachers.watch import (
    OTHER_SETTINGS,
    RESULT_SETTINGS,
    Watcher,
    find_and_start,
    run_name,
    table,
)
from components.finish_run.outcome import gpu_hours, write_outcome
from dmd2.errors import Refused
from dmd2.io.artifact import MANIFEST, Manifest
from dmd2.io.local import json_digest
from dmd2.io.storage import join_uri, open_store
from pipelines.distill import distill
from pipelines.pods import USES_HUB, USES_REGISTRY
from pipelines.retrain import retrain
from tests.bucket import Proxy, wait_until
from tests.pipelines import retraining
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
    assert {*RESULT_SETTINGS, *OTHER_SETTINGS} <= {*distill.pipeline_spec.root.input_definitions.parameters}


def test_what_a_run_starts_from_is_part_of_the_work_and_where_it_runs_is_not(watch: Watcher) -> None:
    def key(**settings: Any) -> str:
        return replace(watch, settings={"recipe": "edm-digits"} | settings).work(TEACHERS[0]).key

    values = {"gpus": 8, "nodes": 1, "pool": {}, "queue": "q", "budget": 9.0, "parts": 3}
    assert {key(**{name: value}) for name, value in values.items()} == {key()}
    names = ("start", "pairs", "prompts", "vae", "base", "first_overrides")
    assert len({key(), *(key(**{name: "gs://b/x"}) for name in names)}) == 7
    assert watch.recipe.startswith("95a207f591b422c7"), (
        "a stored format: with another, all is distilled again"
    )


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


def test_runs_that_are_made_late_or_twice_are_stopped_and_those_of_others_are_not(
    watch: Watcher, platform: Platform, faults: Proxy
) -> None:
    """The platform answers an error, knows no run, and makes it all the same; it waits for a machine and cannot refuse itself."""
    platform.page = 2
    faults.fail(CREATE, "503", times=1)
    assert watch.start(TEACHERS[:1]) == []
    released = only(watch)
    claim = Claim(watch.ledger.store.uri, released.work.key, released.claim)

    def made(claim: str) -> str:
        return watch.runs.start("retrain-a", {"claim": claim})

    late = made(claim.text)
    watch.reconcile()
    assert watch.runs.state(late).health == "cancelled"
    (run,) = watch.start(TEACHERS[:1])
    others = [made(""), made(f"gs://another/ledger/entries/{claim.key}.json#{claim.token}")]
    del platform.runs[others[0]]["runtime_config"]  # a person's run without parameters
    stray = [made(claim.text), made(claim_of(platform, run).text)]
    watch.reconcile()
    assert [watch.runs.state(one).health for one in stray] == ["cancelled"] * 2
    assert [watch.runs.state(one).health for one in [*others, run]] == ["alive"] * 3
    reason = "is of a claim that was released or is another run's, and is stopped"
    assert [problem.endswith(reason) for problem in watch.problems] == [False, True, True, True]
    watch.reconcile()
    assert len(watch.problems) == 4, "each is stopped once"


def test_a_watcher_that_cannot_list_the_runs_does_the_rest(
    watch: Watcher, platform: Platform, faults: Proxy
) -> None:
    (run,) = watch.start(TEACHERS[:1])
    platform.runs[run]["state"] = "FAILED"
    faults.fail("GET /apis/v2beta1/runs?", "503", times=1)
    watch.reconcile()
    assert watch.problems[0].startswith("the platform: ")
    assert only(watch).state == "failed"


def test_a_run_that_could_not_be_created_gives_its_claim_back_and_is_not_counted(
    watch: Watcher, platform: Platform, faults: Proxy
) -> None:
    faults.fail(CREATE, "503", times=1)
    assert watch.start(TEACHERS[:1]) == []
    assert (only(watch).state, only(watch).failures) == ("waiting", ())
    assert "does not answer as it should" in only(watch).reason
    assert "does not answer as it should" in watch.problems[0]
    assert len(watch.start(TEACHERS[:1])) == 1


def test_a_teacher_whose_run_is_refused_keeps_no_other_back_and_is_quarantined_with_the_reason(
    watch: Watcher, platform: Platform
) -> None:
    platform.refuses = "gs://b/t/a"
    assert len(watch.start(TEACHERS)) == 2
    assert states(watch) == {"a": "failed", "b": "running", "c": "running"}
    assert "the platform refuses run" in watch.problems[0]
    roomy = replace(watch, limits=RetrainLimits(9, 1e9))
    for _ in range(5):
        assert roomy.start(TEACHERS) == []
    (refused,) = (entry for entry in watch.ledger.entries() if entry.teacher.endswith("/a"))
    assert (refused.state, len(refused.failures)) == ("quarantined", 3)
    assert "failed 3 times, at last: the platform refuses run" in refused.reason
    assert watch.ledger.capacity(watch.limits).gpu_hours == 16, "what never ran costs nothing"


def test_a_platform_that_is_down_is_not_asked_for_every_teacher(
    watch: Watcher, platform: Platform, faults: Proxy
) -> None:
    many = [AnnouncedTeacher(f"t{n}", f"gs://b/t/{n}", f"digest-{n}") for n in range(9)]
    watch = replace(watch, limits=RetrainLimits(9, 1e9))
    faults.fail(f"(GET|POST) {V2}/runs", "503")
    assert watch.start(many) == []
    assert len(watch.problems) == 3
    assert not platform.runs
    faults.rules.clear()
    assert len(watch.start(many)) == 6, (
        "whether the first three were started is found out when their leases end"
    )
    lost(watch).reconcile()
    assert len(watch.start(many)) == 3


def test_an_entry_that_cannot_be_read_keeps_no_other_teacher_back(watch: Watcher, platform: Platform) -> None:
    broken = watch.work(TEACHERS[0]).key
    watch.ledger.store.write(f"entries/{broken}.json", b'{"state": ')
    watch.ledger.store.write("entries/stray.json", b"")
    watch.reconcile()
    assert len(watch.problems) == 2
    assert f"entry {broken}: " in watch.problems[0]
    assert len(watch.start(TEACHERS)) == 2
    assert states(watch) == {"b": "running", "c": "running"}
    assert watch.ledger.store.read(f"entries/{broken}.json") == b'{"state": '


def test_a_run_that_the_platform_cannot_show_keeps_no_other_entry_back(
    watch: Watcher, platform: Platform, faults: Proxy
) -> None:
    first, second = watch.start(TEACHERS)
    for run in (first, second):
        platform.runs[run] |= {"state": "FAILED", "why": "out of memory"}
    faults.fail(f"GET {V2}/runs/{first}", "503")
    watch.reconcile()
    assert states(watch) == {"a": "running", "b": "failed"}
    assert f"run {first}" in watch.problems[0]


# Deadlines


def later(watch: Watcher, platform: Platform, **by: float) -> Watcher:
    """The watcher of another day: a new one, which asks the platform for the time."""
    then = datetime.now(UTC) + timedelta(**by)
    platform.clock = lambda: then
    runs = UploadedPipeline("dmd2-distill")
    return replace(watch, runs=runs, ledger=replace(watch.ledger, clock=runs.now), problems=[])


def test_runs_that_stay_pending_are_given_up_without_being_counted_and_others_start(
    watch: Watcher, platform: Platform
) -> None:
    stuck = watch.start(TEACHERS)
    for run in stuck:
        platform.runs[run]["state"] = "PENDING"
    platform.terminates = False
    soon = later(watch, platform, hours=23)
    soon.reconcile()
    assert soon.start(TEACHERS) == []
    watch = later(watch, platform, days=90)
    watch.reconcile()
    assert [platform.runs[run]["state"] for run in stuck] == ["CANCELING"] * 2
    assert "has waited for its machine for 2160 hours and is stopped" in watch.problems[0]
    assert watch.ledger.capacity(watch.limits).gpu_hours == 0, "they never began"
    (third, _) = watch.start(TEACHERS)
    assert platform.runs[third]["runtime_config"]["parameters"]["teacher"] == "gs://b/t/c", (
        "it was tried least"
    )
    assert all(entry.counted_failures == 0 for entry in watch.ledger.entries())
    for run in stuck:
        with pytest.raises(Refused, match="gives way"):
            watch.ledger.begin(claim_of(platform, run), run)


def test_a_run_that_has_begun_is_stopped_before_its_entry_is_free(watch: Watcher, platform: Platform) -> None:
    (run,) = watch.start(TEACHERS[:1])
    watch.ledger.begin(claim_of(platform, run), run)
    platform.runs[run] |= {
        "run_details": {"task_details": [{"state": "PENDING", "start_time": retraining._time()}]}
    }
    platform.terminates = False
    watch = later(watch, platform, hours=25)
    watch.reconcile()
    assert (only(watch).state, platform.runs[run]["state"]) == ("running", "CANCELING")
    assert watch.start(TEACHERS[:1]) == []
    platform.runs[run]["state"] = "CANCELED"
    watch.reconcile()
    assert (only(watch).state, only(watch).counted_failures) == ("waiting", 0)
    assert "has waited for its machine for 25 hours" in only(watch).reason
    assert watch.ledger.capacity(watch.limits).gpu_hours == 8, "it may have used what was planned"
    assert len(watch.start(TEACHERS[:1])) == 1


def test_a_run_that_does_not_end_when_it_is_stopped_is_given_up_after_a_day(
    watch: Watcher, platform: Platform
) -> None:
    (run,) = watch.start(TEACHERS[:1])
    watch.ledger.begin(claim_of(platform, run), run)
    platform.terminates = False
    for days, state in ((8, "running"), (8.5, "running"), (9.5, "waiting")):
        watch = later(watch, platform, days=days)
        watch.reconcile()
        assert only(watch).state == state


def test_a_run_that_takes_too_long_is_stopped_and_counted(watch: Watcher, platform: Platform) -> None:
    (run,) = watch.start(TEACHERS[:1])
    watch.ledger.begin(claim_of(platform, run), run)
    watch = later(watch, platform, days=8)
    watch.reconcile()
    watch.reconcile()
    assert (only(watch).state, only(watch).counted_failures) == ("failed", 1)
    assert only(watch).reason == "is still at work after 192 hours"


@pytest.mark.parametrize(
    ("said", "cause"),
    [
        ("exit status 76: diverged at step 3", "teacher"),
        ("Error (exit code 64)", "teacher"),
        ("OOMKilled (exit code 137)", "teacher"),
        ("pod deleted", "infrastructure"),
        ("The node was low on resource: ephemeral-storage", "infrastructure"),
        ("Preempted in order to admit critical pod", "infrastructure"),
        ("Error (exit code 75)", "infrastructure"),
        ("exit status 79", "infrastructure"),
        ("has waited for its machine for 25 hours", "infrastructure"),
        ("is still at work after 192 hours", "unknown"),
        ("", "unknown"),
    ],
)
def test_the_cause_of_a_failure_is_read_from_its_message(said: str, cause: str) -> None:
    assert cause_of(said) == cause


def test_preempted_runs_are_tried_again_without_end_and_without_being_counted(
    watch: Watcher, platform: Platform
) -> None:
    for _ in range(5):
        (run,) = watch.start(TEACHERS[:1])
        watch.ledger.begin(claim_of(platform, run), run)
        platform.runs[run] |= {"state": "FAILED", "why": "pod deleted"}
        watch.reconcile()
        assert (only(watch).state, only(watch).counted_failures) == ("waiting", 0)


# The budget


def test_the_time_is_that_of_the_platform(watch: Watcher, platform: Platform) -> None:
    watch = later(watch, platform, days=400)
    watch.start(TEACHERS[:1])
    assert abs(only(watch).changed - platform.clock()) < timedelta(minutes=1)


def test_what_a_run_reports_takes_the_place_of_what_was_planned(watch: Watcher, platform: Platform) -> None:
    watch = replace(watch, limits=RetrainLimits(9, 100))
    first, second = watch.start(TEACHERS[:2])
    assert watch.ledger.capacity(watch.limits).gpu_hours == 16
    watch.ledger.done(claim_of(platform, first), first, "accepted", "p", 60)
    assert watch.ledger.capacity(watch.limits).gpu_hours == 68
    assert watch.start(TEACHERS) == [], "another one would take 60 as well"
    assert watch.waiting == {"68 of at most 100 GPU-hours are spent in 7 days, a run takes 60": 1}
    watch.ledger.done(claim_of(platform, second), second, "accepted", "p", 20)
    assert watch.ledger.capacity(watch.limits).gpu_hours == 80


def test_what_was_spent_is_not_forgotten_with_an_entry(watch: Watcher, platform: Platform) -> None:
    watch = replace(watch, limits=RetrainLimits(9, 20))
    (run,) = watch.start(TEACHERS[:1])
    watch.ledger.done(claim_of(platform, run), run, "rejected", "")
    for left in (12, 4):
        watch.ledger.store.delete([f"entries/{watch.work(TEACHERS[0]).key}.json"])
        assert watch.ledger.capacity(watch.limits).gpu_hours == 20 - left
        if left > 8:
            (run,) = watch.start(TEACHERS[:1])
            watch.ledger.done(claim_of(platform, run), run, "rejected", "")
    assert watch.start(TEACHERS) == []
    assert later(watch, platform, days=8).start(TEACHERS) != []


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
        (
            {"settings": {"recipe": "sdxl-4step"}, "gpu_hours": 0},
            "gpu_hours is 0, and a distillation takes 8 GPUs",
        ),
        ({"pending_hours": 0}, "pending_hours is 0"),
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
    assert executor["podMetadata"]["labels"].items() >= {USES_HUB: "true", USES_REGISTRY: "true"}.items()


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


def test_the_gpu_hours_of_a_run_are_those_of_its_stages(tmp_path: Path) -> None:
    def finished(name: str, kind: str, hours: float, **facts: Any) -> None:
        manifest = Manifest(
            kind=kind, config=None, inputs={}, files=[], facts=facts, versions={}, seconds=3600 * hours
        )
        open_store(join_uri(tmp_path, name)).write(MANIFEST, manifest.model_dump_json().encode())

    finished("evaluation", "evaluation", 2)
    assert gpu_hours(str(tmp_path)) is None
    finished("run", "run", 10, gpus=8)
    assert gpu_hours(str(tmp_path)) == 82
    finished("first", "run", 1, gpus=8)
    finished("shards", "shards", 100)
    assert gpu_hours(str(tmp_path)) == 90
    assert "- spent: 90.00 GPU-hours, 225.00 at 2.5 an hour" in write_outcome(
        str(tmp_path), "a", "FAILED", "", 2.5
    )
    assert json.loads((tmp_path / "outcome.json").read_text())["cost"] == 225
    finished("run", "run", 10)
    assert gpu_hours(str(tmp_path)) is None, "by an older version"
    finished("run", "run", 10, gpus=0)
    finished("first", "run", 1, gpus=0)
    assert gpu_hours(str(tmp_path)) == 0


def test_a_run_that_a_person_has_started_records_nothing(tmp_path: Path) -> None:
    assert run_reports.NO_CLAIM in run_reports.report_start("", "run")
    assert run_reports.NO_CLAIM in run_reports.report_end("", "run", str(tmp_path), "FAILED", "why")


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_run_whose_stages_fail_leaves_an_unknown_cause_to_the_watcher(
    watch: Watcher, locally: Path
) -> None:
    """Through KFP's runner, whose exit task is told how the others ended."""
    claim = begun(watch.ledger, watch, "run-1")
    with pytest.raises(RuntimeError, match="stage"):
        recorded(claim=claim.text, run="run-1", root=str(locally), fail=True)
    assert only(watch).state == "running", (
        "the cause is not known here, so the next watcher asks the platform"
    )


# Many watchers

LIMIT_S = 1800
"""Only not to wait for ever."""
MOST_KILLED = 100
"""Watchers that are killed: on a busy machine all would die before they have done anything, without an end."""


@dataclass
class Crowd:
    """Many watchers that look at the same teachers, and the platform on which their runs are processes."""

    world: World
    count: int
    platform: Platform = field(default_factory=Platform)
    dice: random.Random = field(default_factory=lambda: random.Random(0))
    stuck: int = 0
    """So many of the next runs of the teacher `stuck` get no machine."""
    watchers: list[ForkServerProcess] = field(default_factory=list)
    killed: int = 0

    @contextmanager
    def working(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        self.platform.begin, self.platform.health = self._begin, self._health
        with self.platform.serving():
            self.platform.upload("dmd2@sha256:1")
            self.world.environment["KF_PIPELINES_ENDPOINT"] = self.platform.url
            monkeypatch.setenv("KF_PIPELINES_ENDPOINT", self.platform.url)
            self.watchers = [self._watcher() for _ in range(self.count)]
            yield
        assert not self.platform.refused

    def until(self, settled: Callable[[], bool], describe: Callable[[], str]) -> None:
        """Kill a watcher now and then, and start another one for each that is dead."""
        limit = time.monotonic() + LIMIT_S
        while not settled():
            assert time.monotonic() < limit, describe()
            time.sleep(0.3)
            if self.killed < MOST_KILLED:
                victim = self.watchers[self.dice.randrange(self.count)]
                with self.platform.lock:
                    self.killed += victim.is_alive()
                    victim.kill()
            self.watchers = [self._watcher() if one.exitcode is not None else one for one in self.watchers]

    def waiting_runs(self) -> list[str]:
        """Runs that wait for a machine, which no run of the tests ever gets."""
        return [run for run, its in self.platform.runs.copy().items() if its["state"] == "PENDING"]

    def end(self) -> None:
        with self.platform.lock:
            for one in self.watchers:
                one.kill()
        self.wait_for_runs()

    def wait_for_runs(self) -> None:
        runs = self.platform.runs.values()
        wait_until(
            lambda: all(self._health(run) not in ("RUNNING", "PENDING") for run in runs if run["begun"])
        )

    def _watcher(self) -> ForkServerProcess:
        with self.platform.lock:
            return forked(watcher, self.world, self.dice.getrandbits(32))

    def _begin(self, run: dict[str, Any]) -> ForkServerProcess | None:
        parameters = run["runtime_config"]["parameters"]
        if parameters["teacher"].endswith("stuck") and self.stuck:
            self.stuck -= 1
            run["state"] = "PENDING"
            return None
        if parameters["teacher"].endswith("preempted"):
            run["why"] = "pod deleted"
        return forked(distillation, self.world, run["run_id"], parameters, self.dice.getrandbits(32))

    def _health(self, run: dict[str, Any]) -> str:
        if run["begun"] is None:
            return str(run["state"])
        status = run["begun"].exitcode
        return "RUNNING" if status is None else "FAILED" if status else "SUCCEEDED"


def _world(bucket: str, object_store: str, folder: Path, teachers: list[str], limits: RetrainLimits) -> World:
    for name in teachers:
        teacher(f"{bucket}/teachers/{name}", name)
    environment = {"STORAGE_EMULATOR_HOST": object_store, "DMD2_RETRY_S": "30", "HOME": str(folder)}
    sources = f"registry+http://127.0.0.1:9 {bucket}/teachers s3://nowhere/teachers"
    return World(environment, sources, f"{bucket}/ledger", f"{bucket}/root", folder, limits, preemptions=4)


BAD = ["poison", "refused", "broken"]
"""Teachers that diverge, that the platform refuses, and whose entry is damaged."""


@pytest.mark.parametrize(
    ("count", "teachers", "deaths", "unlucky"),
    [(8, 3, 2, []), pytest.param(50, 8, 10, ["stuck", "preempted"], marks=pytest.mark.slow)],
)
def test_many_watchers_that_are_killed_distil_every_teacher_once_or_say_why_not(
    bucket: str,
    object_store: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    count: int,
    teachers: int,
    deaths: int,
    unlucky: list[str],
) -> None:
    names = [*(f"teacher-{n}" for n in range(teachers)), *unlucky, *BAD]
    limits = RetrainLimits(3, 1e9, pending=timedelta(seconds=8))
    world = _world(bucket, object_store, tmp_path, names, limits)
    crowd = Crowd(world, count, stuck=2 if unlucky else 0)
    platform, ledger = crowd.platform, Ledger(open_store(world.ledger))
    platform.refuses = f"{bucket}/teachers/refused"
    broken = f"entries/{_key(f'{bucket}/teachers/broken', platform)}.json"
    ledger.store.write(broken, b'{"state": ')
    with crowd.working(monkeypatch):
        crowd.until(
            lambda: _settled(ledger.entries(), len(names) - 1) and not crowd.waiting_runs(),
            lambda: table(ledger.entries()),
        )
        crowd.end()
        before, again = len(world.noted("gave-way")), [run for run in platform.runs.values() if run["begun"]]
        for run in again:  # as if each creation had been repeated by somebody, long after
            UploadedPipeline("dmd2-distill").start(run["display_name"], run["runtime_config"]["parameters"])
        crowd.wait_for_runs()
    assert len(world.noted("gave-way")) == before + len(again)
    assert ledger.store.read(broken) == b'{"state": '
    by_name = {entry.teacher.rpartition("/")[2]: entry for entry in ledger.entries()}
    assert set(by_name) == {*names} - {"broken"}
    assert world.noted("overlap") == []
    assert world.noted("crowded") == []
    began = Counter(line.split()[0] for line in world.noted("began"))
    distilled = Counter(line.split()[0] for line in world.noted("distilled"))
    for name, entry in by_name.items():
        assert began[name] == sum(one.gpu_hours is None for one in entry.failures) + (
            entry.state == "done"
        ), name
        if entry.state == "done":
            assert (distilled[name], entry.decision) == (1, "accepted")
            assert open_store(entry.package).version("manifest.json")
        else:
            assert entry.state == "quarantined"
            assert entry.counted_failures == 3
            assert entry.reason.startswith("failed 3 times, at last: ")
    assert all(by_name[name].state == "quarantined" for name in ("poison", "refused"))
    assert all(
        (by_name[n].state, by_name[n].counted_failures) == ("done", 0) for n in unlucky if n == "preempted"
    )
    # Runs that got no machine were stopped, also where their claim had been released because their watcher was slow.
    assert not crowd.waiting_runs()
    without_machine = {
        claim_of(platform, run).token for run, its in platform.runs.items() if not its["begun"]
    }
    assert bool(without_machine) == bool(unlucky)
    assert not without_machine & {entry.claim for entry in by_name.values()}
    assert all(by_name[n].state == "done" for n in unlucky if n == "stuck")
    assert all(len(by_name[n].failures) >= 2 for n in unlucky if n == "preempted")
    assert crowd.killed + len(world.noted("died")) >= deaths


def _key(address: str, platform: Platform) -> str:
    """Key of the entry of a teacher, as the watchers compute it."""
    (one,) = find(address).teachers
    image = json_digest(
        sorted(
            {
                retraining.spec("dmd2@sha256:1")["pipeline_spec"]["deploymentSpec"]["executors"][
                    "exec-distill"
                ]["container"]["image"]
            }
        )
    )
    recipe = json_digest(dict.fromkeys(RESULT_SETTINGS) | {"recipe": "edm-digits"})
    return WorkItem(teacher=one.digest, recipe=recipe, image=image).key


@pytest.mark.slow
def test_many_watchers_never_spend_more_than_the_budget(
    bucket: str, object_store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = RetrainLimits(3, 6.0)
    names = [f"teacher-{n}" for n in range(30)]
    world = _world(bucket, object_store, tmp_path, names, limits)
    crowd, ledger = Crowd(world, 50), Ledger(open_store(world.ledger))
    removed: list[str] = []

    def spent() -> bool:
        capacity = ledger.capacity(limits)
        assert capacity.gpu_hours <= limits.gpu_hours
        for entry in ledger.entries():  # a person removes what is done, to distil it again
            if entry.state == "done" and len(removed) < 3:
                removed.append(entry.work.key)
                ledger.store.delete([f"entries/{entry.work.key}.json"])
        return not capacity.active and capacity.gpu_hours + 1 > limits.gpu_hours

    with crowd.working(monkeypatch):
        crowd.until(spent, lambda: table(ledger.entries()))
        crowd.end()
    assert sum(map(float, world.noted("spent"))) <= limits.gpu_hours
    assert len(world.noted("began")) >= 5
    assert len(removed) == 3
    assert world.noted("overlap") == []


def _settled(entries: list[LedgerEntry], count: int) -> bool:
    return len(entries) == count and all(entry.state in ("done", "quarantined") for entry in entries)
