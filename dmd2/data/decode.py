"""What becomes of a file: decoded, upright, opaque, eight bits a channel, square, and of the size asked for."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageOps

from dmd2.errors import Refused, near_miss

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
"""What is taken for an image. Not all that Pillow knows: for some it starts another program."""
IMAGE_SUFFIXES = (
    ".avif",
    ".bmp",
    ".gif",
    ".jp2",
    ".jpeg",
    ".jpg",
    ".pgm",
    ".png",
    ".ppm",
    ".tif",
    ".tiff",
    ".webp",
)
"""How the name of an image ends."""
FILTERS = {name: Image.Resampling[name.upper()] for name in ("bicubic", "lanczos", "box", "bilinear")}


def decode_image(data: bytes) -> Image.Image:
    """The picture in an encoded file (of an animation the first)."""
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        image.load()
    return image


def prepare_image(
    image: Image.Image, resolution: int, channels: int, filter: str = "bicubic", background: str = "white"
) -> Image.Image:
    """Upright, on `background` where it is transparent, grey or RGB, the central square, resized with antialiasing.

    FID assumes `bicubic`. What is a square of that size already is not resampled.
    """
    if filter not in FILTERS:
        raise Refused(f"no filter is named {filter!r}: {near_miss(filter, list(FILTERS))}")
    mode = "L" if channels == 1 else "RGB"
    image = _flatten_transparency(_to_8_bits(ImageOps.exif_transpose(image)), background)
    image = image if image.mode == mode else image.convert(mode)
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.crop((left, top, left + side, top + side))
    return square if side == resolution else square.resize((resolution, resolution), FILTERS[filter])


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Greys of 16 bits as greys of 8: Pillow would cut them off at 255."""
    if image.mode == "F":
        raise Refused(
            "the pixels are floating point numbers, whose range nobody knows; save them as integers"
        )
    if not image.mode.startswith("I"):
        return image
    levels = np.asarray(image).astype(np.int64)
    if levels.min() < 0 or levels.max() > 65535:
        raise Refused("the pixels have more than 16 bits; save them with 8 or 16")
    grey = Image.fromarray(((levels + 128) // 257).astype(np.uint8))
    if (key := image.info.get("transparency")) is None:
        return grey
    return Image.merge("LA", (grey, Image.fromarray(np.where(levels == key, 0, 255).astype(np.uint8))))


def _flatten_transparency(image: Image.Image, background: str) -> Image.Image:
    """Without transparency: below transparent pixels there may be anything."""
    if not image.has_transparency_data:
        return image
    try:
        behind = Image.new("RGB", image.size, background).convert("RGBA")
    except ValueError:
        raise Refused(f"no colour is named {background!r}; give a name like white, or #rrggbb") from None
    return Image.alpha_composite(behind, image.convert("RGBA"))
