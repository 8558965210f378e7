"""The pipeline itself, through KFP's own local runner, a process per stage; and its compiled form.

The processes are warm (`tests/warm`), but for those of the run that is interrupted, and of one whole run among the slow tests.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from components.run_folder import run_folder
from dmd2 import recipes, stages
from dmd2.io import artifact, storage
from dmd2.recipes import RECIPES
from dmd2.training import checkpoint
from dmd2.training.metrics_log import read_metrics
from pipelines import readme
from pipelines.__main__ import COMPILED, PIPELINES
from pipelines.cluster import compile_pipeline
from pipelines.local_run import run_local
from tests import warm
from tests.bucket import list_names, names_in_manifest
from tests.conftest import MICRO
from tests.tiny_sdxl import SMALL


@pytest.fixture(params=["warm"])
def run(
    request: pytest.FixtureRequest, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Path]:
    """Run the pipeline on the micro recipe -> its root."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    if request.param == "warm":
        be_warm(monkeypatch)

    def call(*overrides: str, **parameters: Any) -> Path:
        root = tmp_path / "root"
        text = " ".join([*MICRO, *overrides])
        run_local({"source": str(pictures), "overrides": text} | parameters, root)
        return root

    return call


def be_warm(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter that KFP starts stages with, and torchrun its workers."""
    monkeypatch.setattr(sys, "executable", warm.python())
    monkeypatch.setenv("PYTHON_EXEC", warm.python())


@pytest.fixture
def images(bucket: str, pictures: Path) -> str:
    """The pictures, on a bucket."""
    names = [entry.name for entry in storage.open_store(pictures).list_objects()]
    storage.upload_files(pictures, names, storage.open_store(f"{bucket}/images"))
    return f"{bucket}/images"


def outcome(root: Path) -> dict[str, Any]:
    """What the exit handler wrote."""
    return dict(json.loads((root / "outcome.json").read_text()))


def tasks(root: Path) -> set[str]:
    """Tasks that ran: the local runner makes a folder for each."""
    (latest,) = (root / "kfp").iterdir()
    names = {
        path.name for path in latest.iterdir() if path.is_dir() and not path.name.startswith("for-loop-")
    }
    return {
        name if name == "report-2" else name.removesuffix("-2") for name in names
    }  # the other is in a loop


STAGES = {
    "prepare-run", "shard-dataset", "resolve-teacher", "encode-latents", "distill", "evaluate", "gate", "finish-run"
}  # fmt: skip


@pytest.mark.parametrize("run", ["warm", pytest.param("cold", marks=pytest.mark.slow)], indirect=True)
def test_an_accepted_run_goes_from_images_on_a_bucket_to_a_published_package(
    run: Callable[..., Path],
    images: str,
    bucket: str,
    registry: tuple[Any, str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    server, address = registry
    terms = {"license": "mit", "license_link": "https://example.org/mit", "restrictions": "No portraits."}
    root = run(source=images, destination=f"{bucket}/models", model_registry=address, gate=1e9, **terms)
    summary = json.loads((root / "summary.json").read_text())
    assert summary["gate"] == "accepted"
    assert Path(summary["package"]) == root / "package"
    assert "Accepted" in (root / "report.html").read_text()
    assert (summary["nfe_student"], summary["nfe_teacher"], summary["images"]) == (1, 5, 24)
    assert {"shard", "teach", "distill", "evaluate", "gate", "package", "total", "wall"} == summary[
        "seconds"
    ].keys()
    assert all(summary[name] > 0 for name in ("fid_student", "fid_teacher", "fid_teacher_1step"))
    assert tasks(root) == STAGES | {"package-model", "report", "publish-model"}
    package = artifact.read_manifest(root / "package", "package")
    published = f"{bucket}/models/edm-digits/{package.digest[:16]}"
    assert artifact.read_manifest(published, "package").digest == package.digest
    assert list_names(published) == names_in_manifest(published)
    assert [row["uri"] for row in server.rows["artifacts"]] == [published]
    card = (root / "package" / "README.md").read_text()
    assert "License: `mit`, https://example.org/mit." in card
    assert "> No portraits." in card
    assert (outcome(root)["state"], outcome(root)["decision"]) == ("SUCCEEDED", "accepted")
    assert outcome(root)["folders"]["package"] == package.digest
    assert outcome(root)["scores"] == summary["scores"]
    shown = capsys.readouterr().out
    assert "accepted" in shown
    assert str(root / "package") in shown.replace("\n", "")


def test_text_to_image_runs_from_a_diffusers_folder_to_a_package_through_latents_in_parts(
    run: Callable[..., Path], pipeline: Path, squares: Path, tmp_path: Path
) -> None:
    """In three parts of each shared stage, side by side, with the bytes that one process makes."""
    original = Path(shutil.copytree(pipeline, tmp_path / "original"))
    (original / "README.md").write_text("---\nlicense: other\nlicense_name: Our Own\n---\n")
    words = {"source": str(squares), "teacher": str(original), "recipe": "sdxl-4step-emoji"}
    root = run(**words, overrides=" ".join(SMALL), parts=3, low_rank=2)
    summary = json.loads((root / "summary.json").read_text())
    assert summary["gate"] == "accepted"
    assert {"shard", "teach", "encode", "distill", "evaluate", "gate", "package"} < summary["seconds"].keys()
    assert [(v["recipe"], v["steps"]) for v in summary["variants"]] == [
        ("sdxl-4step-emoji", 4), ("teacher", 2), ("teacher", 1), ("sdxl-4step-emoji", 1), ("teacher", 4)
    ]  # fmt: skip
    assert (root / "package" / "model_index.json").is_file()
    assert (root / "package" / "lora" / "kohya.safetensors").is_file()
    card = ModelCard.load(root / "package" / "README.md")
    assert (card.data.license, card.data.license_name) == ("other", "our-own")
    assert "License: Our Own." in card.text
    assert tasks(root) == STAGES | {"package-model", "report"}, "with no destination nothing is published"
    shared = {"shard-dataset": "shards", "encode-latents": "samples", "evaluate": "evaluation"}
    for task, output in shared.items():
        parts = [
            json.loads(p.read_text())["facts"]["part"] for p in root.rglob(f"for-loop-*/{task}*/{output}")
        ]
        assert sorted(parts) == ["0/3", "1/3", "2/3"]
    config, teacher = recipes.resolve(words["recipe"], SMALL), str(root / "teacher")
    alone = stages.shard(config, words["source"], str(tmp_path / "shards"), workers=1)
    assert alone.digest == artifact.read_manifest(root / "shards", "shards").digest
    alone = stages.encode(config, str(tmp_path / "shards"), teacher, str(tmp_path / "latents"))
    assert alone.digest == artifact.read_manifest(root / "latents", "latents").digest


def test_a_failing_stage_fails_the_run_with_its_sentence_and_the_exit_handler_reports(
    run: Callable[..., Path], refusal: Callable[..., str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    stranger = tmp_path / "source"
    stranger.mkdir()
    (stranger / "letter.txt").write_text("no image")
    assert "shard-dataset" in refusal(lambda: run(source=str(stranger)))
    told = capfd.readouterr()
    assert f"{stranger} holds no images" in told.out + told.err
    root = tmp_path / "root"
    assert tasks(root) == {"prepare-run", "shard-dataset", "finish-run"}
    assert (outcome(root)["state"], outcome(root)["decision"], outcome(root)["folders"]) == (
        "FAILED",
        None,
        {},
    )
    assert "# failed: " in told.out + told.err


def test_a_wrong_parameter_is_refused_before_any_stage(
    run: Callable[..., Path], refusal: Callable[..., str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert "prepare-run" in refusal(lambda: run(recipe="sdxl-4step", overrides=""))
    told = capfd.readouterr()
    assert "recipe 'sdxl-4step' needs a teacher" in told.out + told.err
    assert tasks(tmp_path / "root") == {"prepare-run", "finish-run"}


def test_a_run_without_a_root_lies_beside_its_artifacts(refusal: Callable[..., str]) -> None:
    artifact = "gs://b/v2/artifacts/dmd2-distill/1234-5678/begin/x/settings"
    assert run_folder("", "1234-5678", artifact) == "gs://b/v2/artifacts/dmd2-distill/1234-5678/dmd2"
    assert run_folder("gs://b/runs/a/", "1234-5678", artifact) == "gs://b/runs/a"
    assert "give a root" in refusal(lambda: run_folder("", "1234", "minio://mlpipeline/v2/1234/x"))
    assert "give a root" in refusal(lambda: run_folder("", "1234", "gs://b/elsewhere"))


@pytest.mark.parametrize("name", list(PIPELINES))
def test_the_committed_pipeline_is_the_current_one(name: str) -> None:
    assert not {"DMD2_IMAGE", "DMD2_LAUNCH_IMAGE"} & os.environ.keys()
    assert compile_pipeline(PIPELINES[name]).text == (COMPILED / f"{name}.yaml").read_text(), (
        "run make compile"
    )


def test_the_page_of_the_components_is_the_current_one() -> None:
    assert readme.PATH.read_text() == readme.text(), "run make compile"


@pytest.fixture(scope="module")
def documents() -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((COMPILED / "distill.yaml").read_text()))


@pytest.fixture(scope="module")
def compiled(documents: list[dict[str, Any]]) -> dict[str, Any]:
    return documents[0]


def test_artifacts_are_typed_so_that_the_ui_shows_them(compiled: dict[str, Any]) -> None:
    outputs = {
        name: {
            o: a["artifactType"]["schemaTitle"]
            for o, a in c.get("outputDefinitions", {}).get("artifacts", {}).items()
        }
        for name, c in compiled["components"].items()
    }
    assert outputs["comp-prepare-run"]["plan"] == "system.Markdown"
    assert outputs["comp-shard-dataset"] == {"shards": "system.Dataset"}
    assert outputs["comp-resolve-teacher"] == {"resolved": "system.Model"}
    assert outputs["comp-encode-latents"] == {"samples": "system.Dataset"}
    assert outputs["comp-distill"] == {"run": "system.Model"}
    assert outputs["comp-evaluate"]["metrics"] == "system.Metrics"
    assert outputs["comp-package-model"] == {"package": "system.Model"}
    assert outputs["comp-publish-model"] == {"model": "system.Model"}
    assert outputs["comp-report"] == {"page": "system.HTML"}
    assert outputs["comp-finish-run"] == {"summary": "system.Markdown"}


def test_every_parameter_has_a_default_and_is_described(compiled: dict[str, Any]) -> None:
    parameters = compiled["root"]["inputDefinitions"]["parameters"]
    assert all("defaultValue" in p and p["description"] for p in parameters.values())


def test_the_form_for_a_run_offers_the_recipes(compiled: dict[str, Any]) -> None:
    assert compiled["root"]["inputDefinitions"]["parameters"]["recipe"]["literals"] == list(RECIPES)


def executors(documents: list[dict[str, Any]]) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """{stage: (its container, what Kubernetes is told of its pod)}."""
    pods = documents[1]["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    containers = documents[0]["deploymentSpec"]["executors"]
    return {name: (one["container"], pods[name]) for name, one in containers.items()}


def test_no_pod_is_root_or_without_limits_and_all_have_a_place_to_write(
    documents: list[dict[str, Any]],
) -> None:
    for container, pod in executors(documents).values():
        assert pod["securityContext"] == {"runAsNonRoot": True, "runAsUser": "65532", "runAsGroup": "65532"}
        (scratch,) = [mount for mount in pod["emptyDirMounts"] if mount["mountPath"] == "/tmp"]
        assert scratch["sizeLimit"], "a full disk ends the pod and not its node"
        wanted = {f"resource{what}{how}" for what in ("Cpu", "Memory") for how in ("Request", "Limit")}
        assert wanted <= container["resources"].keys()


def test_only_the_step_that_packages_reads_the_signing_key_and_goes_without_it_where_there_is_none(
    documents: list[dict[str, Any]],
) -> None:
    secrets = {
        name: pod["secretAsVolume"]
        for name, (_, pod) in executors(documents).items()
        if "secretAsVolume" in pod
    }
    assert secrets.keys() == {"exec-package-model"}
    (mount,) = secrets["exec-package-model"]
    body = executors(documents)["exec-package-model"][0]
    assert f"{mount['mountPath']}/key.pem" in str(body["command"])
    assert (mount["secretName"], mount["optional"]) == ("dmd2-signing-key", True)


def test_the_account_of_the_hub_is_known_to_the_steps_that_reach_it_and_is_no_parameter(
    documents: list[dict[str, Any]],
) -> None:
    reach = {name: pod for name, (_, pod) in executors(documents).items() if "secretAsEnv" in pod}
    assert reach.keys() == {
        "exec-prepare-run",
        "exec-resolve-teacher",
        "exec-package-model",
        "exec-publish-model",
    }
    for pod in reach.values():
        (secret,) = pod["secretAsEnv"]
        assert (secret["secretName"], secret["optional"]) == ("dmd2-hub-token", True)
        assert secret["keyToEnv"] == [{"secretKey": "token", "envVar": "HF_TOKEN"}]
        assert pod["podMetadata"]["labels"]["dmd2/uses-hub"] == "true"
    registry = {
        n for n, (_, p) in executors(documents).items() if "dmd2/uses-registry" in p["podMetadata"]["labels"]
    }
    assert registry == {"exec-prepare-run", "exec-publish-model"}
    parameters = documents[0]["root"]["inputDefinitions"]["parameters"]
    assert not [name for name in parameters if "token" in name or "key" in name]


def test_every_step_knows_its_image(documents: list[dict[str, Any]]) -> None:
    for container, _ in executors(documents).values():
        assert {"name": "DMD2_IMAGE", "value": container["image"]} in container["env"]


def test_stages_with_a_network_get_gpus_from_the_pool_and_shared_memory(
    documents: list[dict[str, Any]],
) -> None:
    on_gpus = {name for name, (c, _) in executors(documents).items() if "accelerator" in c["resources"]}
    assert on_gpus == {
        "exec-encode-latents", "exec-encode-latents-2", "exec-sample-pairs", "exec-distill", "exec-distill-2", "exec-evaluate",
        "exec-evaluate-2",
    }  # fmt: skip
    for name in on_gpus:
        container, pod = executors(documents)[name]
        counts = {"exec-distill": "step_gpus", "exec-distill-2": "prepare-run-step_gpus"}
        count = counts.get(name, "prepare-run-gpu" if name.endswith("-2") else "gpu")
        if name in counts:  # a step that only follows a TrainJob asks for little
            step = counts[name].removesuffix("gpus")
            assert container["resources"]["resourceCpuRequest"].endswith(f"--{step}cpu']}}}}")
            assert container["resources"]["resourceMemoryRequest"].endswith(f"--{step}memory']}}}}")
        accelerator = container["resources"]["accelerator"]
        assert accelerator["resourceType"] == "nvidia.com/gpu"
        assert accelerator["resourceCount"] == f"{{{{$.inputs.parameters['pipelinechannel--{count}']}}}}"
        nodes = pod["nodeSelector"]["nodeSelectorJson"]
        assert nodes in (
            {"taskOutputParameter": {"producerTask": "prepare-run", "outputParameterKey": key}}
            for key in ("pool", "step_pool")
        ) or nodes in (
            {"componentInputParameter": f"pipelinechannel--{name}"} for name in ("pool", "step_pool")
        )
        assert {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"} in pod["tolerations"]
        labels = {"kueue.x-k8s.io/queue-name": "dmd2", "kueue.x-k8s.io/priority-class": "dmd2-run"}
        assert pod["podMetadata"]["labels"].items() >= labels.items()
        (shared,) = [mount for mount in pod["emptyDirMounts"] if mount["mountPath"] == "/dev/shm"]
        assert shared["medium"] == "Memory"
        assert shared["sizeLimit"]


def test_a_stage_is_tried_again_only_if_that_can_help(compiled: dict[str, Any]) -> None:
    tried = {
        name: task.get("retryPolicy", {}).get("maxRetryCount", 0) for name, task in leaves(compiled).items()
    }
    assert tried == {
        "prepare-run": 0, "shard-dataset": 2, "resolve-teacher": 2, "encode-latents": 2, "sample-pairs": 2, "distill": 3,
        "evaluate": 2, "gate": 0,
        "package-model": 0, "publish-model": 2, "report": 0, "report-2": 0, "finish-run": 2,
    }  # fmt: skip


def leaves(compiled: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """{task: what is said of it}, of those that run something."""
    dags = [compiled["root"]["dag"], *(c["dag"] for c in compiled["components"].values() if "dag" in c)]
    return {
        name: task
        for dag in dags
        for name, task in dag["tasks"].items()
        if "dag" not in compiled["components"][task["componentRef"]["name"]]
    }


def test_nothing_is_cached_and_nothing_is_installed_at_run_time(compiled: dict[str, Any]) -> None:
    tasks = leaves(compiled)
    assert len(tasks) == 13
    assert len(compiled["deploymentSpec"]["executors"]) == 17, "a distillation, and stages in parts, twice"
    assert not any(task["cachingOptions"].get("enableCache") for task in tasks.values())
    for executor in compiled["deploymentSpec"]["executors"].values():
        assert "pip install" not in " ".join(executor["container"]["command"])


def test_ctrl_c_stops_the_whole_run_and_the_same_command_resumes_it(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a terminal does it: SIGINT to every process of the group, at some step of the distillation."""
    root = tmp_path / "root"
    settings = (*MICRO, "gate.factor=1e9", "distill.steps=200", "distill.save_every=200")
    config, overrides = recipes.resolve("edm-digits", settings), " ".join(settings)
    stages.shard(config, str(pictures), str(root / "shards"))  # so that fewer processes are started
    stages.teach(config, str(root / "shards"), str(root / "teacher"))
    command = [sys.executable, "-m", "pipelines", "run-local", "--root", str(root), "--source", str(pictures)]
    command += ["--overrides", overrides]
    process = subprocess.Popen(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    unfinished = root / ".run.partial"
    while process.poll() is None and not (unfinished / "metrics.jsonl").exists():
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    told, _ = process.communicate(timeout=600)
    assert process.returncode == 130, told
    assert "Traceback" not in told
    while not (saved := checkpoint.saved_steps(unfinished / "checkpoints")):
        time.sleep(0.05)
    assert 0 < saved[0] < 200
    be_warm(monkeypatch)
    run_local({"source": str(pictures), "overrides": overrides}, root)
    assert json.loads((root / "summary.json").read_text())["gate"] == "accepted"
    steps = [int(line["step"]) for line in read_metrics(root / "run")]
    assert saved[0] in steps, "the line of the interruption"
    assert steps == sorted(set(steps))
    assert steps[-1] == 200
