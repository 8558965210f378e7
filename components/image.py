"""The container images of the components, by digest if `images/images.lock` has it."""

from __future__ import annotations

import os


def image(name: str = "dmd2") -> str:
    """The reference in `DMD2_IMAGE` or `DMD2_LAUNCH_IMAGE` at compile time, or else the entry of images.lock.

    The local runner ignores it.
    """
    if given := os.environ.get(f"{name.upper().replace('-', '_')}_IMAGE"):
        return given
    from images.pins import reference  # the module is not in the image, where nothing is compiled

    return reference(name)


IMAGE = image()
