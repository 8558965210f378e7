"""LPIPS, with a VGG of random weights: the real ones are fetched."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
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
