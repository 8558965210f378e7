"""Networks of NVIDIA's EDM, converted to the state dict of our `Adm`. Nothing in the files is executed.

A teacher of EDM is a pickle that contains its own source code. Here the pickle is read as data: every name in it is looked up
in a short table, every object becomes a `PickledObject` that records its class name, arguments and state, and the network's
settings and tensors are read from these records. Anything unknown is refused by name.
"""

from __future__ import annotations

import io
import pickle
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dmd2.config import AdmConfig
from dmd2.data.prompts import PLAIN_OPCODES, forbidden_opcode
from dmd2.errors import Refused, brief
from dmd2.models.adm import MAX_PERIOD, Adm
from dmd2.models.convert.student_weights import (
    STUDENT,
    critic_tensors,
    find_model_file,
    strip_wrapper_prefixes,
)
from dmd2.models.convert.tensor_files import (
    name_file_in_errors,
    read_tensor_file,
    refuse_broken_file,
    require_file,
    unpickle_tensors,
)

BUILDING = PLAIN_OPCODES | {"GLOBAL", "STACK_GLOBAL", "REDUCE", "NEWOBJ", "BUILD", "EMPTY_SET", "ADDITEMS"}
"""Pickle instructions that are allowed: plain data, and making an object from a name; none that use other registries."""
PERSISTENT, MODULES = (
    "torch_utils.persistence._reconstruct_persistent_obj",
    "torch.nn.modules.container.ModuleDict",
)
PARAMETER, TENSOR = "torch._utils._rebuild_parameter", "torch._utils._rebuild_tensor_v2"
STORAGE = "torch.storage._load_from_bytes"
NUMPY = ("numpy.dtype", "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")
"""Recorded arguments of constructors are often NumPy numbers; they are not used."""


class PickledObject:
    """A pickled object as data: the name of the callable that would make it, its arguments, and its state."""

    name = ""
    args: tuple[Any, ...]
    state: Any

    def __new__(cls, *args: Any) -> PickledObject:
        record = super().__new__(cls)
        record.args, record.state = args, None
        return record

    def __setstate__(self, state: Any) -> None:
        self.state = state


NAMES: dict[str, type] = {
    name: type("PickledObject", (PickledObject,), {"name": name})
    for name in (PERSISTENT, MODULES, PARAMETER, TENSOR, STORAGE, *NUMPY)
} | {
    "collections.OrderedDict": dict,
    "dnnlib.util.EasyDict": dict,
    "builtins.set": set,
    "__builtin__.set": set,
}
"""The only names that a pickle may contain -> what is made instead."""


class RecordingUnpickler(pickle.Unpickler):
    """Resolves names by the table `NAMES` and imports nothing."""

    def find_class(self, module: str, name: str) -> type:
        full = f"{module}.{name}"
        if full not in NAMES:
            raise Refused(
                f"it names {full!r:.100}, which no EDM network needs, so nothing of it was run; get the file again from its publisher"
            )
        return NAMES[full]


class PickledModule(NamedTuple):
    """One module of the pickled network."""

    prefix: str
    """Prefix of the names of its tensors: empty, or ending with a dot."""
    kind: str
    """Name of its class, one of `KINDS`."""
    state: dict[str, Any]
    """Its attributes."""
    own: dict[str, Tensor]
    """Its own parameters and buffers, without those of its children."""

    def required_settings(self) -> dict[str, object]:
        """Attribute -> value that the module must have to compute the same function as our `Adm`."""
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
BLOCK_LAYERS = {
    "norm0": "norm_in", "conv0": "conv_in", "affine": "affine", "norm1": "norm_out", "conv1": "conv_out",
    "skip": "skip", "norm2": "attention.norm", "qkv": "attention.qkv", "proj": "attention.project",
}  # fmt: skip
"""EDM's name of each layer of a block -> ours."""


def read_edm_pickle(path: Path) -> tuple[AdmConfig, dict[str, Tensor]]:
    """Read a class-conditional ADM network from a pickle in NVIDIA's format, such as `edm-imagenet-64x64-cond-adm.pkl`.

    Returns its size, and the state dict of our `Adm` in float32.

    The file must hold an EDMPrecond with sigma_data 0.5 around a DhariwalUNet, under the key `ema`.
    """
    with name_file_in_errors(path), refuse_broken_file("pickled EDM network"):
        pickled = _read_pickle(require_file(path))
        if not isinstance(pickled, dict) or "ema" not in pickled:
            raise Refused("it has no key 'ema'; give a network as EDM's training saves it")
        modules = list(_modules(pickled["ema"]))
        for module in modules:
            _check_settings(module)
        return from_edm_state_dict(
            {module.prefix + name: t for module in modules for name, t in module.own.items()}
        )


def read_edm_student(path: Path) -> tuple[AdmConfig, dict[str, Tensor]]:
    """The size and weights of a student of such a network, from a training folder of the DMD2 reference code or its file alone.

    A state dict consists of names and tensors, so the settings of its modules cannot be checked.
    """
    with name_file_in_errors(path):
        file = read_tensor_file(find_model_file(path, STUDENT) if path.is_dir() else path)
        with refuse_broken_file("state dict of an EDM network"):
            return from_edm_state_dict(strip_wrapper_prefixes(file.tensors))


def read_edm_critic(path: Path) -> tuple[AdmConfig, dict[str, Tensor]] | None:
    """The same of the critic of a training folder; None if it has none."""
    with name_file_in_errors(path):
        tensors = critic_tensors(path)
        with refuse_broken_file("state dict of an EDM network"):
            return None if tensors is None else from_edm_state_dict(tensors)


