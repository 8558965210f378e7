"""LPIPS, with a VGG of random weights: the real ones are fetched."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from lpips import LPIPS

from dmd2.evaluation.perceptual import between

Distance = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@pytest.fixture(scope="module")
def distance() -> Distance:
    torch.manual_seed(0)
    return between(LPIPS(net="vgg", pnet_rand=True, verbose=False).eval().requires_grad_(False))


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
