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
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dmd2.config import EncodeConfig
from dmd2.errors import Refused, brief
from dmd2.io.storage import at, cache, is_local, local, sha256
from dmd2.io.tensors import sent
from dmd2.parallel import ranks

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
WORDS = (("tokenizer.json",), ("vocab.json", "merges.txt"))
"""Without either, a tokenizer would be made that knows no word."""
VAES = ("AutoencoderKL", "AutoencoderTiny")
"""The second only makes images, quickly, of the latents of the first."""
CLIP = {"text_encoder": "CLIPTextModel", "text_encoder_2": "CLIPTextModelWithProjection"}
"""The text encoders of Stable Diffusion 1.5 and 2 (the first) and XL (both), by folder."""
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(@[\w./-]+)?")


@dataclass(frozen=True)
class Networks:
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


class Embedded(NamedTuple):
    states: Tensor
    """float16 (B, tokens, width)."""
    pooled: Tensor | None
    """float16 (B, width), if there are two encoders."""


def find(place: str, text: bool, whole: bool = False) -> Networks:
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
    _check(root, VAE_WEIGHTS, [_config(root).get("_class_name")], *VAES)
    files = {f"vae/{name}": root / name for name in VAE_FILES}
    if whole:
        files |= _denoiser(folder)
    texts = tuple(
        (folder / part, folder / part.replace("text_encoder", "tokenizer"))
        for part in (CLIP if text else ())
        if (folder / part / CONFIG).is_file()
    )
    if text and (not texts or texts[0][0].name != "text_encoder"):
        raise Refused(
            f"{place} has no text_encoder/{CONFIG}; --encode.text needs the folder of a whole pipeline"
        )
    for encoder, tokenizer in texts:
        _check(encoder, TEXT_WEIGHTS, _config(encoder).get("architectures", []), CLIP[encoder.name])
        here = [path for path in (*encoder.iterdir(), *tokenizer.glob("*")) if _read(path)]
        files |= {f"{path.parent.name}/{path.name}": path for path in here}
    return Networks(place, root, texts, files)


def _denoiser(folder: Path) -> dict[str, Path]:
    if not (folder / "unet" / CONFIG).is_file():
        raise Refused(f"{folder} has no unet/{CONFIG}; give the folder of a whole Stable Diffusion pipeline")
    _check(
        folder / "unet", VAE_WEIGHTS, [_config(folder / "unet").get("_class_name")], "UNet2DConditionModel"
    )
    names = [part + name for part, of_part in DENOISER.items() for name in of_part]
    return {name: folder / name for name in names if (folder / name).is_file()}


def _read(path: Path) -> bool:
    return path.name in (CONFIG, TEXT_WEIGHTS, *TOKENIZER_FILES)


def _brought(place: str, names: list[str]) -> Path:
    """A folder of this machine with those of the files that there are."""
    if not is_local(place):
        store = at(place)
        there = {name: version for name in names if (version := store.generation(name))}
        folder = cache() / "networks" / hashlib.sha256(json.dumps([place, there]).encode()).hexdigest()
        for name in there:
            if not (folder / name).is_file():
                store.fetch(name, folder / name)
        return folder
    if local(place).is_dir():
        return local(place)
    if local(place).exists() or not HUB_NAME.fullmatch(place):
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


def _config(folder: Path) -> dict[str, Any]:
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


def _loaded(kind: Any, folder: Path, weights: str, device: torch.device, dtype: torch.dtype) -> Any:
    """A network in which every weight comes from the file."""
    settings: dict[str, Any] = {"use_safetensors": True, "output_loading_info": True}
    settings["torch_dtype" if weights == VAE_WEIGHTS else "dtype"] = dtype
    network, info = _from_files(kind, folder, (CONFIG, weights), **settings)
    if missing := sorted(map(str, info["missing_keys"])):
        raise Refused(f"{folder} lacks {len(missing)} weights of a {kind.__name__}, {missing[0]} for one")
    return network.to(device).eval().requires_grad_(False)


def _from_files(kind: Any, folder: Path, names: Sequence[str], **settings: Any) -> Any:
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


DECODED_TOGETHER = 8 * 256**2
"""Pixels that a VAE makes in one call, but at least an image: one of 1024x1024 takes 4 GB in float32."""


