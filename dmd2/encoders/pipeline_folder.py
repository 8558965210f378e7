"""The files of a diffusers pipeline: finding them, and loading single networks of it.

A pipeline, or a VAE alone, is given as a local folder, a folder on a bucket, or a name on the hub. Only the files named here
are read, and all of them are data: configs, tokenizers, and weights as safetensors. A pickle, which can run code, is never
opened.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from dmd2.encoders.weight_files import VARIANTS, candidates, index_name, weight_files
from dmd2.errors import Refused, brief
from dmd2.io.hub import HUB_NAME
from dmd2.io.json_file import read_json
from dmd2.io.local import json_digest, sha256
from dmd2.io.storage import cache, open_store
from dmd2.io.store import Store
from dmd2.io.tensors import convert_file

CONFIG, VAE_WEIGHTS, TEXT_WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors", "model.safetensors"
DENOISER = {
    "unet/": (CONFIG, VAE_WEIGHTS),
    "scheduler/": ("scheduler_config.json",),
    "": ("model_index.json",),
}
"""Files of a whole pipeline that belong neither to the VAE nor to a text encoder."""
VAE_FILES = (CONFIG, VAE_WEIGHTS)
TOKENIZER_FILES = (
    "vocab.json",
    "merges.txt",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
VOCABULARIES = (("tokenizer.json",), ("vocab.json", "merges.txt"))
"""A tokenizer needs the files of one of these; without them, transformers makes one with an empty vocabulary."""
VAES = ("AutoencoderKL", "AutoencoderTiny")
"""The second only decodes, quickly, the latents of the first."""
TEXT_ENCODERS = {"text_encoder": "CLIPTextModel", "text_encoder_2": "CLIPTextModelWithProjection"}
"""The text encoders of Stable Diffusion 1.5 and 2 (the first) and XL (both), by folder."""
TEXT_FOLDERS = ("text_encoder/", "text_encoder_2/", "tokenizer/", "tokenizer_2/")
TEXT_FILES = (CONFIG, *TOKENIZER_FILES)
DTYPE_SETTINGS = ("dtype", "torch_dtype")
"""Settings in the config of a network that name its precision: of transformers 5, and before."""


@dataclass(frozen=True)
class PipelineFiles:
    """The files of a VAE or of a pipeline, on this machine."""

    source: str
    """What the user gave."""
    vae: Path
    """Folder of the VAE."""
    text_encoders: tuple[tuple[Path, Path], ...]
    """(encoder, tokenizer) folders."""
    files: dict[str, Path]
    """Path in a pipeline -> path here."""

    @property
    def digest(self) -> str:
        """sha256 of the names and contents; the same for a VAE alone and for the same VAE in a pipeline."""
        return json_digest([(name, sha256(path)) for name, path in sorted(self.files.items())])

    @property
    def text_digest(self) -> str:
        """sha256 of the text encoders and tokenizers alone."""
        texts = {name: path for name, path in self.files.items() if name.startswith(TEXT_FOLDERS)}
        return text_digest({name: sha256(path) for name, path in texts.items()})

    def with_vae(self, other: PipelineFiles) -> PipelineFiles:
        """The same with the VAE of another; no file of its own VAE is left, which may have other names."""
        files = {name: path for name, path in self.files.items() if not name.startswith("vae/")}
        return replace(self, vae=other.vae, files=files | other.files)

    def copy(self, folder: Path) -> None:
        """Copy the files into a folder, in the layout of a pipeline."""
        for name, path in self.files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / name)


def text_digest(digests: Mapping[str, str]) -> str:
    """sha256 of the text encoders and tokenizers of a pipeline, from the sha256 of each of its files; other files do not count."""
    names = [name for name in sorted(digests) if name.startswith(TEXT_FOLDERS)]
    read = [n for n in names if n.endswith((".safetensors", ".index.json")) or Path(n).name in TEXT_FILES]
    return json_digest([(name, digests[name]) for name in read])


def find_pipeline(source: str, text: bool, whole: bool = False) -> PipelineFiles:
    """Find the VAE in a folder of a VAE or a pipeline, and fetch what is not on this machine.

    Args:
        source: Local folder, gs:// address, or name on the hub, with `@revision` if another one than the default is wanted.
        text: Find the text encoders too, which must be there.
        whole: Find the U-Net, the scheduler and the index too.

    Raises:
        Refused: If something is missing, is of another class, or has weights in another format than safetensors.
    """
    parts: dict[str, tuple[str, ...]] = {"vae/": VAE_FILES} | (DENOISER if whole else {"": VAE_FILES})
    for number in ("", "_2") if text else ():
        parts |= {f"text_encoder{number}/": (CONFIG, TEXT_WEIGHTS), f"tokenizer{number}/": TOKENIZER_FILES}
    folder = fetch_files(source, [part + name for part, names in parts.items() for name in names])
    root = folder / "vae" if (folder / "vae" / CONFIG).is_file() else folder
    if not (root / CONFIG).is_file():
        raise Refused(
            f"{source} is no VAE: it has neither {CONFIG} nor vae/{CONFIG}; give the folder of a diffusers AutoencoderKL, or of a pipeline with one"
        )
    _check_network(root, *VAES)
    files = _network_files("vae/", root, VAE_WEIGHTS)
    if whole:
        files |= _denoiser_files(folder)
    texts = tuple(
        (folder / part, folder / part.replace("text_encoder", "tokenizer"))
        for part in (TEXT_ENCODERS if text else ())
        if (folder / part / CONFIG).is_file()
    )
    if text and (not texts or texts[0][0].name != "text_encoder"):
        raise Refused(
            f"{source} has no text_encoder/{CONFIG}; --encode.text needs the folder of a whole pipeline"
        )
    for encoder, tokenizer in texts:
        _check_network(encoder, TEXT_ENCODERS[encoder.name])
        files |= _network_files(f"{encoder.name}/", encoder, TEXT_WEIGHTS)
        files |= {f"{tokenizer.name}/{name}": path for name, path in tokenizer_files(tokenizer).items()}
    return PipelineFiles(source, root, texts, files)


def fetch_configs(source: str) -> Path:
    """A local folder with the configs and tokenizers of a pipeline, without its weights.

    Args:
        source: Local folder, gs:// address, or name on the hub.
    """
    tokenizers = [f"tokenizer{number}/{name}" for number in ("", "_2") for name in TOKENIZER_FILES]
    networks = [f"{part}/{CONFIG}" for part in ("unet", "vae", *TEXT_ENCODERS)]
    return fetch_files(
        source, ["model_index.json", "scheduler/scheduler_config.json", *networks, *tokenizers]
    )


def _denoiser_files(folder: Path) -> dict[str, Path]:
    """The files of `DENOISER` in a pipeline folder; the scheduler and the index may be missing."""
    if not (folder / "unet" / CONFIG).is_file():
        raise Refused(f"{folder} has no unet/{CONFIG}; give the folder of a whole Stable Diffusion pipeline")
    _check_network(folder / "unet", "UNet2DConditionModel")
    names = [part + name for part, of_part in DENOISER.items() if part != "unet/" for name in of_part]
    there = {name: folder / name for name in names if (folder / name).is_file()}
    return there | _network_files("unet/", folder / "unet", VAE_WEIGHTS)


def _network_files(part: str, folder: Path, weights: str) -> dict[str, Path]:
    """Path in a pipeline -> path here, of the config and the weights of a network."""
    files = {CONFIG: folder / CONFIG} | weight_files(folder, weights)
    return {f"{part}{name}": path for name, path in files.items()}


def tokenizer_files(folder: Path) -> dict[str, Path]:
    """Those of `TOKENIZER_FILES` that are in a folder."""
    return {name: folder / name for name in TOKENIZER_FILES if (folder / name).is_file()}


def fetch_files(source: str, names: list[str]) -> Path:
    """A folder on this machine with those of the files that exist; weights under any of their names."""
    store = open_store(source)
    path = store.local_folder
    if not path:
        return _fetch_weights(_bucket_copy(source, store, names), names)
    if path.is_dir():
        return path
    if path.exists() or not HUB_NAME.fullmatch(source):
        raise Refused(f"{source} is no folder; give that of a VAE or a pipeline, gs://, or a name on the hub")
    return _fetch_weights(partial(_download_from_hub, source), names)


def _fetch_weights(fetch: Callable[[list[str]], Path], names: list[str]) -> Path:
    """Fetch the files by a function that returns the folder it copies to; of weights, the first variant that exists."""
    weights = [PurePosixPath(name) for name in names if name.endswith(".safetensors")]
    indices = [
        str(path.with_name(index_name(path.name, variant))) for path in weights for variant in VARIANTS
    ]
    folder = fetch([name for name in names if not name.endswith(".safetensors")] + indices)
    for path in weights:
        if (folder / path.with_name(CONFIG)).is_file():
            _fetch_first(fetch, folder, path)
    return folder


def _fetch_first(fetch: Callable[[list[str]], Path], folder: Path, path: PurePosixPath) -> None:
    """Fetch the weights of one network under the first of their names that exists."""
    for names in candidates(folder / path.parent, path.name):
        fetch([str(path.with_name(name)) for name in names])
        if all((folder / path.with_name(name)).is_file() for name in names):
            return


def _bucket_copy(source: str, store: Store, names: list[str]) -> Callable[[list[str]], Path]:
    """A function that downloads files, if they exist, to a folder of the cache that belongs to the present content of the bucket."""
    starts = {
        f"{part}/" if part else file.split(".")[0] for part, _, file in (n.rpartition("/") for n in names)
    }
    there = {o.name: o.fingerprint for start in sorted(starts) for o in store.list_objects(start)}
    folder = cache() / "networks" / json_digest([source, there])

    def fetch(files: list[str]) -> Path:
        for name in files:
            if name in there and not (folder / name).is_file():
                store.download(name, folder / name)
        return folder

    return fetch


def _download_from_hub(name: str, files: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    repository, _, revision = name.partition("@")
    try:
        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=files))
    except (OSError, ValueError) as error:
        raise Refused(
            f"{name} is no local folder, and as a name on the hub it cannot be read ({brief(error)}); check the name and the connection, or give a local copy"
        ) from None


def read_config(folder: Path) -> dict[str, Any]:
    """The config.json of a network."""
    return read_json(folder / CONFIG)


def copy_as_float32(path: Path, target: Path) -> None:
    """Copy a file of a pipeline; weights become float32, and the config of a network says so.

    A transformers network is loaded in the precision that its config names, a diffusers network in float32.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        convert_file(path, target, torch.float32)
        return
    shutil.copyfile(path, target)
    if path.name == CONFIG:
        config = read_config(path.parent)
        changed = config | {name: "float32" for name in DTYPE_SETTINGS if name in config}
        if changed != config:
            target.write_text(json.dumps(changed, indent=2) + "\n")
    elif path.name.endswith(index_name("")):  # its metadata are the size in bytes, which changes
        target.write_text(json.dumps(read_json(path) | {"metadata": {}}, indent=2) + "\n")


