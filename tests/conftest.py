"""Small things that many tests are about. Real classes at tiny sizes; nothing of torch is replaced."""

from __future__ import annotations

import dmd2  # noqa: F401 - before torch, which reads then what dmd2 sets  # isort: skip

import importlib
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from dmd2 import recipes, stages
from dmd2.config import AdmConfig, Config, EdmConfig
from dmd2.denoiser import Denoiser
from dmd2.models.family import make_family
from dmd2.parallel.ranks import World
from dmd2.training import build
from dmd2.training.terms import DistributionMatching
from dmd2.training.trainer import DMD2Trainer
from tests.bucket import bucket, object_store, proxy  # noqa: F401 - fixtures
from tests.durations import pytest_addoption, pytest_collection_modifyitems, pytest_configure  # noqa: F401 - hooks
from tests.publishing.hub import hub  # noqa: F401 - a fixture
from tests.publishing.registry import registry  # noqa: F401 - a fixture
from tests.tiny_sdxl import pipeline, squares, stable15  # noqa: F401 - fixtures

torch.set_num_threads(1)  # tensors are tiny: a second thread only waits

ALONE = World(torch.device("cpu"))

MICRO = (
    "family.network.resolution=8", "family.network.channels=8", "family.network.multipliers=1", "family.network.attention=8",
    "family.network.patch=2", "family.network.classes=3", "data.holdout=12", "data.images_per_shard=16", "loader.shuffle_block=2",
    "teach.steps=6", "teach.batch=8", "teach.log_every=2", "teach.save_every=3",
    "distill.steps=10", "distill.batch=8", "distill.log_every=2", "distill.preview_every=5", "distill.save_every=4",
    "evaluate.images=24", "evaluate.teacher_steps=3", "evaluate.batch=12",
)  # fmt: skip
"""Overrides that make the digits recipe a matter of seconds. Its features are 4x4 at 8 channels."""


def pytest_collection(session: pytest.Session) -> None:
    """Import the pipelines first where their tests are collected. KFP looks up the module of every frame of the stack at each
    setting of a task, which takes ten times longer inside the imports of a test, among the modules that other tests import."""
    folder, start = Path(__file__).parent / "pipelines", session.config.invocation_params.dir
    paths = [start / arg.partition("::")[0] for arg in session.config.args]
    if find_spec("kfp") and any(folder.is_relative_to(path) or path.is_relative_to(folder) for path in paths):
        importlib.import_module("pipelines.distill")


def flags(overrides: tuple[str, ...] = MICRO) -> list[str]:
    """The overrides as the command line takes them."""
    pairs = [override.split("=") for override in overrides]
    return [word for field, value in pairs for word in (f"--{field}", *value.split(","))]


def adm(config: Config) -> AdmConfig:
    """The size of the network of an EDM recipe."""
    assert isinstance(config.family, EdmConfig)
    return config.family.network


def with_adm(config: Config, **changes: Any) -> Config:
    """An EDM recipe whose network has another size."""
    network = AdmConfig.model_validate({**dict(adm(config)), **changes})
    return config.model_copy(update={"family": config.family.model_copy(update={"network": network})})


def make_trainer(config: Config, teacher: nn.Module) -> DMD2Trainer:
    trainer = build.trainer(config, make_family(config.family), teacher.state_dict(), ALONE)
    assert isinstance(trainer, DMD2Trainer)
    return trainer


def teacher_of(trainer: DMD2Trainer) -> nn.Module:
    """The network that the trainer's distribution matching looks at."""
    (matching,) = (term for term in trainer.terms if isinstance(term, DistributionMatching))
    found = [
        c.cell_contents for c in matching.teacher.__closure__ or () if isinstance(c.cell_contents, Denoiser)
    ]
    return found[0].network


@pytest.fixture(scope="session")
def micro() -> Config:
    return recipes.resolve("edm-digits", MICRO)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 pictures in three classes that a network can tell apart: bars across, bars down, blobs."""
    root = tmp_path_factory.mktemp("source")
    rng = np.random.default_rng(0)
    for label, name in enumerate(("across", "blob", "down")):
        (root / name).mkdir()
        for index in range(20):
            image = rng.integers(0, 60, (8, 8), dtype=np.uint8)
            at = int(rng.integers(1, 6))
            rows, columns = (
                (slice(at, at + 2), slice(None)),
                (slice(2, 6), slice(2, 6)),
                (slice(None), slice(at, at + 2)),
            )[label]
            image[rows, columns] = 220
            Image.fromarray(image).save(root / name / f"{index:02d}.png")
    return root


@pytest.fixture(scope="session")
def made(micro: Config, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole micro run: shards, teacher, run, evaluation, gate. Read only."""
    root = tmp_path_factory.mktemp("made")
    stages.shard(micro, str(pictures), str(root / "shards"))
    stages.teach(micro, str(root / "shards"), str(root / "teacher"))
    stages.distill(micro, str(root / "shards"), str(root / "teacher"), str(root / "run"))
    stages.evaluate(micro, *(str(root / name) for name in ("shards", "teacher", "run", "evaluation")))
    generous = micro.model_copy(update={"gate": micro.gate.model_copy(update={"factor": 1e6})})
    stages.gate(generous, str(root / "evaluation"), str(root / "gate"))
    return root


@pytest.fixture
def refusal() -> Callable[[Callable[[], object]], str]:
    """Call something that must be refused, and return the sentence it gives."""
    from dmd2.errors import Refused

    def call(action: Callable[[], object]) -> str:
        with pytest.raises(Refused) as caught:
            action()
        sentence = str(caught.value)
        assert "\n" not in sentence
        return sentence

    return call
