"""A small classifier, fitted to the training shards, whose last convolution serves as features for FID.

For data far from ImageNet (digits) and for machines without Inception's weights. As with Inception, the features
are the spatial means of the last convolutional maps; each is divided by its standard deviation over the training
images, so that all have equal weight and the scale of the score does not depend on the fit. Such scores
are comparable only between runs on the same data with the same seed.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmd2.data.loader import RawBatch
from dmd2.progress import Progress

EPOCHS, BATCH, LR, WIDTH, SHIFT = 6, 64, 2e-3, 64, 2
"""Fixed, so that equal data and seed give equal features. WIDTH is the number of features; SHIFT the largest random translation of an
image while fitting, in pixels, against overfitting."""


class Classifier(nn.Module):
    """Images (B, 3, H, W) with values 0 to 255 -> features (B, 64); `logits` reads the class from the same maps."""

    scale: Tensor

    def __init__(self, classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs in ((3, 16), (16, 32), (32, WIDTH)):
            layers += [
                nn.Conv2d(inputs, outputs, 3, stride=2, padding=1),
                nn.GroupNorm(8, outputs),
                nn.SiLU(),
            ]
        self.body = nn.Sequential(*layers)
        self.top = nn.Sequential(
            nn.AdaptiveAvgPool2d(4),
            nn.Flatten(),
            nn.Linear(16 * WIDTH, WIDTH),
            nn.SiLU(),
            nn.Linear(WIDTH, classes),
        )
        self.register_buffer("scale", torch.ones(WIDTH))

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self._maps(images).mean(dim=(2, 3)) / self.scale
        return features

    def logits(self, images: Tensor) -> Tensor:
        logits: Tensor = self.top(self._maps(images))
        return logits

    def _maps(self, images: Tensor) -> Tensor:
        maps: Tensor = self.body(images / 127.5 - 1)
        return maps


def fit(train: RawBatch, classes: int, seed: int, device: torch.device) -> Classifier:
    """Fit with Adam for `EPOCHS` epochs; all random numbers come from the seed."""
    torch.manual_seed(seed)
    network = Classifier(classes).to(device)
    optimizer = torch.optim.Adam(network.parameters(), lr=LR)
    with Progress("features", EPOCHS * len(train.image), "images") as progress:
        for _ in range(EPOCHS):
            for rows in torch.randperm(len(train.image)).split(BATCH):
                shift = torch.randint(-SHIFT, SHIFT + 1, (2,)).tolist()
                images = rgb(train.image[rows]).float().roll(shift, (2, 3)).to(device)
                loss = F.cross_entropy(network.logits(images), train.label[rows].to(device))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                progress.advance(len(rows))
    network.scale.copy_(_deviation(network, train, device))
    return network.eval()


@torch.no_grad()
def _deviation(network: Classifier, train: RawBatch, device: torch.device) -> Tensor:
    """The standard deviation of each feature over the images, (WIDTH,)."""
    batches = train.image.split(BATCH)
    return torch.cat([network(rgb(images).float().to(device)) for images in batches]).std(dim=0)


@torch.no_grad()
def accuracy(network: Classifier, batches: Iterable[RawBatch], device: torch.device) -> tuple[float, int]:
    """(share of the images that are classified correctly, number of images)."""
    correct = count = 0
    for batch in batches:
        classes = network.logits(rgb(batch.image).float().to(device)).argmax(1).cpu()
        correct += int((classes == batch.label).sum())
        count += len(classes)
    return correct / count, count


def rgb(images: Tensor) -> Tensor:
    """(B, 1 or 3, H, W) -> (B, 3, H, W)."""
    return images.expand(-1, 3, -1, -1)