def _check_network(folder: Path, *wanted: str) -> None:
    """Raise Refused if the folder holds a network of other classes than those wanted, or one with quantized weights."""
    config = read_config(folder)
    classes = config.get("architectures") or [config.get("_class_name")]
    if not {*wanted} & {*map(str, classes)}:
        raise Refused(
            f"{folder} holds a {' '.join(map(str, classes)):.200}, not a {' or '.join(wanted)}; give a pipeline of Stable Diffusion 1.5, 2 or XL"
        )
    if quantized := config.get("quantization_config"):
        raise Refused(
            f"{folder} holds quantized weights (quantization_config: {quantized!r:.100}), which are not read; give the network in float32, "
            "float16 or bfloat16"
        )


def load_frozen(kind: Any, folder: Path, weights: str, device: torch.device, dtype: torch.dtype) -> Any:
    """A frozen network in evaluation mode, in which every weight comes from the files of the folder (`weight_files`)."""
    settings: dict[str, Any] = {"use_safetensors": True, "output_loading_info": True}
    settings["torch_dtype" if weights == VAE_WEIGHTS else "dtype"] = dtype
    network, info = load_from_files(kind, folder, _network_files("", folder, weights), **settings)
    if missing := sorted(map(str, info["missing_keys"])):
        raise Refused(f"{folder} lacks {len(missing)} weights of a {kind.__name__}, {missing[0]} for one")
    return network.to(device).eval().requires_grad_(False)


def load_from_files(kind: Any, folder: Path, files: Mapping[str, Path], **settings: Any) -> Any:
    """Load from these files of a folder, by their names, alone: the libraries look for others too, adapters and pickles among
    them."""
    from safetensors import SafetensorError

    with tempfile.TemporaryDirectory() as clean:
        for name, path in files.items():
            (Path(clean) / name).symlink_to(path.resolve())
        try:
            return kind.from_pretrained(clean, local_files_only=True, **settings)
        except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
            reason = brief(error).replace(clean, str(folder))
            raise Refused(f"{folder} cannot be loaded as a {kind.__name__}: {reason}") from None


@contextmanager
def deterministic_encoding(device: torch.device) -> Iterator[None]:
    """Inside the `with` block, encoding gives the same bits every time.

    On a CPU they depend on the number of threads, so one is used; use more processes to encode faster there.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if device.type == "cpu" else threads)
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True):
            yield
    finally:
        torch.set_num_threads(threads)
