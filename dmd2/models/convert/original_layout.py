"""A pipeline folder of SD1.5 or SDXL as one file, in the layout in which these models were published: of CompVis and SGM.

ComfyUI, A1111 and Forge load such files. `dmd2.models.convert.single_file` reads them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from dmd2.encoders.pipeline_folder import TEXT_WEIGHTS, VAE_WEIGHTS
from dmd2.encoders.weight_files import load_weights
from dmd2.errors import Refused
from dmd2.io.tensors import num_not_finite, save_tensors
from dmd2.models.convert.lora_names import sgm_names
from dmd2.models.convert.single_file import V_MARKER, ZTSNR_MARKER
from dmd2.models.convert.student_weights import ORIGINAL_PREFIX

Weights = dict[str, Tensor]
VAE_PARTS = {
    "conv_norm_out": "norm_out", "conv_shortcut": "nin_shortcut", "resnets": "block", "downsamplers.0": "downsample",
    "upsamplers.0": "upsample", "mid_block.block.0": "mid.block_1", "mid_block.block.1": "mid.block_2", "down_blocks": "down",
}  # fmt: skip
"""Parts of diffusers' names of a VAE -> those of CompVis, applied one after the other."""
VAE_ATTENTION = {
    "group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out",
    "query": "q", "key": "k", "value": "v", "proj_attn": "proj_out",
}  # fmt: skip
"""Layers of its attention, in diffusers' names of today and of 2022."""
OPEN_CLIP = {
    "text_model.encoder.layers": "transformer.resblocks", "self_attn.out_proj": "attn.out_proj",
    "text_model.final_layer_norm": "ln_final", "layer_norm": "ln_", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
    "text_model.embeddings.token_embedding": "token_embedding",
    "text_model.embeddings.position_embedding.weight": "positional_embedding", "text_projection.weight": "text_projection",
}  # fmt: skip
"""Parts of the names of a text encoder of transformers -> those of OpenCLIP."""


def license_metadata(license: str) -> dict[str, str]:
    """The licence of weights as the metadata of a file names it, by Stability AI's specification; nothing if it is not known."""
    return {"modelspec.license": license} if license else {}


def write_checkpoint(
    folder: Path, path: Path, dtype: torch.dtype, process: Mapping[str, object], license: str = ""
) -> None:
    """Write all networks of a pipeline folder to one file.

    Args:
        dtype: The precision of the weights.
        process: `prediction_type` and `rescale_betas_zero_snr` of its scheduler; the file says them in its metadata, and by
            the marker tensors that ComfyUI and Forge look for.
        license: Licence of the weights, for the metadata; empty = not known.
    """
    named = original_names(_networks(folder))
    tensors = {name: _in_precision(name, tensor, dtype) for name, tensor in named.items()}
    if process["prediction_type"] == "v_prediction":
        tensors[V_MARKER] = torch.zeros(0)
    if process["rescale_betas_zero_snr"]:
        tensors[ZTSNR_MARKER] = torch.zeros(0)
    predicts = str(process["prediction_type"]).removesuffix("_prediction")
    metadata = {"format": "pt", "modelspec.prediction_type": predicts} | license_metadata(license)
    save_tensors(tensors, path, metadata)


def why_no_checkpoint(text_encoder: Mapping[str, object], vae: Mapping[str, object], encoders: int) -> str:
    """Why a pipeline has no such file, by the configs of its first text encoder and its VAE; empty if it has."""
    if vae.get("_class_name") != "AutoencoderKL":
        return f"its VAE is a {vae.get('_class_name')}, and the layout has an AutoencoderKL"
    if encoders == 1 and text_encoder.get("hidden_size") == SD2_WIDTH:
        return "it is of the form of Stable Diffusion 2, whose layout is not supported"
    return ""


SD2_WIDTH = 1024
"""Width of the text encoder of Stable Diffusion 2, an OpenCLIP."""


