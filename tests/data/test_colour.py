"""Colour profiles: what a picture looks like is what a network sees."""

from __future__ import annotations

import io
import struct
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from dmd2 import recipes, stages
from dmd2.data.colour import BROKEN, CONVERTED, IS_SRGB, OTHER_SPACE
from dmd2.data.decode import decode_image, prepare_image
from dmd2.data.loader import Shards
from tests.conftest import MICRO

COLOUR = (110, 180, 90)
ADOBE_RGB = ((0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457))
DISPLAY_P3 = ((0.51512, 0.24120, -0.00105), (0.29198, 0.69225, 0.04189), (0.15710, 0.06657, 0.78407))
"""Columns of the matrix from linear values to XYZ under D50, for red, green and blue."""
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def fixed(values: tuple[float, ...]) -> bytes:
    return b"".join(struct.pack(">i", round(value * 65536)) for value in values)


def inks() -> bytes:
    """A table of 2 values per ink: black gives L* = 0, the others a third less each."""
    ramp = bytes(range(256))
    corners = [tuple(corner >> bit & 1 for bit in (3, 2, 1, 0)) for corner in range(16)]
    colours = [(0 if k else 85 * (3 - c - m - y), 128, 128) for c, m, y, k in corners]
    matrix = fixed((1, 0, 0, 0, 1, 0, 0, 0, 1))
    return b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + matrix + ramp * 4 + bytes(sum(colours, ())) + ramp * 3


def profile(space: bytes, gamma: float, primaries: tuple[tuple[float, ...], ...] = ()) -> bytes:
    """A profile of version 2: of three primaries and a gamma, or of grey and a gamma."""
    white = b"XYZ \0\0\0\0" + fixed((0.9642, 1, 0.8249))
    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, int(gamma * 256)) + b"\0\0"
    tags = {b"desc": b"desc\0\0\0\0" + struct.pack(">I", 2) + b"a\0" + bytes(82), b"wtpt": white}
    for letter, primary in zip(b"rgb", primaries, strict=False):
        tags |= {bytes([letter]) + b"XYZ": b"XYZ \0\0\0\0" + fixed(primary), bytes([letter]) + b"TRC": curve}
    tags |= {} if primaries else {b"A2B0": inks()} if space == b"CMYK" else {b"kTRC": curve}
    table, body, start = b"", b"", 132 + 12 * len(tags)
    for name, data in tags.items():
        table += name + struct.pack(">II", start + len(body), len(data))
        body += data
    head = struct.pack(">I", start + len(body)) + b"lcms" + struct.pack(">I", 0x02100000)
    head += (
        (b"prtrCMYKLab " if space == b"CMYK" else b"mntr" + space + b"XYZ ")
        + bytes(12)
        + b"acsp"
        + bytes(28)
        + fixed((0.9642, 1, 0.8249))
        + bytes(48)
    )
    return head + struct.pack(">I", len(tags)) + table + body


def stored(image: Image.Image, icc: bytes, kind: str = "PNG", **settings: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format=kind, icc_profile=icc, **settings)
    return stream.getvalue()


def prepared(file: bytes, channels: int = 3) -> tuple[np.ndarray, Counter[str]]:
    """(the pixels, what was done with the profile)"""
    done = Counter[str]()
    image = decode_image(file)
    return np.asarray(prepare_image(image, image.width, channels, profiles=done)), done


def decoded_by_gamma(primaries: tuple[tuple[float, ...], ...], gamma: float) -> np.ndarray:
    """`COLOUR` in sRGB, computed by the definitions: linear light, matrices, the curve of sRGB."""
    srgb = np.array(
        [
            [0.4360747, 0.3850649, 0.1430804],
            [0.2225045, 0.7168786, 0.0606169],
            [0.0139322, 0.0971045, 0.7141733],
        ]
    )
    linear = np.linalg.solve(srgb, np.array(primaries).T @ (np.array(COLOUR) / 255) ** gamma).clip(0, 1)
    curve = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return np.asarray(curve * 255)


@pytest.mark.parametrize(("primaries", "gamma"), [(ADOBE_RGB, 563 / 256), (DISPLAY_P3, 2.2)])
def test_a_wide_colour_space_becomes_srgb(primaries: tuple[tuple[float, ...], ...], gamma: float) -> None:
    icc, image = profile(b"RGB ", gamma, primaries), Image.new("RGB", (16, 16), COLOUR)
    for file in (
        stored(image, icc),
        stored(image, icc, "JPEG", quality=100, subsampling=0),
        stored(image, icc, "TIFF"),
    ):
        pixels, done = prepared(file)
        np.testing.assert_allclose(pixels[0, 0], decoded_by_gamma(primaries, gamma), atol=2)
        assert done == {CONVERTED: 1}


