"""The safety checker of Stable Diffusion 1.5: a CLIP that finds images of what it was made to withhold.

It lies in a package as in a pipeline of diffusers, in `safety_checker/` and `feature_extractor/`.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dmd2.encoders.pipeline_folder import CONFIG, TEXT_WEIGHTS, fetch_files, load_from_files, load_frozen
from dmd2.errors import Refused
from dmd2.io.json_file import read_json

CHECKER, EXTRACTOR = "safety_checker", "feature_extractor"
FILES = (f"{CHECKER}/{CONFIG}", f"{CHECKER}/{TEXT_WEIGHTS}", f"{EXTRACTOR}/preprocessor_config.json")
INDEX = "model_index.json"


class SafetyChecker:
    """The checker in a folder of a package, on a device."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
        from transformers import CLIPImageProcessor

        extractor = {Path(FILES[2]).name: folder / FILES[2]}
        self.prepare = load_from_files(CLIPImageProcessor, folder / EXTRACTOR, extractor)
        self.network = load_frozen(
            StableDiffusionSafetyChecker, folder / CHECKER, TEXT_WEIGHTS, device, torch.float32
        )
        self.device = device

    @torch.inference_mode()
    def withhold(self, images: Tensor) -> tuple[Tensor, int]:
        """(images, uint8 (N, C, H, W), with those that it finds replaced by black ones; their number)."""
        colour = list(images.expand(-1, 3, -1, -1))
        pixels = self.prepare(images=colour, return_tensors="pt").pixel_values.to(self.device)
        placeholders = [np.zeros(1) for _ in colour]
        _, found = self.network(clip_input=pixels, images=placeholders)
        shown = ~torch.tensor(found)
        return images * shown[:, None, None, None].to(images), int((~shown).sum())


def fetch_safety_checker(source: str) -> dict[str, Path]:
    """{name in a pipeline: local path} of the checker of a pipeline.

    Args:
        source: Folder of the pipeline, local or gs://, or name on the hub.

    Raises:
        Refused: It has none.
    """
    folder = fetch_files(source, list(FILES))
    if missing := [name for name in FILES if not (folder / name).is_file()]:
        raise Refused(
            f"{source} has no {missing[0]}; give a pipeline of Stable Diffusion 1.5 with its safety checker"
        )
    return {name: folder / name for name in FILES}


def add_safety_checker(source: str, package: Path) -> None:
    """Copy the checker of a pipeline into a package, whose own pipeline uses it where diffusers' class has one.

    Args:
        source: As of `fetch_safety_checker`.

    Raises:
        Refused: It has none, or one that cannot be loaded.
    """
    for name, path in fetch_safety_checker(source).items():
        (package / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(path, package / name)
    SafetyChecker(package, torch.device("cpu"))
    index: dict[str, Any] = read_json(package / INDEX) if (package / INDEX).is_file() else {}
    if CHECKER in index:
        index |= {
            CHECKER: ["stable_diffusion", "StableDiffusionSafetyChecker"],
            EXTRACTOR: ["transformers", "CLIPImageProcessor"],
            "requires_safety_checker": True,
        }
        (package / INDEX).write_text(json.dumps(index, indent=1) + "\n")
