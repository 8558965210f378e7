"""The forms of a student of Stable Diffusion 1.5 or XL for other programs than diffusers, and how the model card describes them."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from dmd2.encoders.pipeline_folder import read_config
from dmd2.io.tensors import load_tensors, save_tensors
from dmd2.models.convert.lora_names import to_kohya
from dmd2.models.convert.original_layout import why_no_checkpoint, write_checkpoint

logger = logging.getLogger(__name__)
LORA, KOHYA_LORA = "lora/pytorch_lora_weights.safetensors", "lora/kohya.safetensors"
CHECKPOINT = "checkpoint/student.safetensors"
"""Files in a package."""


def write_low_rank(folder: Path, unet: Iterable[str], programs: str) -> dict[str, str]:
    """Write the low-rank update of a package, if there is one, in kohya's format too -> file: how to use it.

    Args:
        unet: Names of all weights of the U-Net.
        programs: What ComfyUI and the like must be told to sample it; empty if they cannot.
    """
    if not (folder / LORA).is_file():
        return {}
    save_tensors(to_kohya(load_tensors(folder / LORA), unet), folder / KOHYA_LORA, {"format": "pt"})
    diffusers = 'diffusers, with the teacher: `pipe.load_lora_weights("path/of/this/folder/{}")`, and the scheduler of this folder'
    kohya = f"ComfyUI, A1111 and Forge, with the teacher's checkpoint: a LoRA of strength 1, {programs}"
    return {LORA: diffusers.format(LORA), KOHYA_LORA: kohya if programs else diffusers.format(KOHYA_LORA)}


def write_single_file(
    folder: Path, pipeline: str, process: Mapping[str, object], dtype: str, programs: str
) -> dict[str, str]:
    """Write all networks of a package to one file, if the original layout has them -> file: how to use it.

    Args:
        pipeline: Class of the pipeline in diffusers.
        process: As of `write_checkpoint`.
        programs: As of `write_low_rank`.
    """
    two = (folder / "text_encoder_2").is_dir()
    if reason := why_no_checkpoint(
        read_config(folder / "text_encoder"), read_config(folder / "vae"), 1 + two
    ):
        logger.warning("no single file of the student is written: %s", reason)
        return {}
    (folder / CHECKPOINT).parent.mkdir(exist_ok=True)
    write_checkpoint(folder, folder / CHECKPOINT, getattr(torch, dtype), process)
    diffusers = f'diffusers: `{pipeline}.from_single_file("path/of/this/folder/{CHECKPOINT}", config="path/of/this/folder")`'
    return {CHECKPOINT: f"ComfyUI, A1111 and Forge: {programs}; {diffusers}" if programs else diffusers}
