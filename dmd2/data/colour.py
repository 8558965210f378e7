"""Colour profiles (ICC) of images: the values are converted to sRGB, which all networks are trained on.

An image without a profile is taken for sRGB, as browsers do, and keeps its values. So does one whose profile is sRGB by another
name, since a conversion would only round. A profile that cannot be used is left out, as browsers do, and counted.
"""

from __future__ import annotations

import io
from functools import lru_cache

import numpy as np
from PIL import Image, ImageCms

CONVERTED, IS_SRGB, BROKEN, OTHER_SPACE = (
    "converted to sRGB",
    "is sRGB",
    "broken, taken for sRGB",
    "of another colour space than the image, left out",
)
"""What is done with a profile."""
PROFILE_MODES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}
"""Colour space of a profile -> mode of the image to which it is applied."""
GREY_MODES, INK_MODES = ("1", "L", "LA", "La"), ("CMYK",)
ROUNDING = 1
"""Levels of 255 by which a profile may differ from sRGB and still be sRGB."""


def convert_to_srgb(image: Image.Image) -> tuple[Image.Image, str]:
    """(the image in sRGB and without its profile, what was done); the latter is empty if there is no profile."""
    profile = image.info.get("icc_profile")
    if not profile:
        return image, ""
    space = _colour_space(profile)
    if not space:
        return image, BROKEN
    mode = PROFILE_MODES.get(space)
    if mode is None or not _fits(mode, image.mode):
        return image, OTHER_SPACE
    transform = _transform(profile, mode)
    if transform is None:
        return image, BROKEN
    if mode != "CMYK" and _is_identity(profile, mode):
        return image, IS_SRGB
    return _apply(transform, image, mode), CONVERTED


def _fits(mode: str, given: str) -> bool:
    """Whether a profile for this mode describes the values of an image of the given mode. Grey is a case of RGB."""
    if mode == "RGB":
        return given not in (*INK_MODES, "LAB")
    return given in (GREY_MODES if mode == "L" else INK_MODES)


def _apply(transform: ImageCms.ImageCmsTransform, image: Image.Image, mode: str) -> Image.Image:
    """The image in RGB or RGBA; transparency is kept as it is."""
    opaque = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
    values = image.convert("RGBA").convert("RGB") if opaque is not None and mode == "RGB" else image
    converted = transform.apply(values.convert(mode))
    converted.info = {}
    if opaque is not None:
        converted.putalpha(opaque)
    return converted


@lru_cache(maxsize=16)
def _colour_space(profile: bytes) -> str:
    """`RGB`, `GRAY`, `CMYK`, ...; empty if the profile cannot be read."""
    try:
        return ImageCms.ImageCmsProfile(io.BytesIO(profile)).profile.xcolor_space.strip()
    except (OSError, ValueError, TypeError):  # littlecms has no errors of its own
        return ""


@lru_cache(maxsize=16)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """The conversion from the profile to sRGB by the perceptual intent; None if the profile lacks what it needs."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        target = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
        return ImageCms.ImageCmsTransform(source, target, mode, "RGB")
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None


@lru_cache(maxsize=16)
def _is_identity(profile: bytes, mode: str) -> bool:
    """Whether the conversion leaves a grid of colours as they are, up to rounding."""
    transform = _transform(profile, mode)
    assert transform is not None
    levels = np.arange(0, 256, 15, dtype=np.uint8)
    grid = (
        levels[None] if mode == "L" else np.stack(np.meshgrid(levels, levels, levels), -1).reshape(1, -1, 3)
    )
    seen = np.asarray(transform.apply(Image.fromarray(grid))).astype(np.int64)
    return bool(np.abs(seen - (grid[..., None] if mode == "L" else grid)).max() <= ROUNDING)
