"""LPIPS (Zhang et al. 2018): how different two pictures look, with a gradient. For regression on a teacher's answers."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmd2.errors import Refused, brief

SMALLEST = 64
"""Pixels along a side below which VGG's last maps are too small; smaller images are enlarged."""


def lpips(device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
    """(a, b), each (B, 3, H, W) in [-1, 1] -> the mean of their distances. VGG's weights are fetched by torchvision."""
    from lpips import LPIPS

    try:
        # Its own weights come with the package; they are tensors, and torch reads them as such.
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings(action="ignore"):
            network = LPIPS(net="vgg", verbose=False).to(device).eval().requires_grad_(False)
    except OSError as error:
        raise Refused(
            f"the weights of VGG for LPIPS cannot be fetched ({brief(error)}); put vgg16-397923af.pth into torch's hub cache, or set --distill.regression.metric mse"
        ) from None

    return between(network)


def between(network: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    """The mean over a batch of a network's distances."""

    def distance(a: Tensor, b: Tensor) -> Tensor:
        if (side := min(a.shape[-2:])) < SMALLEST:
            a, b = (F.interpolate(x, scale_factor=SMALLEST / side, mode="bilinear") for x in (a, b))
        out: Tensor = network(a, b)
        return out.mean()

    return distance