def test_a_palette_and_transparency_keep_their_meaning() -> None:
    icc, expected = profile(b"RGB ", 563 / 256, ADOBE_RGB), decoded_by_gamma(ADOBE_RGB, 563 / 256)
    clear = Image.new("RGBA", (16, 16), (255, 0, 0, 0))
    clear.paste((*COLOUR, 255), (0, 0, 8, 16))
    palette = Image.new("P", (16, 16), 0)
    palette.putpalette([*COLOUR, 255, 0, 0])
    palette.paste(1, (8, 0, 16, 16))
    for file in (stored(clear, icc), stored(palette, icc, transparency=1)):
        pixels, _ = prepared(file)
        np.testing.assert_allclose(pixels[0, 0], expected, atol=2)
        assert (pixels[:, 8:] == 255).all()


def test_a_grey_profile_is_followed_in_grey_and_in_rgb() -> None:
    for image in (Image.new("L", (8, 8), 128), Image.fromarray(np.full((8, 8), 128 * 257, np.uint16))):
        for channels in (1, 3):
            pixels, done = prepared(stored(image, profile(b"GRAY", 1.0)), channels)
            assert abs(int(pixels.flat[0]) - 188) <= 2  # half of the light is 188 in sRGB
            assert done == {CONVERTED: 1}


def test_inks_are_mixed_by_their_profile() -> None:
    image = Image.new("CMYK", (16, 16), (0, 0, 0, 128))  # L* = 50 is 118 in sRGB; 127 by the rule of thumb
    for file in (
        stored(image, profile(b"CMYK", 0), "JPEG", quality=100),
        stored(image, profile(b"CMYK", 0), "TIFF"),
    ):
        pixels, done = prepared(file)
        np.testing.assert_allclose(pixels[0, 0], (118, 118, 118), atol=2)
        assert done == {CONVERTED: 1}


def test_a_grey_picture_with_a_profile_of_rgb_is_grey_in_it() -> None:
    pixels, done = prepared(stored(Image.new("L", (8, 8), 128), profile(b"RGB ", 1.0, ADOBE_RGB)))
    np.testing.assert_allclose(pixels[0, 0], (188, 188, 188), atol=3)
    assert done == {CONVERTED: 1}


def test_srgb_by_any_name_keeps_its_values() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    seen, done = prepared(stored(Image.fromarray(pixels), SRGB))
    assert (seen == pixels).all()
    assert done == {IS_SRGB: 1}
    seen, done = prepared(stored(Image.fromarray(pixels), b""))
    assert (seen == pixels).all()
    assert not done


def test_a_photograph_on_its_side_is_turned_and_converted() -> None:
    wide = Image.new("RGB", (16, 16), "black")
    wide.paste("white", (0, 0, 16, 8))
    exif = Image.Exif()
    exif[0x0112] = 6
    for kind in ("JPEG", "TIFF", "PNG"):
        pixels, _ = prepared(stored(wide, profile(b"RGB ", 1.0, ADOBE_RGB), kind, exif=exif), 1)
        assert pixels[:, :7].max() < 10
        assert pixels[:, 9:].min() > 245


@pytest.mark.parametrize(
    ("icc", "reason"),
    [
        (b"no profile at all", BROKEN),
        (profile(b"RGB ", 2.2, ADOBE_RGB)[:200], BROKEN),
        (profile(b"RGB ", 2.2), BROKEN),
        (profile(b"CMYK", 2.2), OTHER_SPACE),
        (profile(b"GRAY", 2.2), OTHER_SPACE),
    ],
    ids=["noise", "cut", "without primaries", "of inks", "of grey"],
)
def test_a_profile_that_cannot_be_used_is_left_out_and_counted(icc: bytes, reason: str) -> None:
    pixels, done = prepared(stored(Image.new("RGB", (8, 8), COLOUR), icc))
    assert (pixels == COLOUR).all()
    assert done == {reason: 1}


def test_damaged_profiles_never_raise() -> None:
    whole, rng = profile(b"RGB ", 563 / 256, ADOBE_RGB), np.random.default_rng(0)
    for _ in range(300):
        icc = bytearray(whole)
        for place in rng.integers(0, len(icc), 4):
            icc[place] = rng.integers(0, 256)
        _, done = prepared(stored(Image.new("RGB", (8, 8), COLOUR), bytes(icc)))
        assert done.keys() <= {CONVERTED, IS_SRGB, BROKEN, OTHER_SPACE}


def test_the_manifest_counts_what_was_done_with_profiles(tmp_path: Path) -> None:
    for index in range(6):
        icc = [b"", SRGB, profile(b"RGB ", 2.2, ADOBE_RGB), b"broken"][index % 4]
        path = tmp_path / "source" / "a" / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(stored(Image.new("RGB", (8, 8), COLOUR), icc))
    config = recipes.resolve("edm-digits", (*MICRO, "family.network.image_channels=3", "data.holdout=0"))
    made = stages.shard(config, str(tmp_path / "source"), str(tmp_path / "shards"), workers=1)
    remarks = {what: tally["count"] for what, tally in made.facts["account"]["remarks"].items()}
    wanted = {CONVERTED: 1, IS_SRGB: 2, BROKEN: 1}
    assert {what: remarks.get(f"images whose colour profile {what}") for what in wanted} == wanted
    assert len(Shards(tmp_path / "shards", "train")) == 6
