"""The command line of the pipelines against a server that holds every request and answer against the API's own contract."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import kfp_server_api
import pytest
import yaml

from dmd2 import recipes
from dmd2.errors import Refused
from dmd2.plan import predict
from pipelines import cluster
from pipelines.__main__ import PIPELINES, main
from tests import warm
from tests.pipelines.contract import offences
from tests.pipelines.server import Answer, Record, Server

Tell = Callable[..., str]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Server]:
    """One that found nothing to complain about."""
    monkeypatch.setattr(cluster, "POLL_S", 0.01)
    monkeypatch.setenv("HOME", str(tmp_path))  # kfp keeps a namespace there
    with Server().serving() as server:
        yield server
    assert not server.offences


@pytest.fixture
def tell(server: Server, capsys: pytest.CaptureFixture[str]) -> Tell:
    """`python -m pipelines WORDS` -> what it says."""

    def call(*words: str) -> str:
        starts = words[0] in ("upload", "submit", "schedule")
        main([*words, "--host", server.url, *(["--unpinned"] if starts else [])])
        return capsys.readouterr().out

    return call


@pytest.fixture
def forgiven(server: Server) -> Iterator[list[str]]:
    """For a test in which the server refuses something on purpose: what it said."""
    said: list[str] = []
    yield said
    said += server.offences
    server.offences.clear()


def submitted(server: Server) -> tuple[str, Record]:
    ((run, record),) = server.runs.items()
    return run, record


def goes(state: str, **tasks: str) -> Callable[[Record], None]:
    """The run and its steps have come so far."""
    now = datetime.now(UTC).isoformat()
    details = [
        {"display_name": name.replace("_", "-"), "state": its, "start_time": now}
        for name, its in tasks.items()
    ]

    def change(run: Record) -> None:
        run |= {"state": state, "run_details": {"task_details": details}}

    return change


def test_submit_uploads_this_version_and_starts_a_run_with_every_parameter(
    server: Server, tell: Tell
) -> None:
    told = tell(
        "submit", "--recipe", "sdxl-4step", "--source", "gs://b/images", "--teacher", "gs://b/teacher"
    )
    run, record = submitted(server)
    (version,) = server.versions.values()
    assert record["pipeline_version_reference"]["pipeline_version_id"] == version["pipeline_version_id"]
    parameters = record["runtime_config"]["parameters"]
    declared = version["pipeline_spec"]["pipeline_spec"]["root"]["inputDefinitions"]["parameters"]
    assert parameters.keys() == declared.keys()
    assert parameters["recipe"] == "sdxl-4step"
    assert parameters["pool"] == {"cloud.google.com/gke-accelerator": "nvidia-h100-80gb"}
    assert f"{server.url}/#/runs/details/{run}" in told
    assert record["display_name"].startswith("sdxl-4step-")


def test_a_version_is_uploaded_once_and_named_by_its_content(server: Server, tell: Tell) -> None:
    tell("upload")
    tell("upload")
    tell("submit")
    assert server.seen.count("upload_pipeline_version") == 3
    assert sorted(one["display_name"] for one in server.pipelines.values()) == [
        "dmd2-distill",
        "dmd2-distill-retrain",
        "dmd2-retrain",
    ]
    names = [one["display_name"] for one in server.versions.values()]
    assert all(len(name) == 16 and int(name, 16) for name in names)
    assert len(set(names)) == 3


def test_runs_of_retraining_give_way_to_those_of_people(server: Server, tell: Tell) -> None:
    tell("upload")
    tell("schedule", *SCHEDULE)
    ((_, schedule),) = server.recurring.items()
    pipeline = {one["display_name"]: known for known, one in server.pipelines.items()}
    priorities = {}
    for version in server.versions.values():
        labels = _labels(version["pipeline_spec"].get("platform_spec", {}))
        priorities[version["pipeline_id"]] = {one.get("kueue.x-k8s.io/priority-class") for one in labels} - {
            None
        }
    assert priorities[pipeline["dmd2-distill"]] == {"dmd2-run"}
    assert priorities[pipeline["dmd2-distill-retrain"]] == {"dmd2-retrain"}
    assert schedule["runtime_config"]["parameters"].get("pipeline", "dmd2-distill-retrain") in pipeline
    base = yaml.safe_load_all((Path(__file__).parents[2] / "manifests/base/queues.yaml").read_text())
    values = {one["metadata"]["name"]: one["value"] for one in base if one["kind"] == "WorkloadPriorityClass"}
    assert values["dmd2-retrain"] < values["dmd2-run"]


def _labels(settings: Any) -> list[Record]:
    """The labels of every pod in the settings of Kubernetes."""
    executors = settings["platforms"]["kubernetes"]["deploymentSpec"]["executors"] if settings else {}
    return [executor.get("podMetadata", {}).get("labels", {}) for executor in executors.values()]


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ('{"recipe": "sdxl-4step"}', "needs images with captions"),
        ('{"recipe": "edm-imagenet64", "source": "images"}', "is not there in a pod"),
        ('{"recipe": "edm-imagenet64", "source": "gs://b/i", "gpus": 3}', "cannot be divided among 3 GPUs"),
    ],
)
def test_settings_that_every_run_would_refuse_are_not_scheduled(
    server: Server, tell: Tell, settings: str, sentence: str
) -> None:
    with pytest.raises(Refused, match=sentence):
        tell("schedule", *SCHEDULE[:-1], settings)
    assert not server.recurring


def test_a_schedule_on_the_cpu_takes_no_gpu_hours(server: Server, tell: Tell) -> None:
    tell("schedule", *SCHEDULE[:-4], "--settings", '{"recipe": "edm-digits"}')
    ((_, record),) = server.recurring.items()
    assert record["runtime_config"]["parameters"]["gpu_hours"] == 0


@pytest.mark.slow
def test_a_schedule_takes_the_gpu_hours_of_all_stages_from_the_plan(server: Server, tell: Tell) -> None:
    settings = '{"recipe": "edm-digits-longer", "source": "gs://b/i", "gpus": 8}'
    tell("schedule", *SCHEDULE[:-4], "--settings", settings)
    ((_, record),) = server.recurring.items()
    planned = [
        predict(recipes.get(name), "h100-80gb").gpu_hours
        for name in ("edm-digits-no-gan", "edm-digits-longer")
    ]
    assert record["runtime_config"]["parameters"]["gpu_hours"] == pytest.approx(sum(planned), abs=0.1)
    assert min(planned) > 0


def test_a_schedule_uploads_the_distillation_that_it_starts(server: Server, tell: Tell) -> None:
    tell("schedule", *SCHEDULE)
    assert "dmd2-distill-retrain" in {one["display_name"] for one in server.pipelines.values()}


@pytest.mark.parametrize(("state", "status"), [("SUCCEEDED", 0), ("FAILED", 1), ("CANCELED", 130)])
def test_wait_ends_with_the_run_and_its_status(
    state: str, status: int, server: Server, tell: Tell, capsys: pytest.CaptureFixture[str]
) -> None:
    server.looks += [goes("RUNNING", shard_dataset="RUNNING"), goes(state, shard_dataset="SUCCEEDED")]
    code: Any = 0
    try:
        told = tell("submit", "--wait")
    except SystemExit as end:
        code, told = end.code, capsys.readouterr().out
    assert code == status
    lines = told.splitlines()
    assert lines[-4:] == [
        "run: running", "shard-dataset: running", f"run: {state.lower()}", "shard-dataset: succeeded"
    ]  # fmt: skip


def test_waiting_outlives_a_server_that_is_away_for_a_while(server: Server, tell: Tell) -> None:
    server.looks += [lambda run: setattr(server, "failing", 3), goes("SUCCEEDED")]
    assert "run: succeeded" in tell("submit", "--wait")
    assert server.failing == 0


def test_a_server_that_stays_away_gets_one_sentence_and_its_own_status(
    server: Server, tell: Tell, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = cluster.Cluster(host=server.url).client
    server.failing = 10_000
    monkeypatch.setattr("kfp.client.client.time.sleep", lambda seconds: None)
    with pytest.raises(cluster.Unavailable, match="does not answer \\(Failed getting healthz"):
        tell("status")
    monkeypatch.setattr(cluster.KfpServer, "client", client)
    with pytest.raises(cluster.Unavailable, match="says 503 \\(no healthy upstream\\)"):
        tell("status")
    monkeypatch.undo()
    assert cluster.Unavailable.status == 69
    server.url = "http://127.0.0.1:9"
    with pytest.raises(cluster.Unavailable, match=r"does not answer \(.*Connection refused\); is it"):
        tell("status")


def test_what_the_server_refuses_is_said_in_its_words(
    server: Server, tell: Tell, forgiven: list[str]
) -> None:
    with pytest.raises(Refused, match="says 404 \\(no-such-run not found\\)"):
        tell("status", "--run", "no-such-run")
    package = cluster.compile_pipeline(cluster_pipeline())
    with pytest.raises(Refused, match="none of its literals"):
        cluster.submit(
            cluster.Cluster(host=server.url, unpinned=True), package, "x", {"recipe": "sdxl-5step"}
        )


def cluster_pipeline() -> Any:
    from pipelines.distill import distill

    return distill


def test_status_tells_the_steps_of_a_run_with_their_errors_and_lists_the_last_runs(
    server: Server, tell: Tell
) -> None:
    tell("submit", "--name", "first")
    run, record = submitted(server)
    goes("FAILED", begin="SUCCEEDED", shard_dataset="FAILED")(record)
    record["run_details"]["task_details"][1]["error"] = {"code": 13, "message": "exit status 64"}
    told = tell("status", "--run", run)
    assert told.startswith(f"first: failed\n{server.url}/#/runs/details/{run}")
    assert "  begin              succeeded\n  shard-dataset      failed  exit status 64\n" in told
    assert f"{run}  failed" in tell("status")


def test_cancel_stops_a_run_and_can_wait_for_its_end(server: Server, tell: Tell) -> None:
    tell("submit")
    run, record = submitted(server)
    server.looks += [goes("CANCELING"), goes("CANCELED")]
    assert tell("cancel", "--run", run, "--wait").endswith("canceled\n")
    assert record["state"] == "CANCELED"
    assert "run_service_terminate_run" in server.seen


SCHEDULE = (
    "--teachers", "gs://b/teachers", "--ledger", "gs://b/ledger", "--root", "gs://b/runs", "--gpu-hours", "111",
    "--settings", '{"recipe": "sdxl-4step", "source": "gs://b/images"}',
)  # fmt: skip


def test_a_schedule_is_one_run_at_a_time_without_catching_up_and_is_left_alone_while_it_is_right(
    server: Server, tell: Tell
) -> None:
    first = tell("schedule", *SCHEDULE)
    ((known, record),) = server.recurring.items()
    assert known in first
    assert (record["max_concurrency"], record["no_catchup"], record["mode"]) == ("1", True, "ENABLE")
    assert record["trigger"]["cron_schedule"]["cron"] == "0 0 6 * * 1"
    assert record["runtime_config"]["parameters"]["settings"] == {
        "recipe": "sdxl-4step",
        "source": "gs://b/images",
    }
    assert tell("schedule", *SCHEDULE) == first
    assert list(server.recurring) == [known]


def test_a_schedule_that_differs_is_made_anew_before_the_old_ones_are_removed(
    server: Server, tell: Tell
) -> None:
    tell("schedule", *SCHEDULE)
    (old,) = server.recurring
    tell("schedule", *SCHEDULE, "--cron", "0 30 4 * * *")
    ((new, record),) = server.recurring.items()
    assert new != old
    assert record["trigger"]["cron_schedule"]["cron"] == "0 30 4 * * *"
    last = [name for name in server.seen if name.startswith("recurring_run_service_") and "list" not in name][
        -2:
    ]
    assert [name.split("_")[3] for name in last] == ["create", "delete"]


def test_several_schedules_of_a_name_become_one_and_others_are_not_touched(
    server: Server, tell: Tell
) -> None:
    tell("schedule", *SCHEDULE, "--name", "other")
    tell("schedule", *SCHEDULE)
    known, record = list(server.recurring.items())[-1]
    for number in range(250):  # more than a page
        server.recurring[str(number)] = record | {"recurring_run_id": str(number), "status": "DISABLED"}
    tell("schedule", *SCHEDULE)
    assert sorted(one["display_name"] for one in server.recurring.values()) == ["dmd2-retrain", "other"]
    assert known in server.recurring
    assert tell("unschedule") == "1 removed\n"
    assert [one["display_name"] for one in server.recurring.values()] == ["other"]


def test_logs_come_from_the_pods_of_the_run(
    server: Server, tell: Tell, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = {
        "apiVersion": "v1", "kind": "Config", "current-context": "test",
        "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
        "clusters": [{"name": "test", "cluster": {"server": server.url}}],
        "users": [{"name": "test", "user": {}}],
    }  # fmt: skip
    (tmp_path / "kubeconfig").write_text(yaml.safe_dump(config))
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
    for number, (run, step, phase) in enumerate(
        [
            ("r1", "distill", "Running"),
            ("r2", "distill", "Running"),
            ("r1", "prepare-run", "Succeeded"),
            ("r1", "gate", "Pending"),
        ]
    ):
        metadata = {
            "name": f"pod-{number}", "labels": {"pipeline/runid": run}, "creationTimestamp": f"2026-01-0{9 - number}T00:00:00Z",
            "annotations": {"workflows.argoproj.io/node-name": f"x.{step}.executor"},
        }  # fmt: skip
        pod = {"metadata": metadata, "status": {"phase": phase}}
        server.pods.append((pod, f"first of {step} in {run}\nlast of {step}"))
    assert tell("logs", "--run", "r1") == (
        "== x.prepare-run.executor\nfirst of prepare-run in r1\nlast of prepare-run\n"
        "== x.distill.executor\nfirst of distill in r1\nlast of distill\n"
    )
    assert (
        tell("logs", "--run", "r1", "--task", "distill", "--lines", "1")
        == "== x.distill.executor\nlast of distill\n"
    )


def test_a_token_goes_into_the_header_and_nowhere_else(
    server: Server, tell: Tell, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KF_PIPELINES_TOKEN", "s3cret")
    assert "s3cret" not in tell("submit")
    assert server.tokens == {"Bearer s3cret"}


def test_a_pipeline_whose_images_may_change_is_uploaded_only_if_that_is_allowed(server: Server) -> None:
    package = cluster.compile_pipeline(PIPELINES["distill"])
    strict = cluster.Cluster(host=server.url)
    with pytest.raises(Refused, match=r"would run \S+, a tag .*make images-push.* --unpinned"):
        cluster.upload(strict, package)
    assert not server.seen
    text = re.sub(r"(image: \S+)", rf"\1@sha256:{'0' * 64}", package.text)
    assert cluster.upload(strict, replace(package, text=text)).version


def test_a_dry_run_talks_to_no_server_and_shows_the_run(server: Server, tell: Tell) -> None:
    told = tell("submit", "--recipe", "sdxl-4step", "--gpus", "0", "--dry-run")
    assert not server.seen
    assert "dmd2-distill, version " in told
    assert "  recipe          sdxl-4step\n" in told
    assert "not yet ready to be submitted: recipe 'sdxl-4step' needs" in told
    assert "no plan without GPUs" in told
    assert "at 0 0 6 * * 1" in tell("schedule", *SCHEDULE, "--dry-run")
    assert not server.seen


def test_a_dry_run_tells_what_it_would_cost(
    server: Server, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "executable", warm.python())
    main(
        [
            "submit",
            "--recipe",
            "edm-digits",
            "--gpus",
            "2",
            "--price",
            "0.5",
            "--dry-run",
            "--host",
            server.url,
        ]
    )
    told = capfd.readouterr().out
    assert "GPU-hours" in told
    assert "cost at 0.5" in told
    assert not server.seen


def test_what_the_run_would_refuse_is_refused_before_it_is_submitted(server: Server, tell: Tell) -> None:
    with pytest.raises(Refused, match="needs a teacher"):
        tell("submit", "--recipe", "sdxl-4step", "--source", "gs://b/images")
    with pytest.raises(Refused, match="needs images with captions"):
        tell("submit", "--recipe", "sdxl-4step", "--teacher", "gs://b/teacher")
    with pytest.raises(Refused, match="nodes is 0"):
        tell("submit", "--nodes", "0")
    assert not server.seen


def test_a_schedule_that_could_find_nothing_is_refused(server: Server, tell: Tell) -> None:
    with pytest.raises(Refused, match="teachers is empty; give its address by --teachers"):
        tell("schedule", *SCHEDULE, "--teachers", "")
    assert not server.recurring


def test_a_cron_of_five_fields_is_refused(server: Server, tell: Tell) -> None:
    with pytest.raises(Refused, match="give six fields"):
        tell("schedule", *SCHEDULE, "--cron", "0 6 * * 1")


def test_an_unknown_verb_ends_with_a_status_and_no_trace() -> None:
    done = subprocess.run([sys.executable, "-m", "pipelines", "submitt"], capture_output=True, text=True)
    assert done.returncode
    assert "Traceback" not in done.stderr


def test_the_contract_knows_its_offenders() -> None:
    def wrong(value: Any, kind: str) -> list[str]:
        return offences(value, kind, kfp_server_api.models)

    assert not wrong({"display_name": "a", "max_concurrency": 1}, "V2beta1RecurringRun")
    assert wrong({"displayname": "a"}, "V2beta1Run")
    assert wrong({"display_name": 1}, "V2beta1Run")
    assert wrong({"state": "DONE"}, "V2beta1Run")
    assert wrong({"created_at": "yesterday"}, "V2beta1Run")
    assert wrong({"run_details": {"task_details": [{"state": "DONE"}]}}, "V2beta1Run")
    assert wrong({"runtime_config": {"parameters": []}}, "V2beta1Run")
    assert str(Answer(404, "x")) == "x"


def test_all_pods_of_a_run_say_who_pays(refusal: Callable[..., str]) -> None:
    package = cluster.compile_pipeline(PIPELINES["distill"])
    paid = cluster.for_cost_centre(package, "4711")
    assert cluster.for_cost_centre(package, "") == package
    assert paid.version != package.version
    labels = [line.strip() for line in paid.text.splitlines() if "dmd2/cost-centre" in line]
    assert set(labels) == {'dmd2/cost-centre: "4711"'}
    assert len(labels) == package.text.count("dmd2/stage:")
    assert "the cost centre is 'a b'; give a label" in refusal(
        lambda: cluster.for_cost_centre(package, "a b")
    )
