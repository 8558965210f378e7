"""The names of a diffusers UNet's layers in the file formats of LoRAs: diffusers', peft's and kohya's."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from dmd2.errors import Refused

LORA = re.compile(r"(.+?)[._]lora[._](down|up|A|B)(?:\.\w+)?\.weight")
"""Names of the two factors of a layer in kohya's, diffusers' older and peft's format; peft's may contain the adapter's name."""
RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
EDGES = {
    "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
}  # fmt: skip
"""Layers of a UNet outside the blocks: diffusers' name -> the name in SGM's code, which kohya's format uses."""
SDXL_LAYER = "add_embedding.linear_1"
"""A layer that a UNet of SDXL has and one of SD has not."""


def layer_and_factor(key: str) -> tuple[str, str]:
    """The layer of a key of a LoRA, and which tensor of it: "down", "up" or "alpha"; "" if it is none of these."""
    if match := LORA.fullmatch(key):
        return _strip_lora_prefixes(match[1]), {"A": "down", "B": "up"}.get(match[2], match[2])
    return _strip_lora_prefixes(key.removesuffix(".alpha")), "alpha" if key.endswith(".alpha") else ""


def _strip_lora_prefixes(module: str) -> str:
    """The name of a layer without the prefixes and infixes of the formats."""
    module = module.removeprefix("base_model.model.").removeprefix("unet.")
    if ".processor." in module:  # how diffusers named them before it used peft
        module = module.replace(".processor.", ".")
        module += ".0" if module.endswith(".to_out") else ""
    return module


def weights_by_lora_name(base: Iterable[str]) -> dict[str, str]:
    """All names that a LoRA may use for the layers of a UNet -> the names of their weights.

    Kohya's names have `_` in place of `.`, which cannot be undone, so they are made from the names in `base`.
    """
    names: dict[str, str] = {}
    for module, sgm in sgm_names(base).items():
        weight = f"{module}.weight"
        for name in {module, *(f"lora_unet_{known.replace('.', '_')}" for known in (module, sgm))}:
            if names.setdefault(name, weight) != weight:
                raise Refused(f"{weight} and {names[name]} of the base are both {name} in a LoRA")
    return names


def to_kohya(update: Mapping[str, Tensor], base: Iterable[str]) -> dict[str, Tensor]:
    """A low-rank update as `export_low_rank_update` writes it -> the same in the format of kohya's trainer.

    The trainer names the layers of SDXL as SGM does, and those of SD as diffusers does; ComfyUI, A1111 and Forge read both.
    alpha is the rank: a factor of 1, because `update` has its own multiplied in.

    Args:
        base: Names of all weights of the UNet, in diffusers' naming.
    """
    names = sgm_names(base)
    sdxl = SDXL_LAYER in names
    found: dict[str, Tensor] = {}
    for key, tensor in update.items():
        layer, factor = layer_and_factor(key)
        name = f"lora_unet_{(names[layer] if sdxl else layer).replace('.', '_')}"
        found[f"{name}.lora_{factor}.weight"] = tensor
        if factor == "down":
            found[f"{name}.alpha"] = torch.tensor(float(len(tensor)))
    return found


def sgm_names(base: Iterable[str]) -> dict[str, str]:
    """Layers with a weight in a UNet of diffusers -> their names in the code of SGM and CompVis."""
    modules = [name.removesuffix(".weight") for name in base if name.endswith(".weight")]
    layers = 1 + max(
        [int(m[1]) for name in modules if (m := re.match(r"down_blocks\.0\.resnets\.(\d+)", name))] or [0]
    )
    attending = {match[1] for name in modules if (match := re.match(r"up_blocks\.(\d+)\.attentions", name))}
    return {module: _sgm_name(module, layers, attending) for module in modules}


def _sgm_name(module: str, layers: int, attending: set[str]) -> str:
    """SGM numbers the layers and the resampling of all blocks consecutively; each is a list (resnet, attention, upsampling)."""
    match = re.fullmatch(
        r"(down|mid|up)_blocks?(?:\.(\d+))?\.(resnets|attentions|\w+samplers)\.(\d+)\.(.+)", module
    )
    if match is None:
        return EDGES.get(module, module)
    where, block, kind, index, rest = match.groups()
    rest = RESNET.get(rest, rest) if kind == "resnets" else rest
    place = int(kind == "attentions")
    if where == "mid":
        return f"middle_block.{2 * int(index) + place}.{rest}"
    first = int(block) * (layers + 1)
    if kind == "downsamplers":
        return f"input_blocks.{1 + first + layers}.0.op"
    if kind == "upsamplers":
        return f"output_blocks.{first + layers}.{1 + (block in attending)}.{rest}"
    side, first = ("input", first + 1) if where == "down" else ("output", first)
    return f"{side}_blocks.{first + int(index)}.{place}.{rest}"
