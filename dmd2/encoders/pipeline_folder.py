"""The networks that make latents: a VAE and, if captions are encoded too, the text encoders of its pipeline.

They are read from a folder of a diffusers AutoencoderKL or of a pipeline: local, on a bucket, or a name on the hub.
Only files that are named here are read, all of them data: configs, tokenizers, and weights as safetensors. A pickle,
which can run code, is never opened.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dmd2.errors import Refused, brief
from dmd2.io.local import sha256
from dmd2.io.storage import cache, open_store

CONFIG, VAE_WEIGHTS, TEXT_WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors", "model.safetensors"
DENOISER = {
    "unet/": (CONFIG, VAE_WEIGHTS),
    "scheduler/": ("scheduler_config.json",),
    "": ("model_index.json",),
}
"""Of a whole pipeline, what is neither VAE nor text encoder."""
VAE_FILES = (CONFIG, VAE_WEIGHTS)
TOKENIZER_FILES = (
    "vocab.json",
    "merges.txt",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
)
VOCABULARIES = (("tokenizer.json",), ("vocab.json", "merges.txt"))
"""Without either, a tokenizer would be made that knows no word."""
VAES = ("AutoencoderKL", "AutoencoderTiny")
"""The second only makes images, quickly, of the latents of the first."""
TEXT_ENCODERS = {"text_encoder": "CLIPTextModel", "text_encoder_2": "CLIPTextModelWithProjection"}
"""The text encoders of Stable Diffusion 1.5 and 2 (the first) and XL (both), by folder."""
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(@[\w./-]+)?")


@dataclass(frozen=True)
class PipelineFiles:
    """Files on this machine."""

    place: str
    """What the user gave."""
    vae: Path
    texts: tuple[tuple[Path, Path], ...]
    """(encoder, tokenizer) folders."""
    files: dict[str, Path]
    """By their name in a pipeline."""

    @property
    def digest(self) -> str:
        """Of the content: the same for a VAE alone and for the same VAE in a pipeline, wherever it lies."""
        return hashlib.sha256(
            json.dumps([(name, sha256(path)) for name, path in sorted(self.files.items())]).encode()
        ).hexdigest()

    def copy(self, folder: Path) -> None:
        """Put the files into a pipeline folder: for whoever makes images of the latents later."""
        for name, path in self.files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / name)


def find_pipeline(place: str, text: bool, whole: bool = False) -> PipelineFiles:
    """The files of a VAE, with `text` of the text encoders beside it, and of a `whole` pipeline all that there is."""
    parts: dict[str, tuple[str, ...]] = {"vae/": VAE_FILES} | (DENOISER if whole else {"": VAE_FILES})
    for number in ("", "_2") if text else ():
        parts |= {f"text_encoder{number}/": (CONFIG, TEXT_WEIGHTS), f"tokenizer{number}/": TOKENIZER_FILES}
    folder = _brought(place, [part + name for part, names in parts.items() for name in names])
    root = folder / "vae" if (folder / "vae" / CONFIG).is_file() else folder
    if not (root / CONFIG).is_file():
        raise Refused(
            f"{place} is no VAE: it has neither {CONFIG} nor vae/{CONFIG}; give the folder of a diffusers AutoencoderKL, or of a pipeline with one"
        )
    _check(root, VAE_WEIGHTS, [read_config(root).get("_class_name")], *VAES)
    files = {f"vae/{name}": root / name for name in VAE_FILES}
    if whole:
        files |= _denoiser(folder)
    texts = tuple(
        (folder / part, folder / part.replace("text_encoder", "tokenizer"))
        for part in (TEXT_ENCODERS if text else ())
        if (folder / part / CONFIG).is_file()
    )
    if text and (not texts or texts[0][0].name != "text_encoder"):
        raise Refused(
            f"{place} has no text_encoder/{CONFIG}; --encode.text needs the folder of a whole pipeline"
        )
    for encoder, tokenizer in texts:
        _check(
            encoder, TEXT_WEIGHTS, read_config(encoder).get("architectures", []), TEXT_ENCODERS[encoder.name]
        )
        here = [path for path in (*encoder.iterdir(), *tokenizer.glob("*")) if _read(path)]
        files |= {f"{path.parent.name}/{path.name}": path for path in here}
    return PipelineFiles(place, root, texts, files)


def _denoiser(folder: Path) -> dict[str, Path]:
    if not (folder / "unet" / CONFIG).is_file():
        raise Refused(f"{folder} has no unet/{CONFIG}; give the folder of a whole Stable Diffusion pipeline")
    _check(
        folder / "unet",
        VAE_WEIGHTS,
        [read_config(folder / "unet").get("_class_name")],
        "UNet2DConditionModel",
    )
    names = [part + name for part, of_part in DENOISER.items() for name in of_part]
    return {name: folder / name for name in names if (folder / name).is_file()}


def _read(path: Path) -> bool:
    return path.name in (CONFIG, TEXT_WEIGHTS, *TOKENIZER_FILES)


def _brought(place: str, names: list[str]) -> Path:
    """A folder of this machine with those of the files that there are."""
    store = open_store(place)
    path = store.local_folder
    if not path:
        there = {name: version for name in names if (version := store.version(name))}
        folder = cache() / "networks" / hashlib.sha256(json.dumps([place, there]).encode()).hexdigest()
        for name in there:
            if not (folder / name).is_file():
                store.download(name, folder / name)
        return folder
    if path.is_dir():
        return path
    if path.exists() or not HUB_NAME.fullmatch(place):
        raise Refused(f"{place} is no folder; give that of a VAE or a pipeline, gs://, or a name on the hub")
    return _from_hub(place, names)


def _from_hub(name: str, files: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    repository, _, revision = name.partition("@")
    try:
        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=files))
    except (OSError, ValueError) as error:
        raise Refused(
            f"{name} is no local folder, and as a name on the hub it cannot be read ({brief(error)}); check the name and the connection, or give a local copy"
        ) from None


def read_config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / CONFIG).read_text())
    except ValueError:
        config = None
    if not isinstance(config, dict):
        raise Refused(f"{folder / CONFIG} is not JSON, or not the config of a network; get the folder again")
    return config


def _check(folder: Path, weights: str, said: Sequence[str | None], *wanted: str) -> None:
    if not {*wanted} & {*said}:
        raise Refused(
            f"{folder} holds a {' '.join(map(str, said)) or 'network of no name'}, not a {' or '.join(wanted)}"
        )
    if not (folder / weights).is_file():
        raise Refused(
            f"{folder} has no {weights}; weights in other formats are not read, since a pickle (.bin) can run code: convert them to safetensors"
        )


def load_frozen(kind: Any, folder: Path, weights: str, device: torch.device, dtype: torch.dtype) -> Any:
    """A network in which every weight comes from the file."""
    settings: dict[str, Any] = {"use_safetensors": True, "output_loading_info": True}
    settings["torch_dtype" if weights == VAE_WEIGHTS else "dtype"] = dtype
    network, info = load_from_files(kind, folder, (CONFIG, weights), **settings)
    if missing := sorted(map(str, info["missing_keys"])):
        raise Refused(f"{folder} lacks {len(missing)} weights of a {kind.__name__}, {missing[0]} for one")
    return network.to(device).eval().requires_grad_(False)


def load_from_files(kind: Any, folder: Path, names: Sequence[str], **settings: Any) -> Any:
    """Load from these files alone: the libraries look for others too, adapters and pickles among them."""
    from safetensors import SafetensorError

    with tempfile.TemporaryDirectory() as clean:
        for path in (folder / name for name in names if (folder / name).is_file()):
            (Path(clean) / path.name).symlink_to(path.resolve())
        try:
            return kind.from_pretrained(clean, local_files_only=True, **settings)
        except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
            said = brief(error).replace(clean, str(folder))
            raise Refused(f"{folder} cannot be loaded as a {kind.__name__}: {said}") from None


@contextmanager
def deterministic_encoding(device: torch.device) -> Iterator[None]:
    """The same numbers every time. On a CPU they would depend on the number of threads: more processes are what makes
    it faster there."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if device.type == "cpu" else threads)
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True):
            yield
    finally:
        torch.set_num_threads(threads)