def original_names(networks: Mapping[str, Weights]) -> Weights:
    """The weights of the networks of a pipeline, by their folders, in the names of one file."""
    texts = SDXL_TEXTS if "text_encoder_2" in networks else SD_TEXTS
    tensors: Weights = {}
    for folder, (prefix, rename) in (LATENT_NETWORKS | texts).items():
        tensors |= {prefix + name: tensor for name, tensor in rename(networks[folder]).items()}
    return tensors


def _networks(folder: Path) -> dict[str, Weights]:
    """Folder of a network in a pipeline -> its weights."""
    names = {
        "unet": VAE_WEIGHTS,
        "vae": VAE_WEIGHTS,
        "text_encoder": TEXT_WEIGHTS,
        "text_encoder_2": TEXT_WEIGHTS,
    }
    return {
        part: load_weights(folder / part, name) for part, name in names.items() if (folder / part).is_dir()
    }


def _unet(weights: Weights) -> Weights:
    layers = sgm_names(weights)
    split = {name: name.rpartition(".") for name in weights}
    return {f"{layers[layer]}.{part}": weights[name] for name, (layer, _, part) in split.items()}


def _vae(weights: Weights) -> Weights:
    levels = len({match[1] for name in weights if (match := re.match(r"decoder\.up_blocks\.(\d+)", name))})
    named = {_vae_name(name, levels): tensor for name, tensor in weights.items()}
    # The attention is made of 1x1 convolutions there.
    return {n: t[:, :, None, None] if ".attn_1." in n and t.ndim == 2 else t for n, t in named.items()}


def _vae_name(name: str, levels: int) -> str:
    if match := re.fullmatch(r"(\w+)\.mid_block\.attentions\.0\.(.+)\.(weight|bias)", name):
        return f"{match[1]}.mid.attn_1.{VAE_ATTENTION[match[2]]}.{match[3]}"
    # Upsampling is numbered from the finest resolution there, from the coarsest here.
    name = re.sub(r"up_blocks\.(\d+)", lambda found: f"up.{levels - 1 - int(found[1])}", name)
    return _replace_parts(name, VAE_PARTS)


def _clip(weights: Weights) -> Weights:
    """transformers' own names; version 5 leaves out the first part of them."""
    return {f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in weights.items()}


def _open_clip(weights: Weights) -> Weights:
    """Query, key and value are one matrix there, and the projection is transposed."""
    found: Weights = {}
    for name, tensor in weights.items():
        layer, is_query, rest = name.partition("self_attn.q_proj.")
        if is_query:
            parts = [weights[f"{layer}self_attn.{which}_proj.{rest}"] for which in "qkv"]
            found[f"{_replace_parts(layer, OPEN_CLIP)}attn.in_proj_{rest}"] = torch.cat(parts)
        elif not re.search(r"self_attn\.[kv]_proj\.|position_ids$", name):
            found[_replace_parts(name, OPEN_CLIP)] = tensor.T if name == "text_projection.weight" else tensor
    return found


LATENT_NETWORKS: dict[str, tuple[str, Callable[[Weights], Weights]]] = {
    "unet": (ORIGINAL_PREFIX, _unet),
    "vae": ("first_stage_model.", _vae),
}
SD_TEXTS: dict[str, tuple[str, Callable[[Weights], Weights]]] = {
    "text_encoder": ("cond_stage_model.transformer.", _clip)
}
SDXL_TEXTS = {
    "text_encoder": ("conditioner.embedders.0.transformer.", _clip),
    "text_encoder_2": ("conditioner.embedders.1.model.", _open_clip),
}
"""Folder of a network -> its prefix in the file, and the function that renames its weights."""


def _replace_parts(name: str, parts: Mapping[str, str]) -> str:
    for here, there in parts.items():
        name = name.replace(here, there)
    return name


def _in_precision(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    if num_not_finite(made := tensor.to(dtype)):
        raise Refused(f"{name} has values that {dtype} cannot hold; choose --single-file bfloat16")
    return made
