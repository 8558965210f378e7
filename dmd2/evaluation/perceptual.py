"""LPIPS (Zhang et al. 2018), a differentiable perceptual distance of images. For the regression warm-up.

As in DMD2's reference, average pooling takes the place of VGG's max pooling, whose gradient reaches one pixel in four.
The package `lpips` contains its own linear weights, but lets torchvision download and unpickle those of VGG. Here the VGG file is
fetched, compared with its digest, and read as tensors only.
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
from dmd2.evaluation.weights import fetch_weights

SMALLEST = 64
"""Pixels along a side that VGG needs at least; smaller images are enlarged to it."""
SLICES = 5
"""Groups of layers in lpips' VGG; inside them, layers keep their index in torchvision's `features`."""


def lpips(settings: WeightsConfig, device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
    """A function of two image batches (B, 3, H, W) in [-1, 1] that returns the mean LPIPS distance of the pairs, a scalar."""
    from lpips import LPIPS

    with warnings.catch_warnings(action="ignore"):  # it calls deprecated functions of torchvision
        network = LPIPS(net="vgg", pnet_rand=True, verbose=False).eval().requires_grad_(False)
    with tempfile.TemporaryDirectory() as folder:
        fetch_weights(settings, Path(folder) / "vgg16.pth", "--distill.regression.vgg")
        _load_vgg(network.net, Path(folder) / "vgg16.pth", settings.uri)
    _pool_by_average(network.net)
    return mean_distance(network.to(device))


def _pool_by_average(vgg: nn.Module) -> None:
    for part in vgg.children():
        for name, layer in part.named_children():
            if isinstance(layer, nn.MaxPool2d):
                part.register_module(name, nn.AvgPool2d(layer.kernel_size, layer.stride))


def _load_vgg(vgg: nn.Module, path: Path, name: str) -> None:
    """Load torchvision's VGG-16 file into lpips' network; `name` is how errors call the file."""
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


def mean_distance(network: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    """The mean over a batch of the distances that the network gives; images below `SMALLEST` are enlarged."""

    def distance(a: Tensor, b: Tensor) -> Tensor:
        if (side := min(a.shape[-2:])) < SMALLEST:
            a, b = (F.interpolate(x, scale_factor=SMALLEST / side, mode="bilinear") for x in (a, b))
        out: Tensor = network(a, b)
        return out.mean()

    return distance
