"""Feature networks for FID, chosen by name, and the distance between two sets of features.

Resizing, Inception and the Frechet formula are clean-fid's (Parmar et al. 2022).
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cleanfid.fid import frechet_distance, get_batch_features
from cleanfid.inception_torchscript import InceptionV3W
from cleanfid.resize import build_resizer, make_resizer
from torch import Tensor

from dmd2.config import BestConfig, Config, EvaluateConfig, WeightsConfig
from dmd2.data.loader import RawBatch, Shards
from dmd2.data.shards import TRAIN
from dmd2.evaluation import classifier, efficientnet
from dmd2.evaluation.weights import fetch
from dmd2.io.local import sha256
from dmd2.progress import Progress

FIT_IMAGES = 20_000
"""Images that the classifier is fitted to, at most."""


@dataclass(frozen=True)
class Features:
    """Images -> features, and what the report says of them."""

    network: Callable[[Tensor], Tensor]
    """(B, 3, h, w) with values 0 to 255 -> (B, D)."""
    resize: Callable[[np.ndarray], np.ndarray]
    """uint8 (H, W, 3) -> float32 (h, w, 3)."""
    facts: dict[str, Any]
    device: torch.device

    def __call__(self, images: Tensor) -> np.ndarray:
        """uint8 (N, C, H, W) -> float64 (N, D)."""
        parts = []
        with Progress("features", len(images), "images") as progress:
            for part in images.split(64):
                parts.append(self.of(part))
                progress.advance(len(part))
        return np.concatenate(parts)

    def of(self, images: Tensor) -> np.ndarray:
        """The same of a few images, in one network call."""
        resized = np.stack(
            [self.resize(image) for image in classifier.rgb(images).permute(0, 2, 3, 1).numpy()]
        )
        features: np.ndarray = get_batch_features(
            torch.from_numpy(resized).permute(0, 3, 1, 2), self.network, self.device
        )
        return features.astype(np.float64)


def by_name(config: Config, data: str, holdout: RawBatch, device: torch.device) -> Features:
    """What the evaluation looks with."""
    if config.evaluate.features == "classifier":
        return _classifier(config, data, holdout, device)
    return pretrained(config.evaluate, "evaluate", device)


def pretrained(settings: EvaluateConfig | BestConfig, section: str, device: torch.device) -> Features:
    """Features that do not depend on the data; `section` is where in the Config the settings are."""
    if settings.features == "efficientnet":
        return _efficientnet(device)
    return _inception(settings.inception, f"--{section}.inception", device)


def _classifier(config: Config, data: str, holdout: RawBatch, device: torch.device) -> Features:
    size = config.family.image[1]
    train = Shards(data, TRAIN).evenly_spaced(FIT_IMAGES)
    network = classifier.fit(train, config.family.classes, config.evaluate.seed, device)
    facts = {
        "features": f"classifier fitted to {len(train.image)} training images, seed {config.evaluate.seed}",
        "features_accuracy": classifier.accuracy(network, holdout, device),
        "features_accuracy_images": len(holdout.image),
    }
    return Features(network, _bicubic(size), facts, device)


def _efficientnet(device: torch.device) -> Features:
    weights = efficientnet.weights()
    network = efficientnet.load(weights).to(device)
    facts = {"features": f"EfficientNet-Lite0 (ImageNet), sha256 {sha256(weights)[:12]}"}
    return Features(network, _bicubic(efficientnet.SIZE), facts, device)


def _inception(settings: WeightsConfig, option: str, device: torch.device) -> Features:
    with tempfile.TemporaryDirectory() as folder:
        fetch(settings, Path(folder) / "inception-2015-12-05.pt", option)
        network = InceptionV3W(folder, download=False).to(device)
    facts = {"features": f"Inception-v3 of clean-fid, sha256 {settings.sha256[:12]}"}
    return Features(network, build_resizer("clean"), facts, device)


def _bicubic(size: int) -> Callable[[np.ndarray], np.ndarray]:
    """uint8 (H, W, 3) -> float32 (size, size, 3)."""
    resize: Callable[[np.ndarray], np.ndarray] = make_resizer("PIL", False, "bicubic", (size, size))
    return resize


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """Frechet distance of two sets of features (N, D), seen as Gaussians (Heusel et al. 2017)."""
    moments = [m for f in (a, b) for m in (f.mean(axis=0), np.cov(f, rowvar=False))]
    return float(frechet_distance(*moments))
