"""Networks that others have published, read as tensors under our names. Nothing of what is read is ever run.

A teacher of EDM is a pickle that carries its own source code. Here it is a description: what it would build is looked
up in a short table of names, an object becomes a record of what was said about it, and the records are then read as
one reads a form. Students of SD and SDXL are files of tensors, and LoRAs that are merged into a base. A whole model in
one file is converted by diffusers. Whatever is left over or does not fit is named and refused.
"""

from __future__ import annotations

import io
import json
import math
import pickle
import pickletools
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dmd2.config import AdmConfig
from dmd2.data.prompts import PLAIN
from dmd2.errors import Refused, brief, near_miss
from dmd2.models.adm import MAX_PERIOD, Adm

# A teacher of EDM.

BUILDING = PLAIN | {"GLOBAL", "STACK_GLOBAL", "REDUCE", "NEWOBJ", "BUILD", "EMPTY_SET", "ADDITEMS"}
"""Instructions of a pickle that make an object from a name; those that reach other registries are not among them."""
PERSISTENT, MODULES = (
    "torch_utils.persistence._reconstruct_persistent_obj",
    "torch.nn.modules.container.ModuleDict",
)
PARAMETER, TENSOR = "torch._utils._rebuild_parameter", "torch._utils._rebuild_tensor_v2"
STORAGE = "torch.storage._load_from_bytes"
NUMPY = ("numpy.dtype", "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")
"""Recorded arguments of constructors are often NumPy's numbers; they are never looked at."""


class Record:
    """What a pickle says about an object: the name of its maker, the arguments, the state. It does nothing."""

    name = ""
    args: tuple[Any, ...]
    state: Any

    def __new__(cls, *args: Any) -> Record:
        record = super().__new__(cls)
        record.args, record.state = args, None
        return record

    def __setstate__(self, state: Any) -> None:
        self.state = state


NAMES: dict[str, type] = {
    name: type("Record", (Record,), {"name": name})
    for name in (PERSISTENT, MODULES, PARAMETER, TENSOR, STORAGE, *NUMPY)
} | {
    "collections.OrderedDict": dict,
    "dnnlib.util.EasyDict": dict,
    "builtins.set": set,
    "__builtin__.set": set,
}
"""The only names that mean something in a pickle, and what is made instead."""


class Form(pickle.Unpickler):
    """Knows the names of the table, and imports nothing."""

    def find_class(self, module: str, name: str) -> type:
        full = f"{module}.{name}"
        if full not in NAMES:
            raise Refused(
                f"it names {full!r:.100}, which no EDM network needs, so nothing of it was run; get the file again from its publisher"
            )
        return NAMES[full]