class Vae:
    """A VAE, with the shift and scale of its family."""

    def __init__(self, networks: Networks, settings: EncodeConfig, device: torch.device) -> None:
        import diffusers

        kind = getattr(diffusers, _config(networks.vae)["_class_name"])
        self.device, self.dtype = device, getattr(torch, settings.dtype)
        self.place, self.network = (
            networks.place,
            _loaded(kind, networks.vae, VAE_WEIGHTS, device, self.dtype),
        )
        config = self.network.config
        if config.get("latents_mean") or config.get("latents_std"):
            raise Refused(f"{networks.vae} scales each channel apart (latents_mean), which is not supported")
        self.scale, self.shift = float(config.scaling_factor), float(config.get("shift_factor") or 0.0)
        blocks = config.get("block_out_channels") or config.encoder_block_out_channels
        self.stride = 2 ** (len(blocks) - 1)

    def shape(self, image: tuple[int, ...]) -> tuple[int, int, int, int]:
        """(2, C, h, w) of the moments of an image of shape (C, H, W), which must fit."""
        if type(self.network).__name__ != VAES[0]:
            raise Refused(
                f"{self.place} holds an AutoencoderTiny, which is for looking at latents; encode with the VAE of the teacher"
            )
        channels, height, width = image
        if height % self.stride or width % self.stride:
            raise Refused(
                f"the images have {height}x{width} pixels, and the VAE makes one latent of {self.stride}x{self.stride}; shard them again at a multiple of {self.stride}"
            )
        if channels not in (1, takes := self.network.config.in_channels):
            raise Refused(f"the images have {channels} channels, the VAE takes {takes}; shard them again")
        return 2, self.network.config.latent_channels, height // self.stride, width // self.stride

    @torch.inference_mode()
    def moments(self, images: Tensor) -> Tensor:
        """uint8 (B, C, H, W) -> float16 (B, 2, c, h, w): mean and standard deviation of the posterior, as
        (mean - shift) * scale and std * scale; grey is repeated."""
        pixels = images.to(self.device).float() / 127.5 - 1
        pixels = pixels.expand(-1, self.network.config.in_channels, -1, -1)
        with _repeatable(self.device):
            posterior = self.network.encode(pixels.to(self.dtype)).latent_dist
        mean = (posterior.mean.float() - self.shift) * self.scale
        std = torch.exp(0.5 * posterior.logvar.float()) * self.scale
        return torch.stack((mean, std), 1).half().cpu()

    def pixels(self, x: Tensor) -> Tensor:
        """Latents (B, c, h, w), scaled and shifted as by `moments` -> float32 (B, C, H, W) in [-1, 1], with gradient."""
        z = x.to(self.device, self.dtype) / self.scale + self.shift
        pixels: Tensor = self.network.decode(z).sample
        return pixels.float()

    @torch.inference_mode()
    def decode(self, x: Tensor) -> Tensor:
        """Latents, as for `pixels` -> images, uint8 (B, C, H, W)."""
        together = max(1, DECODED_TOGETHER // (x.shape[-2] * x.shape[-1] * self.stride**2))
        parts = [self.pixels(part) * 127.5 + 128 for part in x.split(together)]
        return torch.cat([part.clamp(0, 255).to(torch.uint8).cpu() for part in parts])


def load_vae(folder: Path | str) -> Vae:
    """From a folder, a bucket or the hub; in float32, on the device of this process."""
    return Vae(find(str(folder), text=False), EncodeConfig(), ranks.device())


class Texts:
    """What a pipeline makes of a caption: of one encoder the last hidden states, of two the last but one of each,
    side by side, and the pooled projection of the second."""

    def __init__(self, networks: Networks, settings: EncodeConfig, device: torch.device) -> None:
        import transformers

        transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        self.device, dtype = device, getattr(torch, settings.dtype)
        self.parts = []
        for folder, words in networks.texts:
            encoder = _loaded(getattr(transformers, CLIP[folder.name]), folder, TEXT_WEIGHTS, device, dtype)
            if not any(all((words / name).is_file() for name in names) for names in WORDS):
                raise Refused(
                    f"{words} holds no CLIP tokenizer: it has neither tokenizer.json, nor vocab.json and merges.txt"
                )
            tokenizer = _from_files(transformers.CLIPTokenizer, words, TOKENIZER_FILES)
            self.parts.append((tokenizer, encoder))

    def embed(self, texts: Sequence[str]) -> Embedded:
        """As it is stored."""
        states, pooled = self.states(texts)
        return Embedded(states.half().cpu(), None if pooled is None else pooled.half().cpu())

    @torch.no_grad()
    def states(self, texts: Sequence[str]) -> tuple[Tensor, Tensor | None]:
        """float32 (B, tokens, width) and, if there are two encoders, (B, width) of the second, on the device."""
        states, pooled = [], None
        for tokenizer, encoder in self.parts:
            length = min(tokenizer.model_max_length, encoder.config.max_position_embeddings)
            settings = {"padding": "max_length", "truncation": True, "max_length": length}
            tokens = tokenizer(list(texts), return_tensors="pt", **settings).input_ids
            with _repeatable(self.device):
                out = encoder(sent(tokens, self.device), output_hidden_states=True)
            states.append(out.hidden_states[-2] if len(self.parts) > 1 else out.last_hidden_state)
            pooled = out.text_embeds.float() if "text_embeds" in out else None
        return torch.cat(states, -1).float(), pooled


@contextmanager
def _repeatable(device: torch.device) -> Iterator[None]:
    """The same numbers every time. On a CPU they would depend on the number of threads: more processes are what makes
    it faster there."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if device.type == "cpu" else threads)
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True):
            yield
    finally:
        torch.set_num_threads(threads)