def from_edm_state_dict(tensors: Mapping[str, Tensor]) -> tuple[AdmConfig, dict[str, Tensor]]:
    """Convert a state dict with EDM's names (`model.enc.64x64_conv.weight`). Every weight must be used exactly once."""
    theirs = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    theirs.pop("map_augment.weight", None)  # describes augmentation in training; without any it adds zero
    for name in [name for name in theirs if name.endswith("resample_filter")]:
        if not torch.equal(theirs.pop(name).float(), torch.full((1, 1, 2, 2), 0.25)):
            raise Refused(f"{name} is not the mean of 2x2 pixels; only networks that resample so can be read")
    config = _infer_config(theirs)
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


def _read_pickle(path: Path) -> Any:
    """The records of a pickle; its instructions are checked before the first of them is followed."""
    with path.open("rb") as stream:
        if forbidden := forbidden_opcode(stream, BUILDING):
            raise Refused(
                f"it does more than describe a network ({forbidden}), so nothing of it was run; get the file again from its publisher"
            )
        stream.seek(0)
        return RecordingUnpickler(stream).load()


def _modules(root: object) -> Iterator[PickledModule]:
    """All modules of a pickled network, depth first. A module that occurs twice is refused."""
    rest, seen = [("", root)], set[int]()
    while rest:
        prefix, thing = rest.pop()
        if id(thing) in seen:
            raise Refused(f"{prefix.removesuffix('.')} is in it twice; each part of a network has one place")
        seen.add(id(thing))
        kind, state = _class_and_state(thing, prefix)
        own = {**state["_parameters"], **state["_buffers"]}
        yield PickledModule(
            prefix, kind, state, {n: _rebuild_tensor(value) for n, value in own.items() if value is not None}
        )
        children = [(f"{prefix}{n}.", child) for n, child in state["_modules"].items() if child is not None]
        rest += reversed(children)


def _class_and_state(thing: object, prefix: str) -> tuple[str, dict[str, Any]]:
    """The class name of a module and its state."""
    if isinstance(thing, PickledObject) and thing.name == MODULES:
        return "ModuleDict", thing.state
    if not isinstance(thing, PickledObject) or thing.name != PERSISTENT:
        raise Refused(f"{prefix or 'ema'} is a {type(thing).__name__}, not one of EDM's modules")
    meta = thing.args[0]
    if meta["class_name"] not in KINDS:
        raise Refused(
            f"{prefix.removesuffix('.') or 'ema'} is a {meta['class_name']!r:.60}, and a class-conditional ADM network under EDM's preconditioning consists of {', '.join(KINDS)}; give such a one"
        )
    return meta["class_name"], meta["state"]


def _rebuild_tensor(value: Any) -> Tensor:
    """The tensor that the record of a tensor or a parameter describes."""
    if value.name == PARAMETER:
        value = value.args[0]
    storage, offset, size, stride = value.args[:4]
    if value.name != TENSOR or storage.name != STORAGE:
        raise Refused(f"a weight is made by {value.name}, not as torch pickles a tensor")
    read = unpickle_tensors(io.BytesIO(storage.args[0]))
    whole = torch.empty(0, dtype=read.dtype).set_(read._untyped_storage)
    return whole.as_strided(size, stride, offset)  # raises if it would reach beyond the storage


def _check_settings(module: PickledModule) -> None:
    """Raise Refused if a setting of the module is not as in `required_settings`."""
    found = {name: module.state.get(name) for name in module.required_settings()}
    for name, wanted in module.required_settings().items():
        if found[name] != wanted:
            raise Refused(
                f"{module.prefix}{name} is {found[name]!r:.60}, and only networks in which it is {wanted!r} can be read"
            )


def _infer_config(tensors: Mapping[str, Tensor]) -> AdmConfig:
    """The size of the network, from names and shapes. `from_edm_state_dict` compares all shapes with that size afterwards."""
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
    """EDM's name of each weight that a network of this size may have -> ours."""
    side = config.resolution
    layers = {
        "map_layer0": "time_in", "map_layer1": "time_out", "map_label": "label",
        f"enc.{side}x{side}_conv": "stem", "out_norm": "norm", "out_conv": "out",
    }  # fmt: skip
    for block, ours in _blocks(config):
        layers |= {f"{block}.{part}": f"{ours}.{name}" for part, name in BLOCK_LAYERS.items()}
    names = {
        f"{theirs}.{leaf}": f"{ours}.{leaf}" for theirs, ours in layers.items() for leaf in ("weight", "bias")
    }
    del names["map_label.bias"]
    return names


def _blocks(config: AdmConfig) -> Iterator[tuple[str, str]]:
    """(EDM's name, our name) of each block. EDM names them by resolution and number; ours are lists in the same order."""
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
    """A weight in the layout of our `Adm`, in float32.

    The rows of qkv are ordered (head, channel, q/k/v) in EDM and (q/k/v, head, channel) here. The label matrix (width, classes),
    which EDM multiplies with a one-hot vector, is an embedding table (classes, width) here.
    """
    if ".qkv." in name and len(tensor) % 3 == 0:
        tensor = tensor.unflatten(0, (-1, 3)).transpose(0, 1).flatten(0, 1)
    return (tensor.T if name == "label.weight" else tensor).float().contiguous()
