"""The forms of a student of Stable Diffusion 1.5 or XL for other programs than diffusers, and how the model card describes them."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from dmd2.diffusion import Diffusion
from dmd2.encoders.pipeline_folder import read_config
from dmd2.io.tensors import load_tensors, save_tensors
from dmd2.models.convert.lora_names import to_kohya
from dmd2.models.convert.original_layout import license_metadata, why_no_checkpoint, write_checkpoint
from dmd2.sampler import Timesteps

logger = logging.getLogger(__name__)
LORA, KOHYA_LORA = "lora/pytorch_lora_weights.safetensors", "lora/kohya.safetensors"
CHECKPOINT, WORKFLOW = "checkpoint/student.safetensors", "checkpoint/comfyui_workflow.json"
"""Files in a package."""


def write_workflow(folder: Path, sides: int, steps: int) -> dict[str, str]:
    """Write a workflow of ComfyUI that samples the single file of a package, at `sides` x `sides` pixels -> file: how to use it."""
    (folder / WORKFLOW).write_text(json.dumps(workflow(sides, steps), indent=1) + "\n")
    return {
        WORKFLOW: f"ComfyUI: a workflow that samples `{Path(CHECKPOINT).name}` in {steps} steps; open it there"
    }


def workflow(sides: int, steps: int) -> dict[str, dict[str, object]]:
    """The nodes of ComfyUI by number, as its API takes them; `[number, output]` is an input from another node."""
    size: dict[str, object] = {"width": sides, "height": sides, "batch_size": 1}
    links = {"model": ["1", 0], "positive": ["2", 0], "negative": ["3", 0], "latent_image": ["4", 0]}
    sampler = {
        "sampler_name": "lcm",
        "scheduler": "sgm_uniform",
        "steps": steps,
        "cfg": 1.0,
        "denoise": 1.0,
        "seed": 0,
    }
    nodes: tuple[tuple[str, dict[str, object]], ...] = (
        ("CheckpointLoaderSimple", {"ckpt_name": Path(CHECKPOINT).name}),
        ("CLIPTextEncode", {"text": "a red apple on a table", "clip": ["1", 1]}),
        ("CLIPTextEncode", {"text": "", "clip": ["1", 1]}),
        ("EmptyLatentImage", size),
        ("KSampler", links | sampler),
        ("VAEDecode", {"samples": ["5", 0], "vae": ["1", 2]}),
        ("SaveImage", {"images": ["6", 0], "filename_prefix": "student"}),
    )
    return {str(n): {"class_type": kind, "inputs": inputs} for n, (kind, inputs) in enumerate(nodes, 1)}


def write_low_rank(folder: Path, unet: Iterable[str], programs: str, license: str = "") -> dict[str, str]:
    """Write the low-rank update of a package, if there is one, in kohya's format too -> file: how to use it.

    Args:
        unet: Names of all weights of the U-Net.
        programs: What ComfyUI and the like must be told to sample it; empty if they cannot.
        license: Licence of the weights, for the metadata of kohya's file; empty = not known.
    """
    if not (folder / LORA).is_file():
        return {}
    tensors = to_kohya(load_tensors(folder / LORA), unet)
    save_tensors(tensors, folder / KOHYA_LORA, {"format": "pt"} | license_metadata(license))
    diffusers = 'diffusers, with the teacher: `pipe.load_lora_weights("path/of/this/folder/{}")`, and the scheduler of this folder'
    kohya = f"ComfyUI, A1111 and Forge, with the teacher's checkpoint: a LoRA of strength 1, {programs}"
    return {LORA: diffusers.format(LORA), KOHYA_LORA: kohya if programs else diffusers.format(KOHYA_LORA)}


def write_single_file(
    folder: Path, pipeline: str, process: Mapping[str, object], dtype: str, programs: str, license: str = ""
) -> dict[str, str]:
    """Write all networks of a package to one file, if the original layout has them -> file: how to use it.

    Args:
        pipeline: Class of the pipeline in diffusers.
        process: As of `write_checkpoint`.
        programs: As of `write_low_rank`.
        license: As of `write_checkpoint`.
    """
    two = (folder / "text_encoder_2").is_dir()
    if reason := why_no_checkpoint(
        read_config(folder / "text_encoder"), read_config(folder / "vae"), 1 + two
    ):
        logger.warning("no single file of the student is written: %s", reason)
        return {}
    (folder / CHECKPOINT).parent.mkdir(exist_ok=True)
    write_checkpoint(folder, folder / CHECKPOINT, getattr(torch, dtype), process, license)
    diffusers = f'diffusers: `{pipeline}.from_single_file("path/of/this/folder/{CHECKPOINT}", config="path/of/this/folder")`'
    return {CHECKPOINT: f"ComfyUI, A1111 and Forge: {programs}; {diffusers}" if programs else diffusers}


def is_uniform(diffusion: Diffusion, timesteps: Timesteps) -> bool:
    """Whether the timesteps are those of ComfyUI's scheduler `sgm_uniform`, to within one."""
    uniform = torch.linspace(len(diffusion) - 1, 0, len(timesteps) + 1)[:-1]
    return bool(((torch.tensor(timesteps) - uniform).abs() <= 1).all())


def sampler_settings(diffusion: Diffusion, timesteps: Timesteps) -> str:
    """What samplers after Karras et al. must be told; empty if they cannot sample the student.

    They count noise as sigma / alpha, and start from noise that is scaled for it: not from unit noise, as a student does, unless
    the first timestep is the last of the process.
    """
    if timesteps[0] != len(diffusion) - 1:
        return ""
    ratio = (diffusion.schedule.sigma / diffusion.schedule.alpha)[list(timesteps)].tolist()
    sigmas = [f"{value:.4f}" if value < math.inf else "the largest" for value in ratio]
    return f"sampler LCM, CFG 1, sigmas {', '.join([*sigmas, '0'])}"
