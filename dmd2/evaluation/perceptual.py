"""LPIPS (Zhang et al. 2018): how different two pictures look, with a gradient. For regression on a teacher's answers.

The package brings its own linear weights. Those of VGG it would have torchvision fetch and unpickle; here they are
fetched, compared with their digest, and read as tensors.
"""

from __future__ import annotations

import pickle
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmd2.config import WeightsConfig
from dmd2.errors import Refused, brief
from dmd2.evaluation.weights import fetch

SMALLEST = 64
"""Pixels along a side below which VGG's last maps are too small; smaller images are enlarged."""
SLICES = 5
"""Parts in which VGG's layers are named by their number in torchvision's `features`."""


def lpips(settings: WeightsConfig, device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
    """(a, b), each (B, 3, H, W) in [-1, 1] -> the mean of their distances."""
    from lpips import LPIPS

    with warnings.catch_warnings(action="ignore"):  # its ways with torchvision are old
        network = LPIPS(net="vgg", pnet_rand=True, verbose=False).eval().requires_grad_(False)
    with tempfile.TemporaryDirectory() as folder:
        fetch(settings, Path(folder) / "vgg16.pth", "--distill.regression.vgg")
        _fill(network.net, Path(folder) / "vgg16.pth", settings.uri)
    return between(network.to(device))


def _fill(vgg: nn.Module, path: Path, name: str) -> None:
    try:
        weights = torch.load(path, weights_only=True)
        for part in (vgg.get_submodule(f"slice{n + 1}") for n in range(SLICES)):
            for number, layer in part.named_children():
                names = list(layer.state_dict())
                layer.load_state_dict({key: weights[f"features.{number}.{key}"] for key in names})
    except (pickle.UnpicklingError, RuntimeError, KeyError, TypeError, EOFError) as error:
        raise Refused(
            f"{name} holds no VGG-16 of torchvision ({brief(error)}); give its published file"
        ) from None


def between(network: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    """The mean over a batch of a network's distances."""

    def distance(a: Tensor, b: Tensor) -> Tensor:
        if (side := min(a.shape[-2:])) < SMALLEST:
            a, b = (F.interpolate(x, scale_factor=SMALLEST / side, mode="bilinear") for x in (a, b))
        out: Tensor = network(a, b)
        return out.mean()

    return distance
