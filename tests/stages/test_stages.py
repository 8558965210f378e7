"""Evaluation, gate, package, sample, report: on one micro run."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dmd2 import model as package
from dmd2 import stages
from dmd2.config import Config
from dmd2.image_grid import image_grid
from dmd2.io.artifact import read_manifest
from dmd2.models.edm import Edm
from dmd2.sampler import Noise
from tests import warm
from tests.conftest import with_adm


def paths(made: Path, *names: str) -> Any:
    """Arguments of a stage: each folder by the name of its parameter."""
    return {"data" if name == "shards" else name: str(made / name) for name in names}


@pytest.fixture(scope="module")
def packaged(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("package") / "package"
    stages.package(**paths(made, "run", "evaluation", "gate"), out=str(out))
    return out


def test_an_evaluation_states_its_images_features_and_seed(made: Path) -> None:
    facts = read_manifest(made / "evaluation", "evaluation").facts
    assert (facts["images"], facts["images_real"], facts["seed"]) == (24, 12, 10)
    assert (facts["nfe_student"], facts["nfe_teacher"]) == (1, 5)
    assert "classifier fitted to 48" in facts["features"]
    for name in ("student", "teacher", "teacher_1step", "real"):
        assert facts[f"fid_{name}"] > 0
        assert (made / "evaluation" / f"{name}.png").is_file()


def test_student_and_teacher_start_from_the_same_noise(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    starts: list[torch.Tensor] = []
    monkeypatch.setattr(package, "generate", lambda denoiser, eps, *rest: starts.append(eps) or eps)
    monkeypatch.setattr(Edm, "sample_teacher", lambda self, network, eps, *rest: starts.append(eps) or eps)
    package.load_network(made / "run").sample([0, 1, 2], seed=3)
    package.load_network(made / "teacher").sample_teacher([0, 1, 2], seed=3, steps=2)
    assert torch.equal(*starts)


@pytest.fixture
def two_steps(made: Path) -> package.Model:
    run = package.load_network(made / "run")
    return package.Model(run.config, run.family, run.network, (999, 500))


def test_the_noise_between_steps_is_not_that_of_the_start(
    two_steps: package.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[torch.Tensor] = []

    def record(
        denoiser: object, eps: torch.Tensor, cond: object, timesteps: object, noise: Noise
    ) -> torch.Tensor:
        drawn.extend([eps, noise(eps)])
        return eps

    monkeypatch.setattr(package, "generate", record)
    two_steps.sample([0] * 64, seed=3)
    start, between = drawn
    assert torch.corrcoef(torch.stack([start.flatten(), between.flatten()]))[0, 1].abs() < 0.05


def test_a_sample_does_not_depend_on_its_batch_nor_on_the_callers_random_numbers(
    two_steps: package.Model,
) -> None:
    torch.manual_seed(1)
    whole = two_steps.sample([0, 1, 2, 0, 1], seed=1)
    after = torch.rand(1)
    parts = two_steps.sample([0, 1, 2, 0, 1], seed=1, batch=2)
    assert (parts.int() - whole.int()).abs().max() <= 1
    torch.manual_seed(1)
    assert torch.equal(torch.rand(1), after)
    assert not torch.equal(whole, two_steps.sample([0, 1, 2, 0, 1], seed=2))


@pytest.mark.parametrize(("factor", "decision"), [(1e-9, "rejected"), (1e9, "accepted")])
def test_the_gate_compares_student_and_teacher(
    made: Path, micro: Config, tmp_path: Path, factor: float, decision: str
) -> None:
    config = micro.model_copy(update={"gate": micro.gate.model_copy(update={"factor": factor})})
    facts = stages.gate(config, str(made / "evaluation"), str(tmp_path / "gate")).facts
    scores = read_manifest(made / "evaluation", "evaluation").facts
    assert facts["decision"] == decision
    assert f"{scores['fid_student']:.2f}" in facts["reason"]
    assert f"{scores['fid_teacher']:.2f}" in facts["reason"]


def test_a_rejected_run_is_not_packaged(
    made: Path, micro: Config, tmp_path: Path, refusal: Callable[..., str]
) -> None:
    strict = micro.model_copy(update={"gate": micro.gate.model_copy(update={"factor": 1e-9})})
    stages.gate(strict, str(made / "evaluation"), str(tmp_path / "gate"))
    folders = paths(made, "run", "evaluation")
    assert "did not accept this run (rejected: " in refusal(
        lambda: stages.package(**folders, gate=str(tmp_path / "gate"), out=str(tmp_path / "package"))
    )
    assert not (tmp_path / "package").exists()


def test_a_package_samples_what_the_run_samples(made: Path, packaged: Path) -> None:
    run, loaded = package.load_network(made / "run"), package.load(packaged)
    assert torch.equal(run.sample([0, 1, 2], seed=5), loaded.sample([0, 1, 2], seed=5))
    assert {f.path for f in read_manifest(packaged, "package").files} == {
        "README.md",
        "edm_student.py",
        "network.json",
        "network.safetensors",
        "provenance.json",
        "samples.png",
        "sbom.cdx.json",
    }


def test_the_three_lines_of_the_model_card_work(packaged: Path, tmp_path: Path) -> None:
    card = (packaged / "README.md").read_text()
    _, code = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    lines = code.replace("path/of/this/folder", str(packaged)).strip()
    assert len(lines.splitlines()) == 3
    printed = subprocess.run(
        [warm.python(), "-c", lines + "\nprint(images.shape, images.dtype)"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert printed.stdout.strip() == "torch.Size([3, 1, 8, 8]) torch.uint8"


def test_the_model_card_shows_metrics_recipe_and_provenance(made: Path, packaged: Path) -> None:
    card = (packaged / "README.md").read_text()
    scores = read_manifest(made / "evaluation", "evaluation").facts
    for wanted in (
        f"{scores['fid_student']:.2f}",
        f"{scores['fid_teacher']:.2f}",
        '"critic_updates": 5',
        "samples.png",
        "seed 10",
    ):
        assert wanted in card
    for kind, folder in (
        ("shards", "shards"),
        ("teacher", "teacher"),
        ("run", "run"),
        ("evaluation", "evaluation"),
    ):
        assert read_manifest(made / folder, kind).digest in card


def test_the_hub_reads_the_model_card_with_licence_and_restrictions(
    made: Path, packaged: Path, tmp_path: Path
) -> None:
    from huggingface_hub import ModelCard

    plain = ModelCard.load(packaged / "README.md")
    assert (plain.data.license, plain.data.library_name, plain.data.tags) == (
        "other", "dmd2", ["diffusion", "distillation", "dmd2"],
    )  # fmt: skip
    assert "has not said which these are" in plain.text
    link = "https://example.org/licence"
    terms = {
        "license": "openrail++",
        "license_link": link,
        "restrictions": "No portraits: of anyone.\n---\nNot for sale.",
    }
    folders, out = paths(made, "run", "evaluation", "gate"), tmp_path / "package"
    stages.package(**folders, out=str(out), **terms)  # type: ignore[arg-type]
    card = ModelCard.load(out / "README.md")
    assert (card.data.license, card.data.license_link) == ("openrail++", link)
    assert card.data.pipeline_tag == "unconditional-image-generation"
    assert f"License: `openrail++`, {link}." in card.text
    assert "> No portraits: of anyone.\n> ---\n> Not for sale." in card.text
    stages.package(**folders, out=str(out), **terms)  # type: ignore[arg-type]


def test_terms_that_the_hub_does_not_take_are_refused(
    made: Path, packaged: Path, tmp_path: Path, refusal: Callable[..., str]
) -> None:
    folders, out = paths(made, "run", "evaluation", "gate"), str(tmp_path / "package")
    for terms, words in (
        ({"license": "My own"}, "give an identifier of the Hugging Face Hub"),
        ({"license_link": "javascript:alert(1)"}, "starts with https://"),
    ):
        assert words in refusal(lambda terms=terms: stages.package(**folders, out=out, **terms))
    said = refusal(lambda: stages.package(**folders, out=str(packaged), license="mit"))
    assert "was made with --license other, not mit" in said


def test_a_tampered_package_is_not_loaded(
    packaged: Path, tmp_path: Path, refusal: Callable[..., str]
) -> None:
    copy = Path(shutil.copytree(packaged, tmp_path / "package"))
    weights = copy / "network.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert "network.safetensors was changed" in refusal(lambda: package.load(copy))


def test_evaluation_of_another_run_does_not_count(
    made: Path, micro: Config, tmp_path: Path, refusal: Callable[..., str]
) -> None:
    other = micro.model_copy(update={"seed": 1})
    stages.distill(other, **paths(made, "shards", "teacher"), out=str(tmp_path / "run"))
    sentence = refusal(
        lambda: stages.package(
            str(tmp_path / "run"), **paths(made, "evaluation", "gate"), out=str(tmp_path / "package")
        )
    )
    assert "do not belong to the run" in sentence


def test_a_teacher_of_another_shape_is_refused(
    made: Path, micro: Config, tmp_path: Path, refusal: Callable[..., str]
) -> None:
    other = with_adm(micro, channels=16)
    sentence = refusal(
        lambda: stages.distill(other, **paths(made, "shards", "teacher"), out=str(tmp_path / "run"))
    )
    assert "channels is 8, not 16" in sentence
    assert not list(tmp_path.iterdir())


def test_shards_of_another_size_are_refused(
    made: Path, micro: Config, tmp_path: Path, refusal: Callable[..., str]
) -> None:
    other = with_adm(micro, resolution=16)
    assert "8x8 pixels" in refusal(
        lambda: stages.teach(other, str(made / "shards"), str(tmp_path / "teacher"))
    )


def test_sample_draws_the_asked_classes(packaged: Path, tmp_path: Path, refusal: Callable[..., str]) -> None:
    picture = stages.sample(str(packaged), str(tmp_path / "a" / "grid.png"), count=6, labels=(2, 1))
    assert Image.open(picture).size == (2 * 9 + 1, 3 * 9 + 1)
    assert "class 3 is outside 0 to 2" in refusal(
        lambda: stages.sample(str(packaged), str(tmp_path / "b.png"), labels=(3,))
    )


@pytest.mark.parametrize(("asked", "taken"), [(0, 30), (2, 2)])
def test_a_teacher_is_sampled_by_its_own_sampler_in_30_steps_or_as_many_as_asked(
    made: Path, tmp_path: Path, asked: int, taken: int
) -> None:
    teacher = str(made / "teacher")
    picture = stages.sample(teacher, str(tmp_path / "a.png"), count=6, seed=4, labels=(2, 1), steps=asked)
    images = package.load_network(teacher).sample_teacher([2, 1, 2, 1, 2, 1], seed=4, steps=taken)
    assert np.array_equal(np.asarray(Image.open(picture)), np.asarray(image_grid(images, 2)))


@pytest.mark.parametrize("kind", ["shards", "evaluation", "gate"])
def test_sampling_what_holds_no_network_is_refused(
    made: Path, tmp_path: Path, kind: str, refusal: Callable[..., str]
) -> None:
    assert f"is a {kind} folder; a package or run or teacher folder is needed" in refusal(
        lambda: stages.sample(str(made / kind), str(tmp_path / "a.png"))
    )
    assert not (tmp_path / "a.png").exists()


@pytest.mark.parametrize(
    ("kind", "words"), [("teacher", "no unconditional class"), ("run", "distilled into a student")]
)
def test_guidance_that_cannot_be_followed_is_refused(
    made: Path, tmp_path: Path, kind: str, words: str, refusal: Callable[..., str]
) -> None:
    sentence = refusal(lambda: stages.sample(str(made / kind), str(tmp_path / "a.png"), guidance=3.0))
    assert "guidance is 3.0" in sentence
    assert words in sentence


def test_a_student_takes_its_first_timesteps_and_no_more_than_it_has(
    made: Path, tmp_path: Path, refusal: Callable[..., str]
) -> None:
    assert "steps is 2; this student was made for 1" in refusal(
        lambda: stages.sample(str(made / "run"), str(tmp_path / "a.png"), steps=2)
    )
    default, one = (
        stages.sample(str(made / "run"), str(tmp_path / f"{n}.png"), count=3, steps=n) for n in (0, 1)
    )
    assert np.array_equal(np.asarray(Image.open(default)), np.asarray(Image.open(one)))


class Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, str]] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.found += [(name, value or "") for name, value in attrs if name in ("src", "href")]


def test_the_report_is_one_file_that_fetches_nothing_and_shows_everything(
    made: Path, packaged: Path, tmp_path: Path
) -> None:
    names = ("shards", "teacher", "run", "evaluation", "gate")
    page = Path(
        stages.report(**paths(made, *names), out=str(tmp_path / "report.html"), package=str(packaged))
    ).read_text()
    links = Links()
    links.feed(page)
    assert all(re.match("data:image/(png|jpeg);base64,", value) for _, value in links.found)
    assert not {"script", "link", "iframe"} & set(links.tags)
    assert links.tags.count("img") >= 4 + 5 + 2, "four grids, five plots, two previews"
    scores = read_manifest(made / "evaluation", "evaluation").facts
    for wanted in (
        f"{scores['fid_student']:.2f}",
        f"{scores['fid_teacher']:.2f}",
        "Accepted",
        "critic_updates",
        read_manifest(packaged, "package").digest,
    ):
        assert wanted in page


def test_the_report_of_a_rejected_run_says_why(made: Path, micro: Config, tmp_path: Path) -> None:
    strict = micro.model_copy(update={"gate": micro.gate.model_copy(update={"factor": 1e-9})})
    reason = stages.gate(strict, str(made / "evaluation"), str(tmp_path / "gate")).facts["reason"]
    stages.report(
        **paths(made, "shards", "teacher", "run", "evaluation"),
        gate=str(tmp_path / "gate"),
        out=str(tmp_path / "r.html"),
    )
    page = (tmp_path / "r.html").read_text()
    assert "Rejected" in page
    assert reason in html.unescape(page)


def test_a_report_of_folders_of_different_runs_is_refused(
    made: Path, micro: Config, pictures: Path, tmp_path: Path, refusal: Callable[..., str]
) -> None:
    other = micro.model_copy(update={"seed": 5})
    stages.shard(other, str(pictures), str(tmp_path / "shards"))
    folders = paths(made, "teacher", "run", "evaluation", "gate") | {"data": str(tmp_path / "shards")}
    out = tmp_path / "r.html"
    assert "was not made from" in refusal(lambda: stages.report(**folders, out=str(out)))
    assert not out.exists()


def test_network_json_is_data(made: Path) -> None:
    facts = json.loads((made / "run" / "network.json").read_text())
    assert facts["levels"] == [999]
    assert facts["family"]["network"]["classes"] == 3


def test_a_refused_teacher_can_be_trained_after_the_mistake_is_corrected(
    made: Path, micro: Config, tmp_path: Path, refusal: Callable[..., str]
) -> None:
    wrong = with_adm(micro, resolution=16)
    refusal(lambda: stages.teach(wrong, str(made / "shards"), str(tmp_path / "teacher")))
    assert not list(tmp_path.iterdir())
    stages.teach(micro, str(made / "shards"), str(tmp_path / "teacher"))


def test_a_student_is_not_evaluated_against_another_teacher(
    made: Path, micro: Config, tmp_path: Path, refusal: Callable[..., str]
) -> None:
    other = micro.model_copy(update={"seed": 1})
    stages.teach(other, str(made / "shards"), str(tmp_path / "teacher"))
    sentence = refusal(
        lambda: stages.evaluate(
            micro, str(made / "shards"), str(tmp_path / "teacher"), str(made / "run"), str(tmp_path / "e")
        )
    )
    assert "was not made with the teacher" in sentence


def test_a_changed_teacher_is_not_distilled(
    made: Path, micro: Config, tmp_path: Path, refusal: Callable[..., str]
) -> None:
    copy = Path(shutil.copytree(made / "teacher", tmp_path / "teacher"))
    content = bytearray((copy / "network.safetensors").read_bytes())
    content[-1] ^= 1
    (copy / "network.safetensors").write_bytes(content)
    sentence = refusal(lambda: stages.distill(micro, str(made / "shards"), str(copy), str(tmp_path / "run")))
    assert "network.safetensors was changed" in sentence


def test_sampling_nothing_or_nowhere_is_refused(
    made: Path, tmp_path: Path, refusal: Callable[..., str]
) -> None:
    assert "expected a package or run or teacher folder" in refusal(
        lambda: stages.sample("/nowhere", str(tmp_path / "a.png"))
    )
    assert "at least one" in refusal(
        lambda: stages.sample(str(made / "run"), str(tmp_path / "a.png"), count=0)
    )
