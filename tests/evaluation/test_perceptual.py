"""LPIPS, with a VGG of random weights: the real ones are fetched."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lpips import LPIPS
from torch import nn
from torchvision.models import vgg16

from dmd2.config import WeightsConfig
from dmd2.evaluation.perceptual import lpips
from dmd2.io.local import sha256

Distance = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of the form of torchvision's, but for the classifier, which is not looked at."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("vgg") / "vgg16.pth"
    torch.save({k: v for k, v in vgg16().state_dict().items() if k.startswith("features.")}, path)
    return path


def loaded(path: Path, digest: str = "") -> Distance:
    settings = WeightsConfig(uri=str(path), sha256=digest or sha256(path)[:8])
    return lpips(settings, torch.device("cpu"))


@pytest.fixture(scope="module")
def distance(published: Path) -> Distance:
    return loaded(published)


def test_the_weights_are_those_of_the_file(published: Path, distance: Distance) -> None:
    a, b = (torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(n)) for n in (0, 1))
    assert loaded(published)(a, b) == distance(a, b)
    other = {k: v.flip(0) + 0.1 for k, v in torch.load(published, weights_only=True).items()}
    torch.save(other, changed := published.with_name("changed.pth"))
    assert loaded(changed)(a, b) != distance(a, b)


def test_a_file_that_would_run_something_or_is_another_one_is_refused_and_does_not_run(
    published: Path, tmp_path: Path, refusal: Callable[[Callable[[], object]], str]
) -> None:
    class Hostile:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "ran",)

    (tmp_path / "vgg.pth").write_bytes(pickle.dumps({"features.0.weight": Hostile()}))
    (tmp_path / "short.pth").write_bytes(published.read_bytes()[:1000])
    assert "no VGG-16" in refusal(lambda: loaded(tmp_path / "vgg.pth"))
    assert "no VGG-16" in refusal(lambda: loaded(tmp_path / "short.pth"))
    assert not (tmp_path / "ran").exists()
    assert "distill.regression.vgg.sha256" in refusal(lambda: loaded(published, "0" * 8))
    assert "--distill.regression.vgg.uri" in refusal(lambda: loaded(tmp_path / "nothing", "0" * 8))


def test_it_pools_by_average_as_the_reference_does(published: Path, distance: Distance) -> None:
    """The same sum of squared differences of normalised features (Zhang et al. 2018, eq. 1), on a VGG with average pooling."""
    layers: list[nn.Module] = list(vgg16().features)
    weights = torch.load(published, weights_only=True)
    for index, layer in enumerate(layers):
        if isinstance(layer, nn.Conv2d):
            layer.load_state_dict({key: weights[f"features.{index}.{key}"] for key in ("weight", "bias")})
        layers[index] = nn.AvgPool2d(2, 2) if isinstance(layer, nn.MaxPool2d) else layer
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    linear = LPIPS(net="vgg", verbose=False, pnet_rand=True)
    a, b = torch.rand(2, 1, 3, 64, 64, generator=torch.Generator().manual_seed(2)) * 2 - 1
    x, y, found = *((image / 2 + 0.5 - mean) / std for image in (a, b)), torch.zeros(())
    for index, layer in enumerate(layers[:30]):
        x, y = layer(x).clone(), layer(y).clone()
        if index in (3, 8, 15, 22, 29):
            difference = (x / x.norm(dim=1, keepdim=True) - y / y.norm(dim=1, keepdim=True)) ** 2
            found = found + linear.lins[(3, 8, 15, 22, 29).index(index)](difference).mean()
    torch.testing.assert_close(distance(a, b), found, rtol=1e-3, atol=1e-6)


def test_it_can_be_computed_in_bfloat16(distance: Distance) -> None:
    a, b = (torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(n)) for n in (0, 1))
    exact = distance(a, b)
    with torch.autocast("cpu", torch.bfloat16):
        found = distance(a.requires_grad_(), b)
    found.float().backward()
    assert found.item() == pytest.approx(exact.item(), rel=0.05)
    assert a.grad is not None
    assert a.grad.isfinite().all()


@pytest.mark.parametrize("side", [16, 64])
def test_a_picture_is_at_no_distance_from_itself_and_at_more_the_more_it_is_changed(
    distance: Distance, side: int
) -> None:
    a = torch.rand(2, 3, side, side) * 2 - 1
    noise = torch.randn_like(a)
    near, far = distance(a, a + 0.05 * noise), distance(a, a + 0.5 * noise)
    assert distance(a, a) == 0
    assert 0 < near < far


def test_the_distance_has_a_gradient_at_the_picture(distance: Distance) -> None:
    a, b = (torch.rand(1, 3, 64, 64, requires_grad=True) for _ in range(2))
    distance(a, b).backward()
    assert a.grad is not None
    assert a.grad.abs().sum() > 0