class Module(NamedTuple):
    """A module of the pickled network."""

    prefix: str
    """Of the names of its tensors: empty, or with a dot at the end."""
    kind: str
    state: dict[str, Any]
    own: dict[str, Tensor]
    """Parameters and buffers."""

    def rules(self) -> dict[str, object]:
        """What the settings must be for the network to be an `Adm`."""
        width = self.state.get("out_channels", 0)
        match self.kind:
            case "EDMPrecond":
                return {"sigma_data": 0.5}
            case "PositionalEmbedding":
                return {"max_positions": MAX_PERIOD, "endpoint": False}
            case "GroupNorm":
                return {"eps": 1e-5, "num_groups": min(32, len(self.own["weight"]) // 4)}
            case "Conv2d":
                return {"fused_resample": False}
            case "UNetBlock":
                heads = width // 64 if "qkv" in self.state["_modules"] else 0
                return {"skip_scale": 1, "adaptive_scale": True, "num_heads": heads}
        return {}


KINDS = (
    "EDMPrecond", "DhariwalUNet", "ModuleDict", "UNetBlock", "PositionalEmbedding", "GroupNorm", "Conv2d", "Linear",
)  # fmt: skip
PARTS = {
    "norm0": "norm_in", "conv0": "conv_in", "affine": "affine", "norm1": "norm_out", "conv1": "conv_out",
    "skip": "skip", "norm2": "attention.norm", "qkv": "attention.qkv", "proj": "attention.project",
}  # fmt: skip
"""Layers of a block: EDM's names and ours."""


def edm_pickle(path: Path) -> tuple[AdmConfig, dict[str, Tensor]]:
    """The class-conditional ADM network of a pickle in the format of NVIDIA's EDM, as
    `edm-imagenet-64x64-cond-adm.pkl`: its size, and the weights of our `Adm` in float32.

    The file must hold an EDMPrecond with sigma_data 0.5 around a DhariwalUNet, under the key `ema`.
    """
    with _named(path), _whole("pickled EDM network"):
        pickled = _form(_there(path))
        if not isinstance(pickled, dict) or "ema" not in pickled:
            raise Refused("it has no key 'ema'; give a network as EDM's training saves it")
        modules = list(_modules(pickled["ema"]))
        for module in modules:
            _check(module)
        return _adm({module.prefix + name: t for module in modules for name, t in module.own.items()})


def edm_student(path: Path) -> tuple[AdmConfig, dict[str, Tensor]]:
    """The same of a student of such a network in a training folder of DMD2's authors, or of its file alone. Names and
    shapes are all that a state dict says, so nothing else can be checked."""
    with _named(path):
        file = _read(_model(path, STUDENT) if path.is_dir() else path)
        with _whole("state dict of an EDM network"):
            return _adm(_bare(file.tensors))


def _adm(tensors: Mapping[str, Tensor]) -> tuple[AdmConfig, dict[str, Tensor]]:
    """From a state dict with EDM's names (`model.enc.64x64_conv.weight`); each weight is used exactly once."""
    theirs = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    theirs.pop("map_augment.weight", None)  # describes augmentation in training; without any it adds zero
    for name in [name for name in theirs if name.endswith("resample_filter")]:
        if not torch.equal(theirs.pop(name).float(), torch.full((1, 1, 2, 2), 0.25)):
            raise Refused(f"{name} is not the mean of 2x2 pixels; only networks that resample so can be read")
    config = _size(theirs)
    names = _our_names(config)
    if unknown := sorted(theirs.keys() - names.keys()):
        raise Refused(
            f"{unknown[0]} has no place in a class-conditional ADM network of this size; only those can be read"
        )
    with torch.device("meta"):
        wanted = {name: tuple(value.shape) for name, value in Adm(config).state_dict().items()}
    state = {names[name]: _our_layout(names[name], tensor) for name, tensor in theirs.items()}
    for theirs_name, name in names.items():
        if name in wanted and (found := tuple(state[name].shape) if name in state else ()) != wanted[name]:
            raise Refused(
                f"{theirs_name} is {f'of shape {found}' if found else 'missing'}, and an ADM network of this size has one of {wanted[name]}; get the file again"
            )
    assert state.keys() == wanted.keys()
    return config, state


def _form(path: Path) -> Any:
    """What the pickle describes, looked through before any of it is followed."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        for instruction, argument, _ in pickletools.genops(stream):
            # A place in the memo far beyond the file's length only serves to use up memory.
            far = "PUT" in instruction.name and isinstance(argument, int) and argument > size
            if instruction.name not in BUILDING or far:
                raise Refused(
                    f"it does more than describe a network ({instruction.name}), so nothing of it was run; get the file again from its publisher"
                )
        stream.seek(0)
        return Form(stream).load()


def _modules(root: object) -> Iterator[Module]:
    """Every module below, each once."""
    rest, seen = [("", root)], set[int]()
    while rest:
        prefix, thing = rest.pop()
        if id(thing) in seen:
            raise Refused(f"{prefix.removesuffix('.')} is in it twice; each part of a network has one place")
        seen.add(id(thing))
        kind, state = _said(thing, prefix)
        own = {**state["_parameters"], **state["_buffers"]}
        yield Module(
            prefix, kind, state, {n: _tensor(value) for n, value in own.items() if value is not None}
        )
        children = [(f"{prefix}{n}.", child) for n, child in state["_modules"].items() if child is not None]
        rest += reversed(children)


def _said(thing: object, prefix: str) -> tuple[str, dict[str, Any]]:
    """The class of a module, by its name, and its state."""
    if isinstance(thing, Record) and thing.name == MODULES:
        return "ModuleDict", thing.state
    if not isinstance(thing, Record) or thing.name != PERSISTENT:
        raise Refused(f"{prefix or 'ema'} is a {type(thing).__name__}, not one of EDM's modules")
    meta = thing.args[0]
    if meta["class_name"] not in KINDS:
        raise Refused(
            f"{prefix.removesuffix('.') or 'ema'} is a {meta['class_name']!r:.60}, and a class-conditional ADM network under EDM's preconditioning consists of {', '.join(KINDS)}; give such a one"
        )
    return meta["class_name"], meta["state"]


def _tensor(value: Any) -> Tensor:
    """The tensor that a record of a tensor or a parameter describes."""
    if value.name == PARAMETER:
        value = value.args[0]
    storage, offset, size, stride = value.args[:4]
    if value.name != TENSOR or storage.name != STORAGE:
        raise Refused(f"a weight is made by {value.name}, not as torch pickles a tensor")
    read = _unpickled(io.BytesIO(storage.args[0]))
    whole = torch.empty(0, dtype=read.dtype).set_(read._untyped_storage)
    return whole.as_strided(size, stride, offset)  # which refuses to reach beyond


def _check(module: Module) -> None:
    found = {name: module.state.get(name) for name in module.rules()}
    for name, wanted in module.rules().items():
        if found[name] != wanted:
            raise Refused(
                f"{module.prefix}{name} is {found[name]!r:.60}, and only networks in which it is {wanted!r} can be read"
            )


def _size(tensors: Mapping[str, Tensor]) -> AdmConfig:
    """The numbers behind the names and shapes; what they say wrong shows when the shapes are compared."""
    for name in ("map_layer0.weight", "map_label.weight"):
        if name not in tensors:
            raise Refused(f"it has no {name}; only class-conditional ADM networks can be read")
    found = [re.fullmatch(r"enc\.(\d+)x\1_block(\d+)\.conv0\.weight", name) for name in tensors]
    blocks = [(int(match[1]), int(match[2])) for match in found if match]
    sides = sorted({side for side, _ in blocks}, reverse=True)
    stem = tensors.get(f"enc.{sides[0]}x{sides[0]}_conv.weight") if sides else None
    if stem is None:
        raise Refused("it has no encoder with a first layer (enc.64x64_conv, enc.64x64_block0, ...)")
    embedding, channels = tensors["map_layer0.weight"].shape
    widths = [len(tensors[f"enc.{side}x{side}_block0.conv0.weight"]) for side in sides]
    try:
        return AdmConfig(
            resolution=sides[0],
            image_channels=stem.shape[1],
            classes=tensors["map_label.weight"].shape[1],
            channels=channels,
            multipliers=tuple(width // channels for width in widths),
            blocks=len([side for side, _ in blocks if side == sides[0]]),
            attention=tuple(side for side in sides if f"enc.{side}x{side}_block0.qkv.weight" in tensors),
            embedding_multiplier=embedding // channels,
        )
    except ValueError as error:
        raise Refused(f"it is of a size that our network cannot have: {brief(error)}") from None


def _our_names(config: AdmConfig) -> dict[str, str]:
    """EDM's name of each weight the network may have, and ours."""
    side = config.resolution
    layers = {
        "map_layer0": "time_in", "map_layer1": "time_out", "map_label": "label",
        f"enc.{side}x{side}_conv": "stem", "out_norm": "norm", "out_conv": "out",
    }  # fmt: skip
    for block, ours in _blocks(config):
        layers |= {f"{block}.{part}": f"{ours}.{name}" for part, name in PARTS.items()}
    names = {
        f"{theirs}.{leaf}": f"{ours}.{leaf}" for theirs, ours in layers.items() for leaf in ("weight", "bias")
    }
    del names["map_label.bias"]
    return names


def _blocks(config: AdmConfig) -> Iterator[tuple[str, str]]:
    """EDM's name of each block and ours; theirs are named by side and number, ours are lists in the same order."""
    sides = [config.resolution >> depth for depth in range(len(config.multipliers))]
    encoder = [[f"block{i}" for i in range(config.blocks)] for _ in sides]
    decoder = [["up"] + [f"block{i}" for i in range(config.blocks + 1)] for _ in sides]
    for names in encoder[1:]:
        names.insert(0, "down")
    decoder[-1].remove("up")
    down = [f"enc.{side}x{side}_{name}" for side, names in zip(sides, encoder, strict=True) for name in names]
    pairs = reversed(list(zip(sides, decoder, strict=True)))
    up = [f"dec.{side}x{side}_{name}" for side, names in pairs for name in names]
    yield from ((name, f"encoder.{index}") for index, name in enumerate(down))
    yield from ((f"dec.{sides[-1]}x{sides[-1]}_in{index}", f"middle.{index}") for index in range(2))
    yield from ((name, f"decoder.{index}") for index, name in enumerate(up))


def _our_layout(name: str, tensor: Tensor) -> Tensor:
    """In float32; the channels of queries, keys and values, (head, channel, which) in EDM, as (which, head, channel),
    and the matrix that takes a one-hot label, (width, classes), as a table of (classes, width)."""
    if ".qkv." in name and len(tensor) % 3 == 0:
        tensor = tensor.unflatten(0, (-1, 3)).transpose(0, 1).flatten(0, 1)
    return (tensor.T if name == "label.weight" else tensor).float().contiguous()


# Students of SD and SDXL.

STUDENT, GUIDANCE = ("pytorch_model.bin", "model.safetensors"), ("pytorch_model_1.bin", "model_1.safetensors")
"""Models 0 and 1 of a training folder, as accelerate saves them."""
WRAPPED = ("module.", "feedforward_model.")
"""Prefixes that training leaves on the names of a student."""
CRITIC = "fake_unet."
UNET = ("conv_in.weight", "conv_out.weight", "time_embedding.linear_1.weight")
"""What every UNet of SD and SDXL has in diffusers' naming."""
LORA = re.compile(r"(.+?)[._]lora[._](down|up|A|B)(?:\.\w+)?\.weight")
"""Kohya's, diffusers' older and peft's names of the two factors; peft's may carry the name of the adapter."""
RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
EDGES = {
    "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
}  # fmt: skip
"""Layers of a UNet: diffusers' names and those of the first code for it (SGM's)."""


class File(NamedTuple):
    tensors: dict[str, Tensor]
    notes: dict[str, str]
    """What the file says about itself."""


def unet_weights(path: Path, base: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Weights of a diffusers UNet of SD or SDXL, in the precision they have in the file.

    Args:
        path: All weights (.safetensors; .bin, .pt or .pth, of which only tensors are read), a LoRA in kohya's or
            diffusers' naming, or a training folder of DMD2's authors, whose student is read.
        base: The UNet a LoRA is merged into; the others must agree with it in names and shapes, if it is given.
    """
    with _named(path):
        file = _read(_model(path, STUDENT) if path.is_dir() else path)
        if any(".base_layer." in name for name in file.tensors):
            raise Refused(
                "it is a UNet with a LoRA beside its weights, and does not say the LoRA's alpha; give the LoRA's own file, or merge it first"
            )
        if any(LORA.fullmatch(name) for name in file.tensors):
            with _whole("LoRA"):
                return _merged(file, base, path)
        return _unet(_bare(file.tensors), base)


def critic_weights(path: Path) -> dict[str, Tensor] | None:
    """Weights of the critic in a training folder of DMD2's authors, without the head; None if there is none."""
    if not any((path / name).is_file() for name in GUIDANCE):
        return None
    with _named(path):
        tensors = _bare(_read(_model(path, GUIDANCE)).tensors)
        return _unet({n.removeprefix(CRITIC): t for n, t in tensors.items() if n.startswith(CRITIC)})


def _model(folder: Path, names: Iterable[str]) -> Path:
    found = next((folder / name for name in names if (folder / name).is_file()), None)
    if found is None:
        raise Refused(
            f"it is a folder without {' or '.join(names)}; give a training folder, or a file of weights"
        )
    return found


def _read(path: Path) -> File:
    """All tensors of a file, left on the disk until they are used."""
    if _there(path).suffix not in READERS:
        raise Refused(
            f"it is no file of weights by its suffix {path.suffix!r}: {near_miss(path.suffix, list(READERS))}"
        )
    with _whole(f"file of tensors ({path.name})"):
        file = READERS[path.suffix](path)
    if not file.tensors:
        raise Refused("it holds no tensors; give a file of weights")
    for name, value in file.tensors.items():
        if not isinstance(value, Tensor):
            raise Refused(
                f"{name!r:.100} is a {type(value).__name__}, not a tensor; save the weights alone, by their names"
            )
    return file


def _safetensors(path: Path) -> File:
    with safe_open(path, "pt") as file:
        return File({name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {})  # noqa: SIM118


def _pickled(path: Path) -> File:
    found = _unpickled(path, mmap=zipfile.is_zipfile(path))
    if not isinstance(found, dict):
        raise Refused(
            f"it holds a {type(found).__name__}, not a dict of tensors; save the weights by their names"
        )
    return File({str(name): value for name, value in found.items()}, {})


def _unpickled(source: Path | io.BytesIO, mmap: bool = False) -> Any:
    """What torch reads of a pickle that holds nothing but tensors."""
    try:
        return torch.load(source, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        name = re.search(r"GLOBAL (\S+)", str(error))
        raise Refused(
            f"it is a pickle that does more than hold tensors ({f'it names {name[1]:.100}' if name else 'or is broken'}), so nothing of it was run; convert it to safetensors where you trust it"
        ) from None


READERS = {".safetensors": _safetensors} | dict.fromkeys((".bin", ".pt", ".pth"), _pickled)


def _bare(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the prefixes that all names share."""
    for prefix in WRAPPED * 2:  # in any order
        if all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return tensors


def _unet(tensors: dict[str, Tensor], base: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The tensors, if they are a UNet's and agree with the base."""
    if missing := [name for name in UNET if name not in tensors]:
        whole = any(name.startswith("model.diffusion_model.") for name in tensors)
        advice = (
            "it is a whole model in one file: import it as that"
            if whole
            else "give a UNet in diffusers' naming"
        )
        raise Refused(
            f"it holds no UNet: it has no {missing[0]} ({', '.join(list(tensors)[:1]) or 'nothing':.100} for one); {advice}"
        )
    if base is not None:
        _agree(tensors, base)
    return tensors


def _agree(tensors: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> None:
    for name in sorted(tensors.keys() | base.keys()):
        found, wanted = (tuple(part[name].shape) if name in part else "missing" for part in (tensors, base))
        if found != wanted:
            raise Refused(f"{name} is {found}, and {wanted} in the base; give the base it was made from")


def _merged(file: File, base: Mapping[str, Tensor] | None, path: Path) -> dict[str, Tensor]:
    """The base with weight + alpha / rank * up @ down in place of each weight that the LoRA knows."""
    if base is None:
        raise Refused("it is a LoRA, which changes a network and is none; give the base it was made from")
    default, names = _alpha(file, path), lora_names(base)
    factors: dict[str, dict[str, Tensor]] = {}
    for key, tensor in file.tensors.items():
        module, part = _part(key)
        weight = names.get(module)
        if not part or weight is None:
            raise Refused(
                f"{key!r:.150} of the LoRA fits no weight of the base; give a LoRA of this UNet alone, and the base it was made from"
            )
        if part in factors.setdefault(weight, {}):
            raise Refused(f"{key!r:.150} of the LoRA is there a second time, under another name")
        factors[weight][part] = tensor
    return dict(base) | {
        weight: _sum(weight, base[weight], parts, default) for weight, parts in factors.items()
    }


def _sum(name: str, weight: Tensor, parts: Mapping[str, Tensor], default: float | None) -> Tensor:
    """weight (out, in, ...) + alpha / rank * up (out, rank) @ down (rank, in, ...), in float32, for its rounding, and
    back. Without any alpha it is the rank, which is how diffusers and kohya's code read it too."""
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


def _alpha(file: File, path: Path) -> float | None:
    """The alpha of all factors, if diffusers or peft has written it down beside them."""
    config = path.with_name("adapter_config.json")
    text = file.notes.get("lora_adapter_metadata")
    if text is None and path.stem == "adapter_model":
        if not config.is_file():
            raise Refused(
                f"it is a LoRA of peft without the {config.name} that says its alpha; put it beside it"
            )
        text = config.read_text()
    try:
        said = json.loads(text or "{}")
        settings = {name.removeprefix("unet."): value for name, value in said.items()}
    except (ValueError, AttributeError):
        raise Refused("it is a LoRA whose settings are not a JSON object; get the file again") from None
    for name in ("use_dora", "use_rslora", "alpha_pattern", "fan_in_fan_out"):
        if settings.get(name):
            raise Refused(
                f"it is a LoRA with {name} = {settings[name]!r:.60}, which is not supported; merge it first"
            )
    return float(settings["lora_alpha"]) if "lora_alpha" in settings else None


def _part(key: str) -> tuple[str, str]:
    """The layer that a key of a LoRA names, and which it is of "down", "up" and "alpha"; "" if none of them."""
    if match := LORA.fullmatch(key):
        return _plain(match[1]), {"A": "down", "B": "up"}.get(match[2], match[2])
    return _plain(key.removesuffix(".alpha")), "alpha" if key.endswith(".alpha") else ""


def _plain(module: str) -> str:
    """The name of a LoRA's module without what the formats put around it."""
    module = module.removeprefix("base_model.model.").removeprefix("unet.")
    if ".processor." in module:  # how diffusers named them before it used peft
        module = module.replace(".processor.", ".")
        module += ".0" if module.endswith(".to_out") else ""
    return module


def lora_names(base: Iterable[str]) -> dict[str, str]:
    """Names that a LoRA may have for the layers of a UNet -> names of their weights. Kohya's put `_` for `.`, so they
    are made from the names that there are, never taken apart."""
    names: dict[str, str] = {}
    for module, sgm in sgm_names(base).items():
        weight = f"{module}.weight"
        for name in {module, *(f"lora_unet_{known.replace('.', '_')}" for known in (module, sgm))}:
            if names.setdefault(name, weight) != weight:
                raise Refused(f"{weight} and {names[name]} of the base are both {name} in a LoRA")
    return names


def sgm_names(base: Iterable[str]) -> dict[str, str]:
    """Layers that have a weight in a UNet of diffusers -> their names in the code of SGM and CompVis."""
    modules = [name.removesuffix(".weight") for name in base if name.endswith(".weight")]
    layers = 1 + max(
        [int(m[1]) for name in modules if (m := re.match(r"down_blocks\.0\.resnets\.(\d+)", name))] or [0]
    )
    attending = {match[1] for name in modules if (match := re.match(r"up_blocks\.(\d+)\.attentions", name))}
    return {module: _sgm(module, layers, attending) for module in modules}


def _sgm(module: str, layers: int, attending: set[str]) -> str:
    """SGM counts a block's layers and its resampling through; a layer is (resnet, attention, upsampling)."""
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


# A whole model in one file.

PIPELINES = {
    "conditioner.embedders.1.": "StableDiffusionXLPipeline",
    "cond_stage_model.transformer.": "StableDiffusionPipeline",
}
"""By what only they have."""
COMPONENTS = {
    "model.diffusion_model.": "unet", "first_stage_model.encoder.": "vae", "first_stage_model.decoder.": "vae",
    "first_stage_model.quant_conv.": "vae", "first_stage_model.post_quant_conv.": "vae",
    "cond_stage_model.transformer.": "text_encoder", "conditioner.embedders.0.transformer.": "text_encoder",
    "conditioner.embedders.1.model.": "text_encoder_2",
}  # fmt: skip
LEFT_OUT = ("position_ids", "logit_scale")
"""Values of CLIP that are no weights of a text encoder."""
LIBRARIES = ("diffusers", "transformers", "stable_diffusion", None)


def single_file(path: Path, config: Path | None, out: Path) -> None:
    """Write a checkpoint of SD1.5 or SDXL in one file, in the layout of CompVis or SGM, as a folder of diffusers.

    Every weight of the file's networks is in the folder, and every weight of the folder's is from the file; they keep
    their precision if it is one, and become float32 if there are several.

    Args:
        path: A .safetensors file.
        config: A local folder of a diffusers pipeline of the same kind, whose configs, tokenizers and scheduler are
            used; None takes them from the hub.
        out: The folder.
    """
    with _named(path):
        shapes, dtype = _header(path)
        kind = _pipeline(shapes)
        if config is not None:
            _check_config(config, kind)
        pipeline = _converted(path, config, kind, dtype)
        _check_complete(pipeline, shapes)
        pipeline.save_pretrained(out)


def _converted(path: Path, config: Path | None, kind: str, dtype: torch.dtype) -> Any:
    """By diffusers, without its warnings: what they are about is checked afterwards."""
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


def _header(path: Path) -> tuple[dict[str, list[int]], torch.dtype]:
    """Names and shapes, and the precision if there is one, else float32."""
    if _there(path).suffix != ".safetensors":
        raise Refused(
            f"it is no .safetensors file but {path.suffix!r}, and a pickle (.ckpt) can run code: convert it to safetensors where you trust it"
        )
    with _whole("safetensors file"), safe_open(path, "pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        used = [part for name, part in slices.items() if _component(name)]
        kinds = {part.get_dtype() for part in used} & {"F16", "BF16", "F32", "F64"}
        one = {"F16": torch.float16, "BF16": torch.bfloat16}.get(*kinds) if len(kinds) == 1 else None
        return {name: part.get_shape() for name, part in slices.items()}, one or torch.float32


def _component(name: str) -> str | None:
    """The component of a pipeline that a weight is for."""
    found = next((part for prefix, part in COMPONENTS.items() if name.startswith(prefix)), None)
    return None if name.endswith(LEFT_OUT) else found


def _pipeline(shapes: Mapping[str, list[int]]) -> str:
    kind = next((k for prefix, k in PIPELINES.items() if any(n.startswith(prefix) for n in shapes)), None)
    if kind is None or not any(name.startswith("model.diffusion_model.") for name in shapes):
        raise Refused(
            f"it is no whole model of SD1.5 or SDXL in one file ({next(iter(shapes), 'nothing')!r:.100} for one); give a UNet or a LoRA as that"
        )
    return kind


def _check_config(folder: Path, kind: str) -> None:
    """diffusers imports what a folder names, so it may name only its own classes and those of transformers."""
    try:
        index = json.loads((folder / "model_index.json").read_text())
        parts = {name: part for name, part in index.items() if isinstance(part, list)}
    except (OSError, ValueError, AttributeError):
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
    """diffusers leaves out what it does not know, and leaves empty what it does not find."""
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


def _there(path: Path) -> Path:
    if not path.is_file():
        raise Refused("it does not exist, or is no file; check the path")
    return path


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Say which file it was."""
    try:
        yield
    except Refused as error:
        raise Refused(f"{path}: {error}") from None


@contextmanager
def _whole(what: str) -> Iterator[None]:
    """Whatever goes wrong inside lies in a file that is broken or something else."""
    try:
        yield
    except (Refused, FileNotFoundError, PermissionError):
        raise
    except (Exception, SafetensorError) as error:  # a broken pickle raises anything
        raise Refused(f"it is no {what}, or not all of it ({brief(error)}); copy it again") from None
