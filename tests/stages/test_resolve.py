"""Teachers and students from elsewhere as folders: NVIDIA's pickle, a training folder, a single file of SDXL."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dmd2 import recipes, stages
from dmd2.config import Config, EdmConfig
from dmd2.io.artifact import read_manifest
from dmd2.io.staging import draft_artifact
from dmd2.model import load_network, save_network
from dmd2.models.convert.edm_pickle import read_edm_pickle
from dmd2.stages.networks import starting_weights
from dmd2.stages.resolve import resolve_or_teach
from dmd2.stages.smoke_sample import check_draws
from tests.models.test_convert import edm, network


@pytest.fixture
def pickled(tmp_path: Path) -> Path:
    return edm(tmp_path)


def recipe_of(path: Path) -> Config:
    found, _ = read_edm_pickle(path)
    return recipes.get("edm-digits-no-gan").model_copy(update={"family": EdmConfig(network=found)})


def test_nvidias_pickle_becomes_a_teacher_that_can_be_sampled(pickled: Path, tmp_path: Path) -> None:
    config, out = recipe_of(pickled), tmp_path / "teacher"
    made = stages.resolve(config, str(pickled), str(out))
    assert made.kind == "teacher"
    images = load_network(out).sample_teacher([0, 1], seed=0, steps=2)
    assert images.shape == (2, 3, 16, 16)
    assert stages.resolve(config, str(pickled), str(out)) == read_manifest(out, "teacher")  # done is done


def test_a_pickle_of_another_size_is_refused_by_what_differs(
    pickled: Path, tmp_path: Path, refusal: Callable[[Callable[[], object]], str]
) -> None:
    config = recipes.get("edm-imagenet64")
    sentence = refusal(lambda: stages.resolve(config, str(pickled), str(tmp_path / "teacher")))
    assert "resolution is 16, not 64" in sentence
    assert not (tmp_path / "teacher").exists()


def test_a_published_training_folder_becomes_a_run(pickled: Path, tmp_path: Path) -> None:
    config = recipe_of(pickled)
    stages.resolve(config, str(pickled), str(tmp_path / "teacher"))
    (tmp_path / "training").mkdir()
    torch.save(network().state_dict(), tmp_path / "training" / "pytorch_model.bin")
    critic = {f"module.fake_unet.{name}": weight + 1 for name, weight in network().state_dict().items()}
    critic |= {f"module.{name}": torch.zeros(2) for name in ("real_unet.x", "cls_pred_branch.0.weight")}
    resampling = {n: t for n, t in network().state_dict().items() if n.endswith("resample_filter")}
    critic |= {f"module.fake_unet.{name}": weight for name, weight in resampling.items()}
    torch.save(critic, tmp_path / "training" / "pytorch_model_1.bin")
    stages.adopt(config, str(tmp_path / "training"), str(tmp_path / "teacher"), str(tmp_path / "run"))
    student = load_network(tmp_path / "run")
    assert student.timesteps == (999,)
    assert student.sample([0, 1, 2], seed=0).shape == (3, 3, 16, 16)
    start = starting_weights(str(tmp_path / "run"), weights=True)
    assert start
    assert start.critic
    for name, weight in student.network.state_dict().items():
        assert torch.equal(start.student[name], weight)
        assert torch.equal(start.critic[name], weight + 1), name


class Grey(torch.nn.Module):
    """An EDM network whose denoised image is 0 everywhere, for sigma_data 0.5."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor, noise: torch.Tensor, *cond: object, **more: object) -> torch.Tensor:
        return -0.5 / torch.exp(4 * noise.reshape(-1, 1, 1, 1)) * x * self.weight


def test_a_teacher_that_draws_one_colour_or_no_numbers_is_refused(
    made: Path, micro: Config, tmp_path: Path, refusal: Callable[[Callable[[], object]], str]
) -> None:
    teacher = load_network(made / "teacher")
    check_draws(teacher, "theirs")
    grey = replace(teacher, network=Grey())
    assert "theirs draws images of one colour" in refusal(lambda: check_draws(grey, "theirs"))
    with torch.no_grad():
        grey.network.get_parameter("weight").fill_(torch.nan)
    assert "theirs draws nothing" in refusal(lambda: check_draws(grey, "theirs"))


def test_a_teacher_folder_with_weights_that_are_no_numbers_is_refused(
    made: Path, micro: Config, tmp_path: Path, refusal: Callable[[Callable[[], object]], str]
) -> None:
    teacher = load_network(made / "teacher")
    weights = teacher.network.state_dict()
    next(iter(weights.values())).view(-1)[0] = torch.nan
    source = str(tmp_path / "source")
    with draft_artifact(source, "teacher", micro, {}) as draft:
        save_network(draft.path, teacher, weights)
    assert f"{source} has 1 infinite or NaN values" in refusal(
        lambda: resolve_or_teach(micro, source, "", str(tmp_path / "teacher"))
    )
    assert resolve_or_teach(micro, str(made / "teacher"), "", "") == str(made / "teacher")
