"""The image that components run in."""

from __future__ import annotations

import os

IMAGE = os.environ.get("DMD2_IMAGE", "dmd2:0.1.0")
"""Set DMD2_IMAGE to the digest of a pushed image when compiling for a cluster; the local runner ignores it."""
