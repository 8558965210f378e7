"""Published students of SD and SDXL: whole U-Nets, LoRAs that are merged into a base, and training folders of the DMD2
reference code. Anything that does not fit is refused by name."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from dmd2.config import LoraConfig
from dmd2.encoders.pipeline_folder import TEXT_WEIGHTS, VAE_WEIGHTS
from dmd2.encoders.weight_files import has_weights, load_weights
from dmd2.errors import Refused
from dmd2.io.tensors import check_finite
from dmd2.models.convert.lora_names import LORA, layer_and_factor, sgm_names, weights_by_lora_name
from dmd2.models.convert.single_file import V_MARKER, ZTSNR_MARKER
from dmd2.models.convert.tensor_files import (
    TensorFile,
    name_file_in_errors,
    read_tensor_file,
    refuse_broken_file,
)

STUDENT = ("pytorch_model.bin", "model.safetensors")
"""The student's file in a training folder, as accelerate saves its first model."""
GUIDANCE = ("pytorch_model_1.bin", "model_1.safetensors")
"""The file of critic, teacher and discriminator head in a training folder, which accelerate saves as its second model."""
CRITIC = "fake_unet."
"""Prefix of the critic's names in that file."""
BASE_LAYER = ".base_layer."
"""Part of the names of weights that peft has a LoRA beside."""
LORA_FILES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
"""The file of a LoRA in a folder that diffusers or peft saves."""
WRAPPER_PREFIXES = ("module.", "feedforward_model.")
"""Prefixes that wrappers of the training code leave on the names of a student's weights."""
ORIGINAL_PREFIX = "model.diffusion_model."
"""Prefix of the U-Net's names in files of CompVis and SGM."""
WHOLE_MODEL = ("first_stage_model.", "cond_stage_model.", "conditioner.")
"""Prefixes of the names of the VAE and the text encoders in such a file."""
UNET = ("conv_in.weight", "conv_out.weight", "time_embedding.linear_1.weight")
"""Weights that every UNet of SD and SDXL has in diffusers' naming."""
UNSUPPORTED_LORA = (
    "use_dora", "use_rslora", "use_qalora", "alpha_pattern", "fan_in_fan_out", "lora_bias", "layer_replication",
    "modules_to_save", "trainable_token_indices", "target_parameters",
)  # fmt: skip
"""Settings of peft that are not supported if they are set."""
KNOWN_LORA: dict[str, tuple[object, ...]] = {
    "peft_type": ("LORA", None),
    "bias": ("none", None),
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
}
"""Settings of peft -> their supported values. PiSSA, OLoRA, LoftQ and CorDA take something away from the base at the start."""


def read_unet(
    path: Path, base: Mapping[str, Tensor] | None = None, lora: LoraConfig | None = None
) -> dict[str, Tensor]:
    """Read the state dict of a diffusers UNet of SD or SDXL, in the precision of the file.

    Args:
        path: All weights (.safetensors; .bin, .pt or .pth, of which only tensors are read), a LoRA in kohya's or
            diffusers' naming, a folder of diffusers (a U-Net, a pipeline or a LoRA) or peft, or a training folder of the DMD2 reference
            code, whose student is read.
        base: The UNet into which a LoRA is merged. Whole weights must have its names and shapes, if it is given.
        lora: Rank and alpha of a LoRA that a training folder holds beside its weights.
    """
    path = next((path / name for name in LORA_FILES if (path / name).is_file()), path)
    with name_file_in_errors(path):
        file = _read_folder(path) if path.is_dir() else read_tensor_file(path)
        check_finite(file.tensors, "it")
        if any(BASE_LAYER in name for name in file.tensors):
            return _merge_trained_lora(strip_wrapper_prefixes(file.tensors), base, path, lora)
        if any(LORA.fullmatch(name) for name in file.tensors):
            with refuse_broken_file("LoRA"):
                return _merge_lora(file, base, path)
        return _check_unet(_from_original_names(strip_wrapper_prefixes(file.tensors), base), base)


