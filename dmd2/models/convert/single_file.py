"""A whole SD1.5 or SDXL model in a single file, converted to a pipeline folder by diffusers; the result is checked for completeness."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from dmd2.errors import Refused, brief, near_miss
from dmd2.models.convert.tensor_files import name_file_in_errors, refuse_broken_file, require_file

PIPELINES = {
    "conditioner.embedders.1.": "StableDiffusionXLPipeline",
    "cond_stage_model.transformer.": "StableDiffusionPipeline",
}
"""Prefix of names that only one kind of model has -> its pipeline in diffusers."""
COMPONENTS = {
    "model.diffusion_model.": "unet", "first_stage_model.encoder.": "vae", "first_stage_model.decoder.": "vae",
    "first_stage_model.quant_conv.": "vae", "first_stage_model.post_quant_conv.": "vae",
    "cond_stage_model.transformer.": "text_encoder", "conditioner.embedders.0.transformer.": "text_encoder",
    "conditioner.embedders.1.model.": "text_encoder_2",
}  # fmt: skip
LEFT_OUT = ("position_ids", "logit_scale")
"""Ends of names of CLIP's tensors that are not weights of a text encoder."""
V_MARKER, ZTSNR_MARKER = "v_pred", "ztsnr"
"""Empty tensors by which a file says that its U-Net predicts v, and that its schedule has zero terminal SNR."""
EDM_PREFIX = "edm_"
"""Start of names of tensors by which a file says that its U-Net has the process of EDM: edm_mean, edm_std, edm_vpred.sigma_max."""
PREDICTION_KEYS = ("modelspec.prediction_type", "modelspec.predict_key", "ss_v_parameterization")
"""Metadata that say what the U-Net predicts: of the Stability AI Model Spec, of ComfyUI, of kohya's trainer."""
NOT_STATED = "None"
"""The value that kohya's trainer writes for a setting that was not given."""
PREDICTION_NAMES = {
    "epsilon": "epsilon", "eps": "epsilon", "noise": "epsilon",
    "v": "v_prediction", "v_prediction": "v_prediction", "v-prediction": "v_prediction", "v_pred": "v_prediction",
    "sample": "sample", "x0": "sample",
}  # fmt: skip
"""Values of these metadata -> `prediction_type` of diffusers."""
LIBRARIES = ("diffusers", "transformers", "stable_diffusion", None)


def convert_single_file(path: Path, config: Path | None, out: Path) -> None:
    """Write a checkpoint of SD1.5 or SDXL in one file, in the layout of CompVis or SGM, as a folder of diffusers.

    All weights of the file's networks are written, and all written weights come from the file. If the file has a single
    precision it is kept; otherwise weights become float32.

    Args:
        path: A .safetensors file.
        config: A local folder of a diffusers pipeline of the same kind, whose configs, tokenizers and scheduler are
            used; None takes them from the hub.
        out: The folder.
    """
    with name_file_in_errors(path):
        header = _read_header(path)
        kind, process = _pipeline(header.shapes), _stated_process(header)
        if config is not None:
            _check_config(config, kind)
        pipeline = _convert(path, config, kind, header.dtype)
        _check_complete(pipeline, header.shapes)
        pipeline.scheduler.register_to_config(**process)
        pipeline.save_pretrained(out)


def _convert(path: Path, config: Path | None, kind: str, dtype: torch.dtype) -> Any:
    """The pipeline, loaded by diffusers with its warnings turned off; `_check_complete` checks what they would be about."""
    import diffusers
    import transformers
    from diffusers.loaders.single_file_utils import SingleFileComponentError
    from diffusers.utils import logging

    logging.disable_progress_bar()
    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    source = {"config": str(config), "local_files_only": True} if config else {}
    try:
        return getattr(diffusers, kind).from_single_file(str(path), torch_dtype=dtype, **source)
    except NotImplementedError:  # on moving a weight that is still empty
        raise Refused(f"it lacks weights of the networks in {config}; give configs that fit it") from None
    except (
        OSError,
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        RuntimeError,
        SingleFileComponentError,
    ) as error:
        raise Refused(
            f"diffusers cannot convert it with the configs of {config or 'the hub'} ({brief(error)}); give the folder of a pipeline it is a variant of"
        ) from None
    finally:
        logging.set_verbosity(level)


class Header(NamedTuple):
    """What a safetensors file says of its content."""

    shapes: dict[str, list[int]]
    """Name -> shape of all tensors."""
    dtype: torch.dtype
    """The precision of the networks' weights if there is only one, otherwise float32."""
    metadata: dict[str, str]


