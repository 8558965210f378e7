"""Feature networks: what FID compares images by. Inception and its resizing are clean-fid's (Parmar et al. 2022)."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from cleanfid.inception_torchscript import InceptionV3W
from cleanfid.resize import build_resizer, make_resizer
from PIL import Image
from torch import Tensor

from dmd2.config import INCEPTION, BestConfig, Config, EvaluateConfig, WeightsConfig
from dmd2.data.loader import Shards
from dmd2.data.shard_table import HOLDOUT, TRAIN
from dmd2.errors import Refused
from dmd2.evaluation import classifier, efficientnet, inception
from dmd2.evaluation.weights import fetch_weights
from dmd2.io.local import sha256
from dmd2.models.family import Prompt

TRUSTED_PROGRAMS = (INCEPTION.sha256,)
"""Digests of the TorchScript files that may be run."""
FIT_IMAGES = 20_000
"""Most images that the classifier is fitted to."""


@dataclass(frozen=True)
class FeatureExtractor:
    """Images -> features, and the facts about it for the manifest."""

    network: Callable[[Tensor], Tensor]
    """(B, 3, h, w) with values 0 to 255 -> (B, D)."""
    resize: Callable[[np.ndarray], np.ndarray]
    """uint8 (H, W, 3) -> float32 (h, w, 3)."""
    facts: dict[str, Any]
    device: torch.device
    digest: str
    """sha256 of the weights."""

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 (B, 1 or 3, H, W) -> float64 (B, D) on the CPU, in one network call."""
        return self.measure(images).double()

    @torch.no_grad()
    def measure(self, images: Tensor, prompts: Sequence[Prompt] = ()) -> Tensor:
        """The same in the network's own precision."""
        rows = classifier.rgb(images).permute(0, 2, 3, 1).numpy()
        resized = torch.from_numpy(np.stack([self.resize(image) for image in rows])).permute(0, 3, 1, 2)
        return self.network(resized.to(self.device)).cpu()


def load_extractor(config: Config, data: str, device: torch.device) -> FeatureExtractor:
    """The network that `evaluate.features` names. A classifier is fitted to the training shards in `data`, and its accuracy on the
    held-out images noted."""
    if config.evaluate.features == "classifier":
        found = _classifier(config, data, device)
    else:
        found = load_pretrained(config.evaluate, "evaluate", device)
    return reduced_to(config.evaluate.resize, found)


def reduced_to(side: int, extractor: FeatureExtractor) -> FeatureExtractor:
    """The same of images that are cut and reduced to this size before; 0 = they are not."""
    own = extractor.resize
    return replace(extractor, resize=lambda image: own(cut_and_reduce(image, side))) if side else extractor


def load_pretrained(
    settings: EvaluateConfig | BestConfig, section: str, device: torch.device
) -> FeatureExtractor:
    """A network that does not depend on the data; `section` is the place of the settings in the Config, for errors."""
    if settings.features == "efficientnet":
        return _efficientnet(device)
    return _inception(settings.inception, f"--{section}.inception", device)


def cut_and_reduce(image: np.ndarray, side: int) -> np.ndarray:
    """The square at the centre of an image, uint8 (H, W, 3), at this size by Lanczos' filter: uint8 (side, side, 3)."""
    height, width = image.shape[:2]
    short = min(height, width)
    top, left = (height - short) // 2, (width - short) // 2
    square = Image.fromarray(image[top : top + short, left : left + short])
    return np.asarray(square.resize((side, side), Image.Resampling.LANCZOS))


def _classifier(config: Config, data: str, device: torch.device) -> FeatureExtractor:
    size = config.family.image[1]
    train = Shards(data, TRAIN).evenly_spaced(FIT_IMAGES)
    network = classifier.fit(train, config.family.classes, config.evaluate.seed, device)
    holdout = Shards(data, HOLDOUT).evenly_spaced_batches(config.evaluate.images, classifier.BATCH)
    accuracy, count = classifier.accuracy(network, holdout, device)
    facts = {
        "features": f"classifier fitted to {len(train.image)} training images, seed {config.evaluate.seed}",
        "features_accuracy": accuracy,
        "features_accuracy_images": count,
    }
    digest = hashlib.sha256(safetensors.torch.save(network.state_dict())).hexdigest()
    return FeatureExtractor(network, _bicubic(size), facts, device, digest)


def _efficientnet(device: torch.device) -> FeatureExtractor:
    weights = efficientnet.weights()
    network = efficientnet.load(weights).to(device)
    digest = sha256(weights)
    facts = {"features": f"EfficientNet-Lite0 (ImageNet), sha256 {digest[:12]}"}
    return FeatureExtractor(network, _bicubic(efficientnet.SIZE), facts, device, digest)


def _inception(settings: WeightsConfig, option: str, device: torch.device) -> FeatureExtractor:
    network: torch.nn.Module
    with tempfile.TemporaryDirectory() as folder:
        if settings.uri.endswith(inception.SUFFIX):
            path = Path(folder) / f"inception{inception.SUFFIX}"
            fetch_weights(settings, path, option)
            network, digest = inception.load(path), sha256(path)
        else:
            _fetch_program(settings, Path(folder), option)
            network, digest = InceptionV3W(folder, download=False), INCEPTION.sha256
    facts = {"features": f"Inception-v3 of clean-fid, sha256 {digest[:12]}"}
    return FeatureExtractor(network.to(device), build_resizer("clean"), facts, device, digest)


def fetch_inception_tensors(settings: WeightsConfig, folder: Path, option: str) -> Path:
    """The published program, which is run once, as a file of tensors in the folder."""
    program = _fetch_program(settings, folder, option)
    inception.convert(program, out := program.with_suffix(inception.SUFFIX))
    return out


def _fetch_program(settings: WeightsConfig, folder: Path, option: str) -> Path:
    if not any(digest.startswith(settings.sha256) for digest in TRUSTED_PROGRAMS):
        raise Refused(
            f"{option}.sha256 is {settings.sha256}, which is not clean-fid's Inception ({INCEPTION.sha256}); the file is a program "
            f"(TorchScript), so no other one is run; set {option}.uri alone to use a copy, or use tensors (`dmd2 mirror`)"
        )
    fetch_weights(settings, path := folder / "inception-2015-12-05.pt", option)
    return path


def _bicubic(size: int) -> Callable[[np.ndarray], np.ndarray]:
    """uint8 (H, W, 3) -> float32 (size, size, 3)."""
    resize: Callable[[np.ndarray], np.ndarray] = make_resizer("PIL", False, "bicubic", (size, size))
    return resize