def read_critic(path: Path, base: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """The state dict of the critic in a training folder of the DMD2 reference code; see `critic_tensors`."""
    with name_file_in_errors(path):
        tensors = critic_tensors(path)
        return None if tensors is None else _check_unet(tensors, base)


def critic_tensors(path: Path) -> dict[str, Tensor] | None:
    """The critic's tensors in a training folder, without teacher and discriminator head; None if there is no such file."""
    if not any((path / name).is_file() for name in GUIDANCE):
        return None
    file = read_tensor_file(find_model_file(path, GUIDANCE))
    tensors = strip_wrapper_prefixes(file.tensors)
    found = {name.removeprefix(CRITIC): t for name, t in tensors.items() if name.startswith(CRITIC)}
    if not found:
        raise Refused(f"its second model holds no critic ({CRITIC}...); give the student's file alone")
    check_finite(found, "its critic")
    return found


def _read_folder(path: Path) -> TensorFile:
    """The U-Net in a folder of diffusers, or the student in a training folder."""
    if all(not (path / name).is_file() for name in STUDENT):
        for folder in (path, path / "unet"):
            for name in (VAE_WEIGHTS, TEXT_WEIGHTS):
                if has_weights(folder, name):
                    return TensorFile(load_weights(folder, name), {})
    return read_tensor_file(find_model_file(path, STUDENT))


def find_model_file(folder: Path, names: Iterable[str]) -> Path:
    """The first of these files that is in a training folder."""
    found = next((folder / name for name in names if (folder / name).is_file()), None)
    if found is None:
        raise Refused(
            f"it is a folder without {' or '.join(names)}; give a training folder, or a file of weights"
        )
    return found


def strip_wrapper_prefixes(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors without those of `WRAPPER_PREFIXES` that all names begin with."""
    for prefix in WRAPPER_PREFIXES * 2:  # in any order
        if all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return tensors


def _from_original_names(tensors: dict[str, Tensor], base: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """Give diffusers' names to a U-Net in the naming of CompVis and SGM, alone or in the file of a whole model.

    Other tensors are returned as they are. `base`, in diffusers' naming, has all layers.
    """
    whole = any(name.startswith(WHOLE_MODEL) for name in tensors)
    if whole and (marker := tensors.keys() & {V_MARKER, ZTSNR_MARKER}):
        raise Refused(
            f"it is a whole model that says of its process by {min(marker)!r}, and a student has that of its teacher; if the "
            "teacher's is the same, give the U-Net alone"
        )
    prefix = ORIGINAL_PREFIX if whole else ""
    bare = {n.removeprefix(ORIGINAL_PREFIX): tensor for n, tensor in tensors.items() if n.startswith(prefix)}
    if base is None or "input_blocks.0.0.weight" not in bare:
        return tensors
    known = {
        f"{original}.{part}": f"{layer}.{part}"
        for layer, original in sgm_names(base).items()
        for part in ("weight", "bias")
    }
    return {known.get(name, name): tensor for name, tensor in bare.items()}


def _check_unet(tensors: dict[str, Tensor], base: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The tensors, if they are those of a UNet and have the names and shapes of the base."""
    if missing := [name for name in UNET if name not in tensors]:
        whole = any(name.startswith(WHOLE_MODEL) for name in tensors)
        advice = (
            "it is a whole model in one file: `resolve` makes a teacher of it, and `adopt` takes its U-Net if that is one of SD or SDXL"
            if whole
            else "give a U-Net of SD or SDXL in diffusers' or the original naming, and the teacher it was made from"
        )
        raise Refused(
            f"it holds no UNet: it has no {missing[0]} ({', '.join(list(tensors)[:1]) or 'nothing':.100} for one); {advice}"
        )
    if base is not None:
        _check_shapes(tensors, base)
    return tensors


def _check_shapes(tensors: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> None:
    """Raise Refused for the first name that only one of them has, or that has another shape."""
    for name in sorted(tensors.keys() | base.keys()):
        found, wanted = (tuple(part[name].shape) if name in part else "missing" for part in (tensors, base))
        if found != wanted:
            raise Refused(f"{name} is {found}, and {wanted} in the base; give the base it was made from")


def _merge_trained_lora(
    tensors: Mapping[str, Tensor], base: Mapping[str, Tensor] | None, path: Path, lora: LoraConfig | None
) -> dict[str, Tensor]:
    """The UNet of a training folder with a LoRA, whose weights stand beside those that they change (`BASE_LAYER`)."""
    if lora is None:
        raise Refused(
            "it is a UNet with a LoRA beside its weights, and does not say the LoRA's alpha; give a recipe with a LoRA, and its alpha as --distill.lora.alpha"
        )
    bare = {name.removeprefix("base_model.model."): tensor for name, tensor in tensors.items()}
    factors = {name: tensor for name, tensor in bare.items() if LORA.fullmatch(name)}
    ranks = {len(tensor) for name, tensor in factors.items() if layer_and_factor(name)[1] == "down"}
    if ranks != {lora.rank}:
        raise Refused(
            f"its LoRA has rank {min(ranks, default=0)}, the recipe's has {lora.rank}; set --distill.lora.rank, and alpha with it"
        )
    whole = {n.replace(BASE_LAYER, "."): tensor for n, tensor in bare.items() if n not in factors}
    return _add_lora(factors, _check_unet(whole, base), lora.alpha)


def _merge_lora(file: TensorFile, base: Mapping[str, Tensor] | None, path: Path) -> dict[str, Tensor]:
    """The base with the LoRA of a file merged into it."""
    if base is None:
        raise Refused("it is a LoRA, which changes a network and is none; give the base it was made from")
    return _add_lora(file.tensors, base, _default_alpha(file, path))


def _add_lora(
    tensors: Mapping[str, Tensor], base: Mapping[str, Tensor], default: float | None
) -> dict[str, Tensor]:
    """The base, with weight + alpha / rank * up @ down in place of each weight for which the LoRA has factors."""
    names = weights_by_lora_name(base)
    factors: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        module, part = layer_and_factor(key)
        weight = names.get(module)
        if not part or weight is None:
            raise Refused(
                f"{key!r:.150} of the LoRA fits no weight of the base; give a LoRA of this UNet alone, and the base it was made from"
            )
        if part in factors.setdefault(weight, {}):
            raise Refused(f"{key!r:.150} of the LoRA is there a second time, under another name")
        factors[weight][part] = tensor
    return dict(base) | {
        weight: _add_factors(weight, base[weight], parts, default) for weight, parts in factors.items()
    }


def _add_factors(name: str, weight: Tensor, parts: Mapping[str, Tensor], default: float | None) -> Tensor:
    """weight (out, in, ...) + alpha / rank * up (out, rank) @ down (rank, in, ...), added in float32 and rounded once.

    Without an alpha of its own or a default one, alpha is the rank, as in diffusers and kohya's code.
    """
    if missing := [part for part in ("down", "up") if part not in parts]:
        raise Refused(f"the LoRA has no {missing[0]} factor for {name}; get the file again")
    up, down = parts["up"].float().flatten(1), parts["down"].float().flatten(1)
    rank = len(down)
    if up.shape[1] != rank or (len(up), down.shape[1]) != weight.flatten(1).shape:
        raise Refused(
            f"the LoRA has factors of {tuple(up.shape)} and {tuple(down.shape)} for {name} of {tuple(weight.shape)}; give the base it was made from"
        )
    alpha = float(parts["alpha"]) if "alpha" in parts else rank if default is None else default
    return (weight.float() + alpha / rank * (up @ down).view(weight.shape)).to(weight.dtype)


def _default_alpha(file: TensorFile, path: Path) -> float | None:
    """The alpha of all factors that have none of their own, from the settings that diffusers or peft saves; None without them."""
    config = path.with_name("adapter_config.json")
    text = file.metadata.get("lora_adapter_metadata")
    if text is None and path.stem == "adapter_model":
        if not config.is_file():
            raise Refused(
                f"it is a LoRA of peft without the {config.name} that says its alpha; put it beside it"
            )
        text = config.read_text()
    try:
        saved = json.loads(text or "{}")
        settings = {name.removeprefix("unet."): value for name, value in saved.items()}
    except (ValueError, AttributeError, RecursionError):
        raise Refused("it is a LoRA whose settings are not a JSON object; get the file again") from None
    _check_lora_settings(settings)
    return float(settings["lora_alpha"]) if "lora_alpha" in settings else None


def _check_lora_settings(settings: Mapping[str, Any]) -> None:
    """Refuse settings of peft under which an update is not just alpha / rank * up @ down, added to the base."""
    for name in UNSUPPORTED_LORA:
        if settings.get(name):
            raise Refused(
                f"it is a LoRA with {name} = {settings[name]!r:.60}, which is not supported; merge it first"
            )
    for name, known in KNOWN_LORA.items():
        if name in settings and settings[name] not in known:
            raise Refused(
                f"it is a LoRA with {name} = {settings[name]!r:.60}, and only {', '.join(map(repr, known))} are supported: "
                "other updates belong to a base that was changed before training, or are of another form; merge it with peft first"
            )
