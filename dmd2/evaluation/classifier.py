"""A small classifier, fitted to the training shards, whose penultimate layer serves as features for FID.

For data far from ImageNet (digits) and for machines without Inception's weights. Scores with these features
compare runs on the same data with the same seed, and nothing else.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmd2.data.stream import Batch
from dmd2.progress import Progress

EPOCHS, BATCH, LR, WIDTH = 6, 64, 2e-3, 64
"""Fixed, so that equal data and seed give equal features. WIDTH is the number of features."""


class Classifier(nn.Module):
    """Images (B, 3, H, W) with values 0 to 255 -> features (B, 64); `logits` reads the class from them."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs in ((3, 16), (16, 32), (32, WIDTH)):
            layers += [
                nn.Conv2d(inputs, outputs, 3, stride=2, padding=1),
                nn.GroupNorm(4, outputs),
                nn.SiLU(),
            ]
        self.body = nn.Sequential(
            *layers, nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(16 * WIDTH, WIDTH)
        )
        self.top = nn.Linear(WIDTH, classes)

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.body(images / 127.5 - 1)
        return F.silu(features)

    def logits(self, images: Tensor) -> Tensor:
        logits: Tensor = self.top(self(images))
        return logits


def fit(train: Batch, classes: int, seed: int, device: torch.device) -> Classifier:
    """Adam, a few epochs, everything drawn from the seed."""
    torch.manual_seed(seed)
    network = Classifier(classes).to(device)
    optimizer = torch.optim.Adam(network.parameters(), lr=LR)
    with Progress("features", EPOCHS * len(train.image), "images") as progress:
        for _ in range(EPOCHS):
            for rows in torch.randperm(len(train.image)).split(BATCH):
                images = rgb(train.image[rows]).to(device)
                loss = F.cross_entropy(network.logits(images.float()), train.label[rows].to(device))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                progress.advance(len(rows))
    return network.eval()


@torch.no_grad()
def accuracy(network: Classifier, test: Batch, device: torch.device) -> float:
    """Share of the images that are put into their class."""
    hits = [
        (network.logits(rgb(test.image[rows]).float().to(device)).argmax(1).cpu() == test.label[rows])
        .sum()
        .item()
        for rows in torch.arange(len(test.image)).split(BATCH)
    ]
    return sum(hits) / len(test.image)


def rgb(images: Tensor) -> Tensor:
    """(B, 1 or 3, H, W) -> (B, 3, H, W)."""
    return images.expand(-1, 3, -1, -1)
