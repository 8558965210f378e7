"""The U-Net of diffusers as a network of this library, and which of its configs are supported."""

from __future__ import annotations

import reprlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, cast

from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from dmd2.batch import Conditioning
from dmd2.errors import Refused

LAYER_COUNTS = (
    "layers_per_block", "transformer_layers_per_block", "reverse_transformer_layers_per_block", "down_block_types", "up_block_types",
)  # fmt: skip
MAX_LAYERS, MAX_BLOCKS = 64, 16
"""Limits of what a teacher's config may ask for; SDXL has 10 layers in a block, and 3 blocks."""
SHORT_TRANSFORMER = 2
"""A transformer of at most so many layers is one unit of sharding; in a longer one, each layer is a unit."""


class Unet(nn.Module):
    """Implements `Network`: (x (B, 4, h, w), time (B,), cond) -> out (B, 4, h, w), or the output of the mid block (B, C, s, s)."""

    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, x: Tensor, time: Tensor, cond: Conditioning, features_only: bool = False) -> Tensor:
        dtype = self.unet.conv_in.weight.dtype
        inputs: dict[str, Any] = {
            "sample": x.to(dtype),
            "timestep": time,  # stays in float32: 999 has no bfloat16
            "encoder_hidden_states": cond["text"].to(dtype),
            "return_dict": False,
        }
        if "pooled" in cond:
            inputs["added_cond_kwargs"] = {"text_embeds": cond["pooled"].to(dtype), "time_ids": cond["size"]}
        if features_only:
            return _run_until(self.decoder_start, lambda: self.unet(**inputs))
        out: Tensor = self.unet(**inputs)[0]
        return out

    @property
    def decoder_start(self) -> nn.Module:
        """The first up block; its input is the output of the mid block."""
        return cast(nn.Module, self.unet.up_blocks[0])

    def blocks(self) -> list[nn.Module]:
        """The units of sharding; see `ModelFamily.blocks`."""
        inner, outer = [], []
        for module in self.unet.modules():
            if isinstance(module, ResnetBlock2D | Downsample2D | Upsample2D | Transformer2DModel):
                outer.append(module)
            if isinstance(module, Transformer2DModel) and len(module.transformer_blocks) > SHORT_TRANSFORMER:
                inner += [b for b in module.transformer_blocks if isinstance(b, BasicTransformerBlock)]
        return [*inner, *outer, self.unet.conv_norm_out, self.unet.conv_out]


class _BlockReached(Exception):
    def __init__(self, value: Tensor) -> None:
        self.value = value


def _run_until(block: nn.Module, forward: Any) -> Tensor:
    """The input of a block, by a forward pass that stops there."""

    def stop(module: nn.Module, args: tuple[Any, ...], inputs: dict[str, Any]) -> NoReturn:
        raise _BlockReached(inputs["hidden_states"])

    # Before all other hooks of the block: one of them would gather its weights.
    hook = block.register_forward_pre_hook(stop, with_kwargs=True, prepend=True)
    try:
        forward()
    except _BlockReached as reached:
        return reached.value
    finally:
        hook.remove()
    raise AssertionError("the block was not reached")


@contextmanager
def float32_outputs(unet: nn.Module) -> Iterator[None]:
    """Inside the block, outputs of the U-Net are float32 also under autocast: guidance multiplies the error of rounding, and
    schedulers keep the latents in the type of the output."""

    def convert(module: nn.Module, args: Any, out: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(one.float() for one in out)

    hook = unet.register_forward_hook(convert)
    try:
        yield
    finally:
        hook.remove()


def check_unet(unet: Mapping[str, Any], folder: Path, kind: str, embedding: str | None) -> None:
    """Raise Refused for a U-Net with inputs that are not supported.

    Args:
        folder: The pipeline of the U-Net, for errors.
        kind: The family that it must be of.
        embedding: `addition_embed_type` that it must have.
    """
    name_in_errors = f"the U-Net in {folder}"
    if unet.get("_class_name") != "UNet2DConditionModel":
        raise Refused(f"{name_in_errors} is a {unet.get('_class_name')}; only UNet2DConditionModel is known")
    for setting in LAYER_COUNTS:
        if not _is_few(unet.get(setting)):
            raise Refused(
                f"{name_in_errors} has {setting} = {reprlib.repr(unet[setting])}; at most {MAX_LAYERS} layers per block and "
                f"{MAX_BLOCKS} blocks are built, so that a config cannot take all memory"
            )
    channels = unet.get("in_channels"), unet.get("out_channels")
    if channels != (4, 4):
        raise Refused(
            f"{name_in_errors} takes {channels[0]} channels and makes {channels[1]}; only 4 and 4 are known: inpainting, "
            "depth and upscaling models need inputs that a student is not given"
        )
    if (found := unet.get("addition_embed_type")) != embedding:
        raise Refused(
            f"{name_in_errors} has addition_embed_type {found!r}, a {kind} network has {embedding!r}; use a recipe of its kind"
        )
    for name in ("class_embed_type", "num_class_embeds", "time_cond_proj_dim", "encoder_hid_dim_type"):
        if unet.get(name) is not None:
            raise Refused(
                f"{name_in_errors} has {name} {unet[name]!r}, an input that is not supported; use a base model"
            )


def _is_few(value: Any) -> bool:
    """Whether a number of layers, or a list of such numbers, is one that a U-Net has."""
    if isinstance(value, list):
        return len(value) <= MAX_BLOCKS and all(map(_is_few, value))
    return not isinstance(value, int) or value <= MAX_LAYERS
