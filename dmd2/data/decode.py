"""Decoding images and preparing them: upright, opaque, sRGB, 8 bits per channel, square, of the network's resolution."""

from __future__ import annotations

import io
import warnings
from collections import Counter
from typing import Protocol

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from dmd2.data.colour import convert_to_srgb
from dmd2.errors import Refused, near_miss

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
"""Formats that are decoded. Pillow knows more, but starts external programs for some of them."""
IMAGE_SUFFIXES = (
    ".apng", ".avif", ".bmp", ".gif", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm",
    ".tif", ".tiff", ".webp",
)  # fmt: skip
"""File name suffixes of images."""
MAX_PIXELS = 64_000_000
"""Default of the largest number of pixels that are decoded."""
FILTERS = {name: Image.Resampling[name.upper()] for name in ("bicubic", "lanczos", "box", "bilinear")}


class Decode(Protocol):
    """Turns the bytes of an image into an image of at most `max_pixels` pixels; others are refused before they are decoded."""

    def __call__(self, data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image: ...


def decode_image(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode an image file; of an animation, the first frame."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit is `max_pixels`
        try:
            file = Image.open(io.BytesIO(data), formats=FORMATS)
        except UnidentifiedImageError:  # its message has the address of an object in memory
            raise Refused(f"it is no image of a known format ({', '.join(FORMATS)})") from None
    with file as image:
        check_pixels(image.size, max_pixels)
        image.load()
    return image


def check_pixels(size: tuple[int, int], max_pixels: int) -> None:
    """Refuse an image that is too large, by its size in (width, height)."""
    if size[0] * size[1] > max_pixels:
        raise Refused(
            f"the image has {size[0]} x {size[1]} pixels, more than {max_pixels / 1e6:g} million; scale it down, or "
            "raise --data.max-megapixels"
        )


def prepare_image(
    image: Image.Image,
    resolution: int,
    channels: int,
    filter: str = "bicubic",
    background: str = "white",
    profiles: Counter[str] | None = None,
) -> Image.Image:
    """Apply the EXIF orientation, convert to sRGB by the colour profile, put transparent pixels on `background`, convert to grey or
    RGB, crop the central square and resize it with antialiasing.

    FID is commonly taken on images resized with `bicubic`. A square image of the wanted size is not resampled.

    Args:
        profiles: Counts what was done with colour profiles, by reason.
    """
    if filter not in FILTERS:
        raise Refused(f"no filter is named {filter!r}: {near_miss(filter, FILTERS)}")
    mode = "L" if channels == 1 else "RGB"
    image = _to_8_bits(ImageOps.exif_transpose(image))
    image, done = convert_to_srgb(image)
    if profiles is not None and done:
        profiles[done] += 1
    image = _flatten_transparency(image, background)
    image = image if image.mode == mode else image.convert(mode)
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.crop((left, top, left + side, top + side))
    return square if side == resolution else square.resize((resolution, resolution), FILTERS[filter])


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Scale 16-bit grey values to 8 bits; Pillow's own conversion would clip them at 255."""
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
    if (key := image.info.get("transparency")) is not None:
        grey.putalpha(Image.fromarray(np.where(levels == key, 0, 255).astype(np.uint8)))
    if profile := image.info.get("icc_profile"):
        grey.info["icc_profile"] = profile
    return grey


def _flatten_transparency(image: Image.Image, background: str) -> Image.Image:
    """Blend transparent pixels with the background; their own colour is arbitrary."""
    if not image.has_transparency_data:
        return image
    try:
        behind = Image.new("RGB", image.size, background).convert("RGBA")
    except ValueError:
        raise Refused(f"no colour is named {background!r}; give a name like white, or #rrggbb") from None
    return Image.alpha_composite(behind, image.convert("RGBA"))
