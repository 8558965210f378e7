"""Feature networks: what they compute, and weights that have the expected digest or are not loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from dmd2.config import INCEPTION, Config, WeightsConfig
from dmd2.data.loader import Shards
from dmd2.evaluation import classifier
from dmd2.evaluation.features import load_extractor
from dmd2.io.local import sha256
from tests.evaluation.test_frechet import fid


def test_the_classifier_learns_and_its_features_tell_noise_from_pictures(micro: Config, made: Path) -> None:
    device = torch.device("cpu")
    train, holdout = (Shards(made / "shards", split).evenly_spaced(100) for split in ("train", "holdout"))
    features = load_extractor(micro, str(made / "shards"), device)
    assert features.facts["features_accuracy"] > 0.6, "three classes, so chance is a third"
    assert features.facts["features_accuracy_images"] == 12
    real = features(holdout.image).numpy()
    noise = features(torch.randint(0, 256, holdout.image.shape, dtype=torch.uint8)).numpy()
    assert fid(features(train.image).numpy(), real) < fid(noise, real)


def test_the_same_seed_gives_the_same_features(made: Path) -> None:
    train = Shards(made / "shards", "train").evenly_spaced(100)
    one, two, other = (classifier.fit(train, 3, seed, torch.device("cpu")) for seed in (1, 1, 2))
    images = classifier.rgb(train.image[:4]).float()
    assert torch.equal(one(images), two(images))
    assert (one(images) - other(images)).abs().mean() > 0.1 * one(images).std(), "another seed, other weights"


class Stand(nn.Module):
    """What clean-fid reads of the published TorchScript file, in the small: `layers` gives 2048 features."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2048))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    torch.jit.script(Stand()).save(tmp_path / "weights.pt")
    return tmp_path / "weights.pt"


def inception(config: Config, uri: str, digest: str) -> Config:
    settings = config.evaluate.model_copy(
        update={"features": "inception", "inception": WeightsConfig(uri=uri, sha256=digest)}
    )
    return config.model_copy(update={"evaluate": settings})


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_inception_reads_its_weights_from_a_uri_through_clean_fid(
    micro: Config, made: Path, weights: Path, scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real loading and resizing to 299 pixels; only the weights are a stand-in, for they cannot be had offline."""
    monkeypatch.setattr("dmd2.evaluation.features.TRUSTED_PROGRAMS", (sha256(weights),))
    holdout = Shards(made / "shards", "holdout").evenly_spaced(5)
    config = inception(micro, f"{scheme}{weights}", sha256(weights))
    features = load_extractor(config, str(made / "shards"), torch.device("cpu"))
    out = features(holdout.image)
    assert out.shape == (5, 2048)
    means = (classifier.rgb(holdout.image).double().mean((2, 3)).numpy() - 128) / 128
    linear = Stand()
    linear.load_state_dict(torch.jit.load(weights).state_dict())
    expected = linear.layers[2](torch.from_numpy(means).float()).detach().numpy()
    np.testing.assert_allclose(out.numpy(), expected, atol=0.02)


def test_weights_with_another_digest_are_never_loaded(
    micro: Config, weights: Path, refusal: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[str] = []
    monkeypatch.setattr(torch.jit, "load", lambda path: loaded.append(path))
    config = inception(micro, str(weights), INCEPTION.sha256)
    assert "it was not loaded" in refusal(lambda: load_extractor(config, "", torch.device("cpu")))
    own = inception(micro, str(weights), sha256(weights))
    assert "no other one is run" in refusal(lambda: load_extractor(own, "", torch.device("cpu")))
    assert not loaded


def test_weights_that_are_not_there_are_refused(micro: Config, refusal: Callable[..., str]) -> None:
    config = inception(micro, "/nowhere/weights.pt", INCEPTION.sha256)
    assert "evaluate.inception.uri" in refusal(lambda: load_extractor(config, "", torch.device("cpu")))
