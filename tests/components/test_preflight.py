"""Everything that can fail late is refused before any stage, in one sentence, without a process of its own."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from components.prepare_run.parameters import RunParameters, check_parameters
from components.prepare_run.preflight import SETTINGS, check_resources
from dmd2 import stages
from dmd2.config import Config
from dmd2.io.storage import open_store
from tests.conftest import MICRO
from tests.publishing.hub import TOKEN

Refusal = Callable[[Callable[[], object]], str]
ON_BUCKET: dict[str, Any] = {
    "source": "gs://b/images", "teacher": "gs://b/teacher", "recipe": "sdxl-4step", "root": "gs://b/runs/a",
    "destination": "gs://b/models",
}  # fmt: skip


def test_good_parameters_pass_on_a_cluster() -> None:
    check_parameters(RunParameters(), on_cluster=True)
    check_parameters(RunParameters(**ON_BUCKET), on_cluster=True)
    hub = RunParameters(**ON_BUCKET | {"teacher": "owner/name@main", "vae": "owner/vae"})
    check_parameters(hub, on_cluster=True)
    check_parameters(RunParameters(**ON_BUCKET | {"source": "metadata:gs://b/images"}), on_cluster=True)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"destination": "/tmp/models"}, "destination is /tmp/models, a path of one machine, which would be lost"),
        ({"root": "/etc"}, "root is /etc, a path of one machine, which would be lost"),
        ({"root": "http://x"}, "http://x: storage of scheme 'http' is not supported"),
        ({"destination": "http://x"}, "http://x: storage of scheme 'http' is not supported"),
        ({"source": "http://x"}, "http://x: storage of scheme 'http' is not supported"),
        ({"source": "folder:/data"}, "source is /data, a path of one machine, which is not there in a pod"),
        ({"source": "gs://"}, "gs:// names no bucket"),
        ({"source": ""}, "source is empty"),
        ({"source": "digits"}, "needs images with captions"),
        ({"teacher": ""}, "needs a teacher"),
        ({"teacher": "teacher.safetensors"}, "teacher is teacher.safetensors, a path of one machine"),
        ({"teacher": "runs/demo/teacher"}, "teacher is runs/demo/teacher, a path of one machine"),
        ({"start": "runs/first"}, "start is runs/first, a path of one machine"),
        ({"prompts": "text:/data/p.jsonl"}, "prompts is /data/p.jsonl, a path of one machine"),
        ({"gpus": 10**6}, "gpus is 1000000, and no machine has more than 16"),
        ({"gpus": 5}, "a batch of 128 images (sdxl-4step) cannot be divided among 5 GPUs"),
        ({"nodes": 0}, "nodes is 0"),
        ({"nodes": 3}, "cannot be divided among 24 GPUs"),
        ({"gate": float("inf")}, "gate is inf"),
        ({"gate": -1.0}, "gate is -1"),
        ({"budget": float("nan")}, "budget is nan"),
        ({"overrides": "gate.factor=inf"}, "factor: Input should be a finite number"),
        ({"overrides": "distill.student.lr=inf"}, "lr: Input should be a finite number"),
        ({"overrides": "data.holdout=0"}, "data.holdout is 0"),
        ({"overrides": "data.holdout=1"}, "data.holdout is 1"),
        ({"overrides": "help=1"}, "Unrecognized options: --help"),
        ({"overrides": "steps"}, "must have the form field=value"),
        ({"overrides": "evaluate.metrics=fid,nice"}, "evaluate.metrics has 'nice'"),
        ({"recipe": "sdxl-5step"}, "unknown recipe 'sdxl-5step'"),
        ({"recipe": "sdxl-1step"}, "draws the prompts of fake samples from a list; give a file as prompts"),
        ({"recipe": "edm-imagenet64", "teacher": ""}, "needs a teacher"),
        ({"recipe": "edm-digits", "prompts": "gs://b/p.txt"}, "conditioned on classes"),
        ({"recipe": "edm-digits", "teacher": "", "vae": "gs://b/vae"}, "base and vae belong to a teacher"),
        ({"first_overrides": "seed=1"}, "has no first stage to run"),
        ({"license": "My own"}, "license is 'My own'; give an identifier of the Hugging Face Hub"),
        ({"license_link": "LICENSE.md"}, "license-link is 'LICENSE.md'"),
        ({"safety_checker": "/models/sd15"}, "safety_checker is /models/sd15, a path of one machine"),
        ({"hub": "hf://owner/name", "destination": ""}, "hub is hf://owner/name, which comes after a folder of models"),
        ({"model_registry": "http://registry", "destination": ""}, "model_registry is http://registry, which comes after"),
        ({"low_rank": -1}, "low-rank is -1; give a positive rank"),
        ({"low_rank": 4, "recipe": "sdxl-4step-lora"}, "has an update of its own"),
        ({"low_rank": 4, "recipe": "edm-digits"}, "for a student of sd15 or sdxl"),
        ({"hub": "hf://name"}, "hf://name is no repository of the hub"),
        ({"hub": "gs://b/models"}, "gs://b/models is no repository of the hub"),
        ({"hub": "hf://owner/name@main"}, "hf://owner/name@main is no repository of the hub"),
        ({"model_registry": "registry:8080"}, "the registry 'registry:8080' is no address"),
        ({"pairs": "gs://b/pairs"}, "no training of this run has a regression"),
        ({"recipe": "sd15-1step-gan", "prompts": "gs://b/p.txt", "first_overrides": "distill.first_stage=sd15-1step"},
         "starts from a run of sd15-1step, which starts from a run itself"),
        ({"recipe": "sd15-1step-gan", "prompts": "gs://b/p.txt", "first_overrides": "family.resolution=256"},
         "gives sd15-1step another network"),
    ],
)  # fmt: skip
def test_a_bad_parameter_is_refused_before_a_run_is_submitted(
    given: dict[str, Any], sentence: str, refusal: Refusal
) -> None:
    started = time.process_time()
    parameters = RunParameters(**ON_BUCKET | given)
    assert sentence in refusal(lambda: check_parameters(parameters, on_cluster=True))
    assert time.process_time() - started < 10


def test_folders_of_this_machine_are_allowed_where_the_stages_run_on_it(tmp_path: Path) -> None:
    here = {
        "root": str(tmp_path),
        "destination": "models",
        "teacher": "teacher.safetensors",
        "source": "images",
    }
    check_parameters(RunParameters(**ON_BUCKET | here), on_cluster=False)


@pytest.fixture
def good(made: Path, pictures: Path, bucket: str) -> RunParameters:
    """What lies on this machine and on a bucket, and can be read."""
    store = open_store(f"{bucket}/given")
    store.write("prompts.txt", b"a red square\n")
    for name in ("a/0.png", "a/1.png"):
        store.write(name, b"picture")
    for name in ("safety_checker/config.json", "feature_extractor/preprocessor_config.json"):
        store.write(f"pickled/{name}", b"{}")
    return RunParameters(
        source=str(pictures), teacher=str(made / "teacher"), start=str(made / "run"), prompts=f"{bucket}/given/prompts.txt",
        destination=f"{bucket}/models", overrides=" ".join(MICRO),
    )  # fmt: skip


def test_what_can_be_read_passes_and_the_folder_of_the_run_has_its_settings(
    good: RunParameters, bucket: str, micro: Config
) -> None:
    check_resources(good, f"{bucket}/root")
    text = open_store(f"{bucket}/root").read(SETTINGS)
    assert Config.model_validate_json(text) == good.last.config
    for source in (
        f"{bucket}/given",
        f"{bucket}/given/a/*.png",
        f"folder:{bucket}/given",
        f"{bucket}/given/a/0.png",
    ):
        check_resources(replace(good, source=source), f"{bucket}/root")


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"source": "{here}"}, "{here} is empty or does not exist"),
        ({"source": "{here}/nowhere"}, "{here}/nowhere is empty or does not exist"),
        ({"source": "{bucket}/empty"}, "{bucket}/empty is empty or does not exist"),
        ({"source": "{bucket}/given/b*.png"}, "is empty or does not exist"),
        ({"teacher": "{here}"}, "teacher {here} has no model_index.json or unet/config.json"),
        ({"teacher": "{bucket}/nowhere"}, "teacher {bucket}/nowhere has no model_index.json"),
        ({"teacher": "{here}/t.safetensors"}, "teacher {here}/t.safetensors does not exist"),
        ({"teacher": "{made}/run"}, "is a run folder; a teacher folder is needed"),
        ({"teacher": "/a/b/c"}, "teacher /a/b/c is neither a folder nor a name on the hub"),
        ({"recipe": "sdxl-4step-emoji"}, "is of a edm network for images (1, 8, 8), the recipe of a sdxl"),
        ({"start": "{made}/teacher"}, "is a teacher folder; a run folder is needed"),
        ({"start": "{bucket}/nowhere"}, "has no manifest.json"),
        ({"pairs": "{made}/run"}, "is a run folder; a pairs folder is needed"),
        ({"prompts": "{bucket}/given/other.txt"}, "prompts {bucket}/given/other.txt does not exist"),
        ({"safety_checker": "{here}"}, "safety_checker {here} has no safety_checker/config.json"),
        ({"safety_checker": "{bucket}/given/pickled"}, "given/pickled has no safety_checker/model.safetensors"),
        ({"vae": "{here}"}, "vae {here} has no model_index.json or config.json"),
        ({"destination": "gs://no-such-bucket-of-dmd2/models"}, "is in a bucket that does not exist"),
        ({"scores": "gs://no-such-bucket-of-dmd2/scores"}, "scores gs://no-such-bucket-of-dmd2/scores is in a bucket that does not exist"),
        ({"overrides": "evaluate.features=inception evaluate.inception.uri={here}/i.pt"}, "evaluate.inception.uri {here}/i.pt does not"),
        ({"overrides": "evaluate.metrics=fid,clip evaluate.clip={here}"}, "evaluate.clip {here} has no config.json or vae/config.json"),
        ({"overrides": "distill.best.images=9 distill.best.inception.uri={here}/i.pt"}, "distill.best.inception.uri {here}/i.pt does not"),
        ({"overrides": "evaluate.baselines=lcm={here}:4"}, "evaluate.baselines lcm {here} has no model_index.json or manifest.json"),
        ({"overrides": "distill.preview_vae={here}"}, "distill.preview_vae {here} has no config.json or vae/config.json"),
    ],
)  # fmt: skip
def test_what_a_stage_would_not_find_is_refused_with_its_address(
    given: dict[str, str],
    sentence: str,
    good: RunParameters,
    refusal: Refusal,
    made: Path,
    bucket: str,
    tmp_path: Path,
) -> None:
    (here := tmp_path / "here").mkdir()
    places = {"here": here, "made": made, "bucket": bucket}
    changed: dict[str, Any] = {name: text.format(**places) for name, text in given.items()}
    if "recipe" in changed:
        changed["overrides"] = ""
    elif more := changed.pop("overrides", ""):
        changed["overrides"] = f"{good.overrides} {more}"
    parameters = replace(good, **changed)
    assert sentence.format(**places) in refusal(lambda: check_resources(parameters, str(tmp_path / "root")))


def test_the_weights_of_a_recipe_that_cannot_be_reached_are_named(
    good: RunParameters, refusal: Refusal, tmp_path: Path
) -> None:
    unreachable = "https://127.0.0.1:9/inception.pt"
    changed = replace(
        good,
        overrides=f"{good.overrides} evaluate.features=inception evaluate.inception.uri={unreachable}",
    )
    said = refusal(lambda: check_resources(changed, str(tmp_path)))
    assert f"evaluate.inception.uri {unreachable} cannot be read from here" in said
    assert "copy it to the bucket by `dmd2 mirror` and give that address as evaluate.inception.uri" in said


def test_a_name_on_the_hub_that_cannot_be_read_is_refused(
    good: RunParameters, refusal: Refusal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "https://127.0.0.1:9")
    said = refusal(lambda: check_resources(replace(good, teacher="owner/name"), str(tmp_path)))
    assert "teacher owner/name is no local folder, and as a name on the hub it cannot be read" in said


def test_the_hub_and_the_registry_are_asked_whether_they_would_take_a_package(
    good: RunParameters,
    hub: tuple[Any, str],
    registry: tuple[Any, str],
    refusal: Refusal,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server, address = hub
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
    published = replace(good, hub="hf://owner/digits", model_registry=registry[1])
    said = refusal(lambda: check_resources(published, str(tmp_path)))
    assert "hf://owner/digits cannot be used (Token is required" in said
    for token, role, closed, words in (
        ("hf_wrong", "write", set(), "Invalid user token"),
        (TOKEN, "read", set(), "the token of owner may only read"),
        (TOKEN, "write", {"auth_check"}, "403 Forbidden"),
    ):
        monkeypatch.setenv("HF_TOKEN", token)
        server.role, server.fail = role, closed
        said = refusal(lambda: check_resources(published, str(tmp_path)))
        assert words in said
        assert token not in said
    server.fail = set()
    check_resources(published, str(tmp_path))
    assert not server.repositories, "it is only asked"
    registry[0].version = "v9"
    said = refusal(lambda: check_resources(published, str(tmp_path)))
    assert "answers as no Model Registry does" in said


def test_a_teacher_folder_takes_neither_base_nor_vae(made: Path, micro: Config, refusal: Refusal) -> None:
    said = refusal(lambda: stages.resolve_or_teach(micro, str(made / "teacher"), "", "", vae="gs://b/vae"))
    assert "is a teacher folder already" in said
