"""The files that hold the weights of one network in a folder of diffusers: safetensors, under one of several names.

A network lies in one file of a fixed name, or in several files with an index that names them. Either may be a variant, with
`fp16` or `bf16` in its name. The first that is there is read: no variant before a variant, a single file before an index.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from dmd2.errors import Refused
from dmd2.io.artifact import check_file_name
from dmd2.io.tensors import load_tensors

VARIANTS = ("", "fp16", "bf16")
MAX_INDEX_BYTES, MAX_FILES = 2**24, 1000
"""The index of SDXL's U-Net has 150 kB, and names two files."""
PICKLES = (".bin", ".ckpt", ".pt", ".pth")


def weight_files(folder: Path, name: str) -> dict[str, Path]:
    """The files of a network's weights, by the names that they have where no variant is asked for.

    Args:
        name: The name of a single file, such as `model.safetensors`.

    Raises:
        Refused: There are none, or an index is broken or lists files that are not there.
    """
    for variant in VARIANTS:
        if (single := folder / _single_name(name, variant)).is_file():
            return {name: single}
        if (index := folder / index_name(name, variant)).is_file():
            return {index_name(name): index} | {member: folder / member for member in _members(index)}
    raise Refused(_why_missing(folder, name))


def has_weights(folder: Path, name: str) -> bool:
    """Whether there are such files, whole or not."""
    names = [made(name, variant) for variant in VARIANTS for made in (index_name, _single_name)]
    return any((folder / name).is_file() for name in names)


def candidates(folder: Path, name: str) -> Iterator[list[str]]:
    """The names that the weights may have, in the order in which they are looked for; an index counts if it is in the folder."""
    for variant in VARIANTS:
        yield [_single_name(name, variant)]
        if (index := folder / index_name(name, variant)).is_file():
            yield _listed_names(index)


def index_name(name: str, variant: str = "") -> str:
    return f"{name}.index.{variant}.json" if variant else f"{name}.index.json"


def load_weights(folder: Path, name: str) -> dict[str, Tensor]:
    """All tensors of a network's files, on the CPU; refused if one is in two files."""
    tensors: dict[str, Tensor] = {}
    for path in weight_files(folder, name).values():
        found = load_tensors(path) if path.suffix == ".safetensors" else {}
        if twice := sorted(tensors.keys() & found.keys()):
            raise Refused(
                f"{twice[0]!r:.150} is in {path} and in another file of {folder}; get the folder again"
            )
        tensors |= found
    return tensors


def _single_name(name: str, variant: str) -> str:
    return f"{name.removesuffix('.safetensors')}.{variant}.safetensors" if variant else name


def _members(index: Path) -> list[str]:
    """The files that an index lists, which must be there."""
    names = _listed_names(index)
    if missing := [name for name in names if not (index.parent / name).is_file()]:
        raise Refused(f"{index} lists {missing[0]}, which is not there; get the folder again")
    return names


def _listed_names(index: Path) -> list[str]:
    """The names of files in an index, each once; refused unless they are those of safetensors files in its folder."""
    if (size := index.stat().st_size) > MAX_INDEX_BYTES:
        raise Refused(
            f"{index} has {size} bytes, and an index of weights at most {MAX_INDEX_BYTES}; get the folder again"
        )
    try:
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        for name in names:
            check_file_name(name)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise Refused(
            f"{index} is no index of weights (weight_map: name of a tensor -> file); get the folder again"
        ) from None
    if wrong := [name for name in names if "/" in name or not name.endswith(".safetensors")]:
        raise Refused(f"{index} lists {wrong[0]!r:.100}, which is no safetensors file beside it")
    if not 0 < len(names) <= MAX_FILES:
        raise Refused(f"{index} lists {len(names)} files; a network has 1 to {MAX_FILES}")
    return names


def _why_missing(folder: Path, name: str) -> str:
    there = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    if other := [file for file in there if file.endswith(".safetensors")]:
        return f"{folder} has {other[0]} and no {name}; rename it if it holds the weights of this network"
    if pickles := [file for file in there if file.endswith(PICKLES)]:
        return f"{folder} has its weights in {pickles[0]}, a pickle, which can run code and is not read; convert them to safetensors ({name})"
    return (
        f"{folder} has no {name}, neither as several files with an index nor as a variant ({', '.join(VARIANTS[1:])}); "
        "get the folder again; weights in other formats than safetensors are not read"
    )
