"""Grids of images."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from torch import Tensor

BORDER = 1
"""Pixels between the images of a grid, and around it."""


def image_grid(images: Tensor, columns: int, border: int = BORDER) -> Image.Image:
    """Arrange images in a grid, row by row, on a grey background.

    Args:
        images: (N, C, H, W), uint8 in 0..255, with 1 or 3 channels.
        columns: Images per row.
        border: Pixels between the images, and around them.
    """
    count, channels, height, width = images.shape
    rows = -(-count // columns)
    sheet = np.full(
        (rows * (height + border) + border, columns * (width + border) + border, channels), 128, np.uint8
    )
    for index, image in enumerate(images.permute(0, 2, 3, 1).cpu().numpy()):
        row, column = divmod(index, columns)
        top, left = row * (height + border) + border, column * (width + border) + border
        sheet[top : top + height, left : left + width] = image
    return Image.fromarray(sheet.squeeze(-1) if channels == 1 else sheet)