def _stated_process(header: Header) -> dict[str, Any]:
    """The scheduler's settings that a file states, in names of marker tensors or in metadata; refused if they are not supported
    or contradict each other."""
    if edm := next((name for name in header.shapes if name.startswith(EDM_PREFIX)), None):
        raise Refused(
            f"its key {edm!r:.60} says that it follows the process of EDM, as Playground 2.5 and CosXL do, which is not supported; use a model that predicts noise, v or x0 at the timesteps of SDXL"
        )
    stated = {
        key: value for key in PREDICTION_KEYS if (value := header.metadata.get(key, NOT_STATED)) != NOT_STATED
    }
    kinds = {_prediction_type(key, value) for key, value in stated.items()}
    kinds |= {"v_prediction"} if V_MARKER in header.shapes else set()
    if len(kinds) > 1:
        raise Refused(
            f"it says of itself that it predicts {' and '.join(sorted(kinds))}; correct its metadata ({', '.join(PREDICTION_KEYS)}) or its key {V_MARKER}"
        )
    found: dict[str, Any] = {"prediction_type": kinds.pop()} if kinds else {}
    if ZTSNR_MARKER in header.shapes or _is_true(header.metadata.get("ss_zero_terminal_snr", "")):
        found["rescale_betas_zero_snr"] = True
    return found


def _prediction_type(key: str, value: str) -> str:
    """The `prediction_type` of diffusers for a value of the metadata."""
    if key == "ss_v_parameterization":
        return "v_prediction" if _is_true(value) else "epsilon"
    if (known := PREDICTION_NAMES.get(value.strip().lower())) is None:
        raise Refused(
            f"its metadata have {key} = {value!r:.60}, which is no known prediction type; {near_miss(value, PREDICTION_NAMES)}"
        )
    return known


def _is_true(value: str) -> bool:
    return value.strip().lower() in ("true", "1")


def _read_header(path: Path) -> Header:
    """Read the header of a safetensors file; its weights are not read."""
    if require_file(path).suffix != ".safetensors":
        raise Refused(
            f"it is no .safetensors file but {path.suffix!r}, and a pickle (.ckpt) can run code: convert it to safetensors where you trust it"
        )
    with refuse_broken_file("safetensors file"), safe_open(path, "pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        used = [part for name, part in slices.items() if _component(name)]
        kinds = {part.get_dtype() for part in used} & {"F16", "BF16", "F32", "F64"}
        one = {"F16": torch.float16, "BF16": torch.bfloat16}.get(*kinds) if len(kinds) == 1 else None
        shapes = {name: part.get_shape() for name, part in slices.items()}
        return Header(shapes, one or torch.float32, file.metadata() or {})


def _component(name: str) -> str | None:
    """The component of a pipeline that a weight belongs to; None for other tensors."""
    found = next((part for prefix, part in COMPONENTS.items() if name.startswith(prefix)), None)
    return None if name.endswith(LEFT_OUT) else found


def _pipeline(shapes: Mapping[str, list[int]]) -> str:
    """Class name of the pipeline in diffusers that the model belongs to."""
    kind = next((k for prefix, k in PIPELINES.items() if any(n.startswith(prefix) for n in shapes)), None)
    if kind is None or not any(name.startswith("model.diffusion_model.") for name in shapes):
        raise Refused(
            f"it is no whole model of SD1.5 or SDXL in one file ({next(iter(shapes), 'nothing')!r:.100} for one); a U-Net or a LoRA "
            "alone is no teacher: `adopt` reads it, with the teacher it was made from"
        )
    return kind


def _check_config(folder: Path, kind: str) -> None:
    """Raise Refused unless the folder is a pipeline of this kind with classes of diffusers and transformers only, because diffusers
    imports the classes that a folder names."""
    try:
        index = json.loads((folder / "model_index.json").read_text())
        parts = {name: part for name, part in index.items() if isinstance(part, list)}
    except (OSError, ValueError, AttributeError, RecursionError):
        raise Refused(
            f"{folder} has no readable model_index.json; give the folder of a diffusers pipeline"
        ) from None
    if index.get("_class_name") != kind:
        raise Refused(
            f"it is for a {kind}, and {folder} holds a {index.get('_class_name')!r:.60}; give one of the same kind"
        )
    for name, part in parts.items():
        if part[:1] and part[0] not in LIBRARIES:
            raise Refused(
                f"{folder} takes its {name!r:.60} from {part[0]!r:.60}, not from diffusers or transformers"
            )


def _check_complete(pipeline: Any, shapes: Mapping[str, list[int]]) -> None:
    """Raise Refused if weights are missing or left over: diffusers ignores unknown names, and leaves missing weights on the meta
    device."""
    for component in dict.fromkeys(COMPONENTS.values()):
        network = getattr(pipeline, component, None)
        weights: dict[str, Tensor] = network.state_dict() if network is not None else {}
        if empty := [name for name, tensor in weights.items() if tensor.is_meta]:
            raise Refused(
                f"it has no {component}.{empty[0]}; get the file again, or give configs that fit it"
            )
        inside = sum(tensor.numel() for tensor in weights.values())
        given = sum(math.prod(shape) for name, shape in shapes.items() if _component(name) == component)
        if inside != given:
            raise Refused(
                f"it has {given} numbers for the {component}, and the configs ask for {inside}; give configs that fit it"
            )
