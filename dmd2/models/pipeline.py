"""Any text-to-image pipeline of diffusers, by its folder: SDXL-Lightning, LCM, Turbo, FLUX, ...

`model_index.json` names the class of the pipeline and of each part. Only classes of diffusers and transformers are made, and weights are
read from safetensors, so no code of the folder is run.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dmd2.encoders.pipeline_folder import (
    CONFIG,
    TEXT_WEIGHTS,
    TOKENIZER_FILES,
    VAE_WEIGHTS,
    fetch_files,
    load_from_files,
    load_frozen,
    read_config,
)
from dmd2.encoders.weight_files import weight_files
from dmd2.errors import Refused, brief
from dmd2.io.json_file import read_json
from dmd2.io.local import json_digest, sha256

INDEX = "model_index.json"
SETTINGS = ("scheduler_config.json", "preprocessor_config.json", "spiece.model", *TOKENIZER_FILES)
"""Files of the parts of a pipeline that are no networks."""
LIBRARIES = ("diffusers", "transformers")
LEFT_OUT = ("safety_checker", "feature_extractor", "image_encoder")
"""Parts that a picture of a prompt does not need; the first would replace some pictures by black ones."""
DENOISERS = ("unet", "transformer")
EMBEDDED_GUIDANCE = ("time_cond_proj_dim", "guidance_embeds")
"""Settings of denoisers that get the scale of the guidance as an input, in one call."""


@dataclass(frozen=True)
class Pipeline:
    """The files of a pipeline, on this machine."""

    source: str
    """What the user gave."""
    folder: Path
    kind: str
    """Its class in diffusers."""
    parts: Mapping[str, tuple[str, str]]
    """{part: (library, class)}."""
    flags: Mapping[str, Any]
    """Further arguments of the class."""

    @property
    def digest(self) -> str:
        """sha256 of the names and contents of the files that are read."""
        files = {INDEX: self.folder / INDEX}
        for part in self.parts:
            files |= {f"{part}/{name}": path for name, path in self._files(part).items()}
        return json_digest([(name, sha256(path)) for name, path in sorted(files.items())])

    def calls(self, steps: int, guidance: float) -> int:
        """Network calls per picture: one per step, and one more with a guidance above 1, unless the network gets it as an input."""
        denoiser = next(part for part in DENOISERS if part in self.parts)
        config = read_config(self.folder / denoiser)
        return steps * (2 if guidance > 1 and not any(config.get(name) for name in EMBEDDED_GUIDANCE) else 1)

    def load(self, device: torch.device, dtype: torch.dtype) -> Any:
        """The pipeline of diffusers. Its denoiser runs in `dtype` by autocast, the other networks in float32."""
        import diffusers

        parts = {name: self._load_part(name, device) for name in self.parts}
        try:
            pipe = getattr(diffusers, self.kind)(
                **parts, **dict.fromkeys(self._unused_arguments()), **self.flags
            )
        except (TypeError, ValueError) as error:
            raise Refused(f"{self.source} cannot be loaded as a {self.kind}: {brief(error)}") from None
        pipe.set_progress_bar_config(disable=True)
        if dtype != torch.float32:
            network = next(parts[name] for name in DENOISERS if name in parts)
            network.forward = torch.autocast(device.type, dtype)(network.forward)
        return pipe

    def _unused_arguments(self) -> list[str]:
        """Arguments without a default of the class that the pipeline has no part for."""
        import diffusers

        given = inspect.signature(getattr(diffusers, self.kind)).parameters.values()
        known = {*self.parts, *self.flags}
        return [p.name for p in given if p.default is p.empty and p.name not in known]

    def _load_part(self, name: str, device: torch.device) -> Any:
        library, kind = self.parts[name]
        found, folder = _class_of(library, kind), self.folder / name
        if (folder / CONFIG).is_file():
            return load_frozen(found, folder, _weights(library), device, torch.float32)
        return load_from_files(found, folder, self._files(name))

    def _files(self, part: str) -> dict[str, Path]:
        folder = self.folder / part
        if (folder / CONFIG).is_file():
            return {CONFIG: folder / CONFIG} | weight_files(folder, _weights(self.parts[part][0]))
        return {name: folder / name for name in SETTINGS if (folder / name).is_file()}


def _weights(library: str) -> str:
    """Name of the weights of a network."""
    return VAE_WEIGHTS if library == "diffusers" else TEXT_WEIGHTS


def _class_of(library: str, kind: str) -> Any:
    import diffusers
    import transformers

    found = getattr({"diffusers": diffusers, "transformers": transformers}[library], kind, None)
    if not inspect.isclass(found) or not hasattr(found, "from_pretrained"):
        raise Refused(
            f"{library} has no model {kind!r:.80}; install the version that the pipeline was made with"
        )
    return found


def find_pipeline(source: str) -> Pipeline:
    """Find the parts of a pipeline, and fetch what is not on this machine.

    Args:
        source: Folder, local or gs://, or name on the hub, with `@revision` if another one than the default is wanted.
    """
    index = read_json(_index(source))
    kind = index.pop("_class_name", None)
    parts, flags = {}, {}
    for name, value in index.items():
        if name in LEFT_OUT or name.startswith("_") or value == [None, None]:
            continue
        if isinstance(value, list):
            parts[name] = _checked_part(source, name, value)
        else:
            flags[name] = value
    if not isinstance(kind, str) or not kind.endswith("Pipeline") or not {*DENOISERS} & {*parts}:
        raise Refused(
            f"{source} is a {kind!r:.80} with the parts {', '.join(parts):.200}; give a text-to-image pipeline of diffusers"
        )
    if "prompt" not in inspect.signature(_class_of("diffusers", kind).__call__).parameters:
        raise Refused(
            f"{source} is a {kind}, which takes no prompt; give a text-to-image pipeline of diffusers"
        )
    return Pipeline(source, fetch_files(source, _names(parts)), kind, parts, flags)


def _index(source: str) -> Path:
    path = fetch_files(source, [INDEX]) / INDEX
    if not path.is_file():
        raise Refused(
            f"{source} has no {INDEX}; give the folder of a pipeline of diffusers, or of a run, package or teacher"
        )
    return path


def _checked_part(source: str, name: str, value: Sequence[Any]) -> tuple[str, str]:
    if (
        len(value) != 2
        or value[0] not in LIBRARIES
        or not name.isidentifier()
        or not isinstance(value[1], str)
    ):
        raise Refused(
            f"{source}: its part {name!r:.80} is {value!r:.200}, of which only classes of diffusers and transformers are loaded; give a "
            "pipeline without code of its own"
        )
    return str(value[0]), value[1]


def _names(parts: Mapping[str, tuple[str, str]]) -> list[str]:
    """Names of the files of a pipeline that may exist."""
    return [INDEX] + [
        f"{part}/{name}"
        for part, (library, _) in parts.items()
        for name in (CONFIG, _weights(library), *SETTINGS)
    ]
