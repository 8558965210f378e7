"""The images that components run in: by digest, once `images/images.lock` knows it."""

from __future__ import annotations

import os


def image(name: str = "dmd2") -> str:
    """What `DMD2_IMAGE`, or `DMD2_LAUNCH_IMAGE`, says while compiling; or the entry of images.lock.

    The local runner ignores it.
    """
    if given := os.environ.get(f"{name.upper().replace('-', '_')}_IMAGE"):
        return given
    from images.pins import reference  # not in the image itself, where nothing is compiled

    return reference(name)


IMAGE = image()
