"""Imports: the same function as the network that was published, every weight used, and nothing of a file is run."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import diffusers as library
import numpy as np
import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from diffusers.loaders import single_file_utils
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dmd2 import recipes
from dmd2.batch import Conditioning
from dmd2.config import LoraConfig
from dmd2.denoiser import Denoiser
from dmd2.diffusion import Diffusion, edm_preconditioning, karras_schedule
from dmd2.models.adm import Adm
from dmd2.models.convert.edm_pickle import (
    RecordingUnpickler,
    from_edm_state_dict,
    read_edm_pickle,
    read_edm_student,
)
from dmd2.models.convert.lora_names import sgm_names
from dmd2.models.convert.single_file import convert_single_file
from dmd2.models.convert.student_weights import read_critic, read_unet

Refusal = Callable[[Callable[[], object]], str]
Weights = dict[str, Tensor]
diffusers: Any = library  # it is not typed


# A network of EDM: Karras et al. 2022, appendix F.1, with the names and layouts of its public weights.


class Persistent(nn.Module):
    """Is pickled as the program that it is part of, in source code, and its state."""

    source = ""
    _init_args: tuple[Any, ...]

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        made = super().__new__(cls)
        object.__setattr__(made, "_init_args", args)
        object.__setattr__(made, "_init_kwargs", kwargs)
        return made

    def __reduce__(self) -> Any:
        meta = {"type": "class", "version": 6, "module_src": self.source, "class_name": type(self).__name__}
        return _reconstruct_persistent_obj, (meta | {"state": dict(self.__dict__)},)


def _reconstruct_persistent_obj(meta: dict[str, Any]) -> object:
    raise AssertionError("unpickled by the real function, which would run the source")


class Linear(Persistent):
    def __init__(self, inputs: int, outputs: int, bias: bool = True, init_weight: object = 1) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs) / inputs**0.5)
        self.bias = nn.Parameter(torch.randn(outputs) / 10) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class Conv2d(Persistent):
    """Resamples by a box filter first; without a kernel that is all."""

    resample_filter: Tensor

    def __init__(self, inputs: int, outputs: int, kernel: int, how: str = "", **init: object) -> None:
        super().__init__()
        self.in_channels, self.out_channels, self.fused_resample = inputs, outputs, False
        self.up, self.down = how == "up", how == "down"
        size = (outputs, inputs, kernel, kernel)
        self.weight = nn.Parameter(torch.randn(size) / (inputs * kernel**2) ** 0.5) if kernel else None
        self.bias = nn.Parameter(torch.randn(outputs) / 10) if kernel else None
        self.register_buffer("resample_filter", torch.full((1, 1, 2, 2), 0.25) if how else None)

    def forward(self, x: Tensor) -> Tensor:
        if self.up:
            x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
        if self.down:
            x = F.conv2d(x, self.resample_filter.repeat(len(x[0]), 1, 1, 1), stride=2, groups=len(x[0]))
        if self.weight is None:
            return x
        return F.conv2d(x, self.weight, self.bias, padding=self.weight.shape[-1] // 2)


class GroupNorm(Persistent):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.num_groups, self.eps = min(32, channels // 4), 1e-5
        self.weight = nn.Parameter(1 + torch.randn(channels) / 10)
        self.bias = nn.Parameter(torch.randn(channels) / 10)

    def forward(self, x: Tensor) -> Tensor:
        return F.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)


class UNetBlock(Persistent):
    def __init__(
        self, inputs: int, outputs: int, embedding: int, attention: bool = False, how: str = ""
    ) -> None:
        super().__init__()
        init = {"init_weight": np.sqrt(1 / 3)}  # NumPy's numbers are among the recorded arguments
        self.in_channels, self.out_channels, self.skip_scale, self.adaptive_scale = inputs, outputs, 1, True
        self.num_heads = outputs // 64 if attention else 0
        self.norm0, self.norm1 = GroupNorm(inputs), GroupNorm(outputs)
        self.conv0, self.conv1 = Conv2d(inputs, outputs, 3, how, **init), Conv2d(outputs, outputs, 3)
        self.affine = Linear(embedding, 2 * outputs)
        self.skip = Conv2d(inputs, outputs, int(inputs != outputs), how) if how or inputs != outputs else None
        if self.num_heads:
            self.norm2, self.qkv = GroupNorm(outputs), Conv2d(outputs, 3 * outputs, 1)
            self.proj = Conv2d(outputs, outputs, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        scale, shift = self.affine(embedding)[..., None, None].chunk(2, 1)
        h = self.norm1(self.conv0(F.silu(self.norm0(x)))) * (1 + scale) + shift
        x = (self.skip(x) if self.skip else x) + self.conv1(F.silu(h))
        if not self.num_heads:
            return x
        each = x.shape[1] // self.num_heads
        q, k, v = self.qkv(self.norm2(x)).reshape(len(x) * self.num_heads, each, 3, -1).unbind(2)
        weights = (q.transpose(1, 2) @ k / each**0.5).softmax(-1)  # (query, key)
        return x + self.proj((v @ weights.transpose(1, 2)).reshape(x.shape))


class PositionalEmbedding(Persistent):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_channels, self.max_positions, self.endpoint = width, 10000, False

    def forward(self, time: Tensor) -> Tensor:
        half = self.num_channels // 2
        phase = time[:, None] * self.max_positions ** (-torch.arange(half) / half)
        return torch.cat([phase.cos(), phase.sin()], 1)


class DhariwalUNet(Persistent):
    def __init__(
        self, side: int, colours: int, classes: int, width: int, mult: tuple[int, ...], blocks: int,
        attention: tuple[int, ...], augment: int,
    ) -> None:  # fmt: skip
        super().__init__()
        deep = width * 4
        self.map_noise = PositionalEmbedding(width)
        self.map_augment = Linear(augment, width, bias=False) if augment else None
        self.map_layer0, self.map_layer1 = Linear(width, deep), Linear(deep, deep)
        self.map_label = Linear(classes, deep, bias=False) if classes else None
        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        h = width * mult[0]
        self.enc[f"{side}x{side}_conv"] = Conv2d(colours, h, 3)
        skips = [h]
        for depth, times in enumerate(mult):
            at = f"{side >> depth}x{side >> depth}"
            if depth:
                self.enc[f"{at}_down"] = UNetBlock(h, h, deep, how="down")
                skips.append(h)
            for index in range(blocks):
                self.enc[f"{at}_block{index}"] = UNetBlock(h, width * times, deep, side >> depth in attention)
                h = width * times
                skips.append(h)
        self.dec[f"{at}_in0"], self.dec[f"{at}_in1"] = UNetBlock(h, h, deep, True), UNetBlock(h, h, deep)
        for depth, times in reversed(list(enumerate(mult))):
            at = f"{side >> depth}x{side >> depth}"
            if depth < len(mult) - 1:
                self.dec[f"{at}_up"] = UNetBlock(h, h, deep, how="up")
            for index in range(blocks + 1):
                name, inputs = f"{at}_block{index}", h + skips.pop()
                self.dec[name] = UNetBlock(inputs, width * times, deep, side >> depth in attention)
                h = width * times
        self.out_norm, self.out_conv = GroupNorm(h), Conv2d(h, colours, 3)

    def embed(self, time: Tensor, onehot: Tensor) -> Tensor:
        hidden = self.map_layer1(F.silu(self.map_layer0(self.map_noise(time))))
        return F.silu(hidden + self.map_label(onehot))  # type: ignore[misc]

    def encode(self, x: Tensor, embedding: Tensor) -> list[Tensor]:
        stem, *blocks = self.enc.values()
        outputs = [stem(x)]
        for block in blocks:
            outputs.append(block(outputs[-1], embedding))
        return outputs

    def forward(self, x: Tensor, time: Tensor, onehot: Tensor) -> Tensor:
        embedding = self.embed(time, onehot)
        skips = self.encode(x, embedding)
        h = skips[-1]
        for block in self.dec.values():
            whole = h.shape[1] == block.in_channels
            h = block(h if whole else torch.cat([h, skips.pop()], 1), embedding)
        return self.out_conv(F.silu(self.out_norm(h)))


class EDMPrecond(Persistent):
    """x0 of a noised sample (table 1, "Ours")."""

    def __init__(self, *size: Any) -> None:
        super().__init__()
        self.sigma_data = 0.5
        self.model = DhariwalUNet(*size)

    def fed(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        return x / (sigma**2 + self.sigma_data**2).sqrt()[:, None, None, None], sigma.log() / 4

    def forward(self, x: Tensor, sigma: Tensor, onehot: Tensor) -> Tensor:
        s, d = sigma[:, None, None, None], self.sigma_data
        out = self.model(*self.fed(x, sigma), onehot)
        return d**2 / (s**2 + d**2) * x + s * d / (s**2 + d**2).sqrt() * out


class SongUNet(Persistent):
    pass


SMALL = (16, 3, 5, 32, (1, 2, 4), 2, (8, 4), 9)
"""Attention with one head at 8 pixels and two at 4, and the input for augmentation that the published network has."""
FLAT = (8, 1, 3, 64, (1,), 1, (), 0)
"""One resolution, attention in the middle only."""


def network(size: tuple[Any, ...] = SMALL) -> EDMPrecond:
    torch.manual_seed(0)
    return EDMPrecond(*size).requires_grad_(False)


@contextmanager
def called(**modules: Any) -> Iterator[None]:
    """Have functions under the names of other programs' modules, as long as something is pickled."""
    there = {name.replace("__", "."): thing for name, thing in modules.items()}
    before = {name: sys.modules.get(name) for name in there}
    for name, thing in there.items():
        module = ModuleType(name)
        sys.modules[name] = module
        if callable(thing):
            thing.__module__ = name
            setattr(module, thing.__name__, thing)
    try:
        yield
    finally:
        for name, old in before.items():
            if old is None:
                del sys.modules[name]
            else:
                sys.modules[name] = old


def pickled(thing: object, path: Path) -> Path:
    with (
        called(torch_utils=None, torch_utils__persistence=_reconstruct_persistent_obj),
        path.open("wb") as stream,
    ):
        pickle.dump(thing, stream, 4)
    return path


def edm(path: Path, net: EDMPrecond | None = None, **more: object) -> Path:
    return pickled({"ema": net or network(), "augment_pipe": None, **more}, path / "edm.pkl")


@pytest.mark.parametrize("size", [SMALL, FLAT])
def test_an_edm_network_gives_the_same_x0_and_features(size: tuple[Any, ...], tmp_path: Path) -> None:
    net = network(size)
    config, state = read_edm_pickle(edm(tmp_path, net))
    ours = Adm(config)
    ours.load_state_dict(state)
    diffusion = Diffusion(karras_schedule(), edm_preconditioning(0.5))
    timestep = torch.tensor([0, 300, 600, 900, 999])
    label = torch.arange(5) % size[2]
    onehot, sigma = F.one_hot(label, size[2]).float(), diffusion.schedule.sigma[timestep].float()
    x_t = torch.randn(5, size[1], size[0], size[0]) * (sigma**2 + 0.25).sqrt()[:, None, None, None]
    denoiser, cond = Denoiser(ours, diffusion), Conditioning(label=label)
    with torch.no_grad():
        wanted = net(x_t, sigma, onehot)
        x, time = net.fed(x_t, sigma)
        features = net.model.encode(x, net.model.embed(time, onehot))[-1]
        torch.testing.assert_close(denoiser(x_t, timestep, cond), wanted, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(denoiser.features(x_t, timestep, cond), features, rtol=1e-5, atol=1e-5)
    assert wanted.std() > 0.1
    assert (wanted - wanted.flip(0)).abs().max() > 0.1


def test_the_size_is_read_from_the_weights(tmp_path: Path) -> None:
    config, _ = read_edm_pickle(edm(tmp_path))
    assert (config.resolution, config.image_channels, config.classes, config.channels) == (16, 3, 5, 32)
    assert (config.multipliers, config.blocks, config.attention) == ((1, 2, 4), 2, (8, 4))


def test_a_student_of_an_edm_network_is_read_from_its_training_folder(
    tmp_path: Path, refusal: Refusal
) -> None:
    net = network()
    torch.save(net.state_dict(), tmp_path / "pytorch_model.bin")
    config, state = read_edm_pickle(edm(tmp_path, net))
    for path in (tmp_path, tmp_path / "pytorch_model.bin"):
        found, student = read_edm_student(path)
        assert found == config
        same(student, state)
    save_file(weights(unet()), tmp_path / "a.safetensors")
    assert "has no map_layer0.weight" in refusal(lambda: read_edm_student(tmp_path / "a.safetensors"))


def test_names_and_shapes_of_the_published_network_are_those_of_the_recipe() -> None:
    with torch.device("meta"):
        theirs = network((64, 3, 1000, 192, (1, 2, 3, 4), 3, (32, 16, 8), 9)).state_dict()
        ours = Adm(recipes.IMAGENET64).state_dict()
    box = torch.full((1, 1, 2, 2), 0.25)
    config, state = from_edm_state_dict(
        {n: box if n.endswith("resample_filter") else t for n, t in theirs.items()}
    )
    assert config == recipes.IMAGENET64
    assert {name: t.shape for name, t in state.items()} == {name: t.shape for name, t in ours.items()}


def test_the_source_in_an_edm_pickle_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    marker = tmp_path / "ran"
    monkeypatch.setattr(Persistent, "source", f"open({str(marker)!r}, 'w')")
    path = edm(tmp_path)
    assert str(marker).encode() in path.read_bytes()
    before = set(sys.modules)
    read_edm_pickle(path)
    assert not marker.exists()
    assert not {name for name in set(sys.modules) - before if "torch_utils" in name}


def scalar(dtype: object, data: bytes) -> object:
    """What NumPy's numbers were made by, when the networks were published."""


class Number:
    def __reduce__(self) -> Any:
        return scalar, (np.dtype("f8"), b"12345678")


def test_numbers_of_an_older_numpy_are_accepted(tmp_path: Path) -> None:
    net = network()
    object.__setattr__(net, "_init_kwargs", {"dropout": Number()})
    with called(numpy__core__multiarray=scalar):
        path = edm(tmp_path, net)
    assert b"numpy.core.multiarray" in path.read_bytes()
    read_edm_pickle(path)


class Hostile:
    def __init__(self, function: Callable[..., object], *args: object) -> None:
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


class Stateful:
    def __setstate__(self, state: dict[str, str]) -> None:
        Path(state["marker"]).touch()


def stateful(marker: Path) -> Stateful:
    made = Stateful()
    made.__dict__["marker"] = str(marker)
    return made


def attack(kind: str, marker: Path) -> bytes:
    """A pickle that makes the marker."""
    command = f"touch {marker}"
    things: dict[str, object] = {
        "os.system": Hostile(os.system, command),
        "__setstate__": stateful(marker),
        "eval": Hostile(eval, f"open({str(marker)!r}, 'w')"),
        "in a storage": Hostile(torch.storage._load_from_bytes, pickle.dumps(Hostile(os.system, command))),
    }
    # getattr(__import__("os"), "system")(command), and the same by INST, which needs no REDUCE
    text = {
        "getattr": f"cbuiltins\ngetattr\n(c__builtin__\n__import__\n(Vos\ntRVsystem\ntR(V{command}\ntR.",
        "INST": f"(V{command}\nios\nsystem\n.",
        "dotted": f"\x80\x04ctorch\nos.system\n(V{command}\ntR.",
    }
    return text[kind].encode("latin1") if kind in text else pickle.dumps(things[kind], 4)


KINDS = ("os.system", "__setstate__", "eval", "getattr", "INST", "dotted")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol 4")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("suffix", [".pkl", ".bin", ".pt"])
def test_a_hostile_pickle_is_refused_and_does_not_run(
    kind: str, suffix: str, tmp_path: Path, refusal: Refusal
) -> None:
    marker, path = tmp_path / "ran", tmp_path / f"a{suffix}"
    path.write_bytes(attack(kind, marker))
    sentence = refusal(lambda: (read_edm_pickle if suffix == ".pkl" else read_unet)(path))
    assert sentence.startswith(f"{path}: ")
    assert "nothing of it was run" in sentence
    assert len(sentence) < 400 + len(str(tmp_path))
    assert not marker.exists()
    pickle.loads(path.read_bytes())
    assert marker.exists()  # so it was a real one


def test_a_hostile_pickle_inside_the_network_is_refused_and_does_not_run(
    tmp_path: Path, refusal: Refusal
) -> None:
    marker, net = tmp_path / "ran", network(FLAT)
    net.model.map_layer0.__dict__["_forward_hooks"] = {0: Hostile(os.system, f"touch {marker}")}
    assert "posix.system" in refusal(lambda: read_edm_pickle(edm(tmp_path, net)))
    net = network(FLAT)
    data = pickle.dumps(Hostile(os.system, f"touch {marker}"), 2)
    fake = Hostile(
        torch._utils._rebuild_tensor_v2, Hostile(torch.storage._load_from_bytes, data), 0, (1,), (1,)
    )
    net.model.map_layer0.__dict__["_parameters"] = {"weight": fake}
    assert "names posix.system), so nothing of it was run" in refusal(
        lambda: read_edm_pickle(edm(tmp_path, net))
    )
    assert not marker.exists()


def test_a_hostile_archive_of_torch_is_refused_and_does_not_run(tmp_path: Path, refusal: Refusal) -> None:
    marker, path = tmp_path / "ran", tmp_path / "a.bin"
    torch.save({"conv_in.weight": torch.zeros(1), "x": Hostile(os.system, f"touch {marker}")}, path)
    assert "names posix.system), so nothing of it was run" in refusal(lambda: read_unet(path))
    assert not marker.exists()
    torch.load(path, weights_only=False)
    assert marker.exists()


def test_the_unpickler_alone_knows_no_other_name(refusal: Refusal) -> None:
    for kind in ("os.system", "getattr", "eval", "dotted"):
        assert "nothing of it was run" in refusal(
            lambda kind=kind: RecordingUnpickler(io.BytesIO(attack(kind, Path("unused")))).load()  # type: ignore[misc]
        )


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"\x80\x04]r\xff\xff\xff\x7f.", "LONG_BINPUT"),
        (b"\x80\x04\x82\x01.", "EXT1"),
        (b"Pelsewhere\n.", "PERSID"),
        (b"\x80\x04ccollections\nOrderedDict\n}b.", "no key 'ema'"),
        (b"\x80\x04ccollections\nOrderedDict\nN}Vx\nK\x01s\x86b.", "not all of it"),
        (b"\x80\x04cnumpy\ndtype\n}b.", "not all of it"),
        (b"\x80\x04]q\x00)R.", "not all of it"),
        (b"\x8e\xff\xff\xff\xff\xff\xff\xff\x7f", "not all of it"),
        (b"L" + b"9" * 5000 + b"L\n.", "not all of it"),
        (b"", "not all of it"),
        (pickle.dumps([1]), "no key 'ema'"),
        (pickle.dumps({"ema": None}), "ema is a NoneType"),
    ],
)
def test_a_broken_pickle_is_refused_in_one_sentence(
    data: bytes, words: str, tmp_path: Path, refusal: Refusal
) -> None:
    (tmp_path / "a.pkl").write_bytes(data)
    sentence = refusal(lambda: read_edm_pickle(tmp_path / "a.pkl"))
    assert words in sentence
    assert len(sentence) < 500 + len(str(tmp_path))


def test_a_pickle_cut_short_anywhere_is_refused(tmp_path: Path, refusal: Refusal) -> None:
    path = edm(tmp_path, network(FLAT))
    data = path.read_bytes()
    for length in (1, 100, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:length])
        assert "not all of it" in refusal(lambda: read_edm_pickle(path))


def spoilt(change: Callable[[EDMPrecond], object]) -> EDMPrecond:
    net = network()
    change(net)
    return net


def block(net: EDMPrecond) -> Any:
    return net.model.enc["8x8_block0"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda net: setattr(net, "model", SongUNet()), "model is a 'SongUNet'"),
        (lambda net: setattr(net, "sigma_data", 1.0), "sigma_data is 1.0"),
        (lambda net: setattr(net.model, "map_label", None), "no map_label.weight; only class-conditional"),
        (lambda net: setattr(block(net), "skip_scale", 0.7), "8x8_block0.skip_scale is 0.7"),
        (
            lambda net: setattr(block(net), "num_heads", 2),
            "num_heads is 2, and only networks in which it is 1",
        ),
        (lambda net: setattr(block(net).norm1, "eps", 1e-6), "norm1.eps is 1e-06"),
        (lambda net: setattr(block(net).norm1, "num_groups", 8), "norm1.num_groups is 8"),
        (lambda net: setattr(net.model.map_noise, "endpoint", True), "map_noise.endpoint is True"),
        (lambda net: setattr(block(net), "norm1", None), "norm1.weight is missing"),
        (lambda net: setattr(block(net), "proj", None), "proj.weight is missing"),
        (lambda net: setattr(block(net), "extra", Linear(1, 1)), "extra.bias has no place"),
        (
            lambda net: setattr(net.model, "map_layer1", Linear(128, 96)),
            "map_layer1.weight is of shape (96, 128)",
        ),
        (lambda net: setattr(net.model, "map_layer1", net.model.map_layer0), "is in it twice"),
        (lambda net: setattr(block(net).conv1, "weight", None), "conv1.weight is missing"),
        (
            lambda net: net.model.enc["8x8_down"].conv0.resample_filter.copy_(torch.eye(2)),
            "resample_filter is not the mean",
        ),
        (lambda net: setattr(net, "model", nn.Identity()), "torch.nn.modules.linear.Identity"),
    ],
)
def test_a_network_that_is_not_adm_is_refused_by_what_differs(
    change: Callable[[EDMPrecond], object], words: str, tmp_path: Path, refusal: Refusal
) -> None:
    assert words in refusal(lambda: read_edm_pickle(edm(tmp_path, spoilt(change))))


@pytest.mark.parametrize(
    ("size", "words"),
    [
        (
            (8, 1, 3, 32, (2,), 1, (8,), 0),
            "is of shape (64, 1, 3, 3)",
        ),  # the first layer is wider than the embedding
        ((8, 1, 3, 96, (1,), 1, (8,), 0), "do not divide into attention heads of 64"),
        ((8, 1, 3, 32, (1,), 1, (), 0), "dec.8x8_in0.norm2.weight is missing"),  # too narrow for a head
    ],
)
def test_a_size_that_ours_cannot_have_is_refused(
    size: tuple[Any, ...], words: str, tmp_path: Path, refusal: Refusal
) -> None:
    assert words in refusal(lambda: read_edm_pickle(edm(tmp_path, network(size))))


def test_a_tensor_that_reaches_beyond_its_storage_is_refused(tmp_path: Path, refusal: Refusal) -> None:
    net = network(FLAT)
    reload, arguments = torch.zeros(4)._typed_storage().__reduce__()
    storage = Hostile(reload, *arguments)
    fake = Hostile(torch._utils._rebuild_tensor_v2, storage, 0, (64, 64), (64, 1))
    net.model.map_layer0.__dict__["_parameters"] = {"weight": fake}
    assert "out of bounds" in refusal(lambda: read_edm_pickle(edm(tmp_path, net)))


# UNets of SD and SDXL.


def unet(xl: bool = True, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    kinds = (("", "CrossAttn"), ("CrossAttn", "")) if xl else (("CrossAttn", ""), ("", "CrossAttn"))
    extra: dict[str, Any] = {
        "addition_embed_type": "text_time", "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": 12 + 6 * 4,
        "use_linear_projection": True, "transformer_layers_per_block": (1, 2),
    }  # fmt: skip
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=2,
        down_block_types=tuple(f"{kind}DownBlock2D" for kind in kinds[0]),
        up_block_types=tuple(f"{kind}UpBlock2D" for kind in kinds[1]),
        cross_attention_dim=20 if xl else 8,
        attention_head_dim=2,
        norm_num_groups=4,
        **extra if xl else {},
    ).requires_grad_(False)


def weights(network: Any) -> Weights:
    return dict(network.state_dict())


def same(found: Mapping[str, Tensor] | None, wanted: Mapping[str, Tensor]) -> None:
    assert found is not None
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def prefixed(tensors: Weights, prefix: str) -> Weights:
    return {prefix + name: tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize("name", ["a.safetensors", "a.bin", "a.pt", "old.bin"])
@pytest.mark.parametrize(
    "prefix", ["", "feedforward_model.", "module.feedforward_model.", "feedforward_model.module."]
)
def test_a_student_is_read_with_any_prefix_and_in_its_precision(
    name: str, prefix: str, tmp_path: Path
) -> None:
    path, wanted = tmp_path / name, weights(unet().half())
    if path.suffix == ".safetensors":
        save_file(prefixed(wanted, prefix), path)
    else:
        torch.save(prefixed(wanted, prefix), path, _use_new_zipfile_serialization=path.stem != "old")
    same(read_unet(path), wanted)
    same(read_unet(path, weights(unet(seed=1))), wanted)


@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
def test_the_student_of_a_training_folder_is_read(suffix: str, tmp_path: Path, refusal: Refusal) -> None:
    student, critic, teacher = (weights(unet(seed=seed)) for seed in range(3))
    guidance = prefixed(critic, "fake_unet.") | prefixed(teacher, "real_unet.")
    guidance |= {"cls_pred_branch.0.weight": torch.zeros(2), "alphas_cumprod": torch.zeros(3)}
    names = ("pytorch_model", "pytorch_model_1") if suffix == ".bin" else ("model", "model_1")
    for name, tensors in zip(
        names, (prefixed(student, "module."), prefixed(guidance, "module.")), strict=True
    ):
        write = torch.save if suffix == ".bin" else save_file
        write(tensors, tmp_path / f"{name}{suffix}")
    same(read_unet(tmp_path), student)
    same(read_critic(tmp_path, weights(unet(seed=4))), critic)
    assert read_critic(tmp_path / f"{names[0]}{suffix}", student) is None
    (tmp_path / f"{names[0]}{suffix}").unlink()
    assert "a folder without pytorch_model.bin or model.safetensors" in refusal(lambda: read_unet(tmp_path))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: {}, "holds no tensors"),
        (lambda w: w | {"x": {"y": 1}}, "'x' is a dict, not a tensor"),
        (lambda w: [1], "holds a list"),
        (lambda w: prefixed(w, "fake_unet."), "no conv_in.weight (fake_unet."),
        (
            lambda w: prefixed(w, "model.diffusion_model."),
            "U-Net of SD or SDXL in diffusers' or the original naming",
        ),
        (lambda w: prefixed(w, "first_stage_model."), "whole model in one file"),
        (lambda w: adapted(unet()).state_dict(), "does not say the LoRA's alpha"),
        (
            lambda w: w | {"conv_in.weight": torch.zeros(2, 4)},
            "conv_in.weight is (2, 4), and (8, 4, 3, 3) in the base",
        ),
        (lambda w: w | {"more": torch.zeros(2)}, "more is (2,), and missing in the base"),
        (
            lambda w: {n: t for n, t in w.items() if n != "conv_out.bias"},
            "conv_out.bias is missing, and (4,)",
        ),
    ],
)
def test_a_file_without_a_matching_unet_is_refused(
    change: Callable[[Weights], object], words: str, tmp_path: Path, refusal: Refusal
) -> None:
    base = weights(unet())
    torch.save(change(dict(base)), tmp_path / "a.bin")
    assert words in refusal(lambda: read_unet(tmp_path / "a.bin", base))


@pytest.mark.parametrize("name", ["a.bin", "a.safetensors", "a.pt"])
def test_a_file_cut_short_is_refused(name: str, tmp_path: Path, refusal: Refusal) -> None:
    path = tmp_path / name
    (save_file if path.suffix == ".safetensors" else torch.save)(weights(unet()), path)
    data = path.read_bytes()
    for length in (0, 7, 1000, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:length])
        sentence = refusal(lambda: read_unet(path))
        assert "not all of it" in sentence or "nothing of it was run" in sentence
        assert len(sentence) < 500 + len(str(tmp_path))


def test_a_missing_file_and_an_unknown_suffix_are_refused(tmp_path: Path, refusal: Refusal) -> None:
    for name in ("a.bin", "a.safetensors"):
        assert "does not exist" in refusal(lambda name=name: read_unet(tmp_path / name))  # type: ignore[misc]
    assert "does not exist" in refusal(lambda: read_edm_pickle(tmp_path / "a.pkl"))
    (tmp_path / "a.onnx").touch()
    assert "known: .bin, .pt, .pth, .safetensors" in refusal(lambda: read_unet(tmp_path / "a.onnx"))


# LoRA. The reference is peft: the network with the adapter in it, and what diffusers writes of it.

TARGETS = [
    "to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2",
    "conv_shortcut", "time_emb_proj", "downsamplers.0.conv", "upsamplers.0.conv",
]  # fmt: skip
"""The layers that DMD2's authors adapt."""
RANK, ALPHA = 3, 8


def adapted(base: Any) -> Any:
    """The UNet with a LoRA that changes it much."""
    base.add_adapter(peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS))
    torch.manual_seed(3)
    for name, parameter in base.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn_like(parameter) / 10
    return base


@cache
def factors(xl: bool = True) -> Weights:
    """`<path>.lora_A.weight` and `<path>.lora_B.weight`."""
    return {name: t.contiguous() for name, t in peft.get_peft_model_state_dict(adapted(unet(xl))).items()}


@cache
def fused(xl: bool = True) -> Weights:
    """What peft makes of both, by adding the change of each layer."""
    merged: Weights = {}
    for name, module in adapted(unet(xl)).named_modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            layer: Any = module
            merged[f"{name}.weight"] = layer.get_base_layer().weight + layer.get_delta_weight("default")
    assert len(merged) > 50
    return merged


def kohya(tensors: Weights, names: Mapping[str, str] | None = None) -> Weights:
    made: Weights = {}
    for name, tensor in tensors.items():
        module, part = name.removesuffix(".weight").rsplit(".", 1)
        flat = f"lora_unet_{(names or {}).get(module, module).replace('.', '_')}"
        made[f"{flat}.lora_{'down' if part == 'lora_A' else 'up'}.weight"] = tensor
        made[f"{flat}.alpha"] = torch.tensor(float(ALPHA))
    return made


def renamed(tensors: Weights, down: str, up: str, prefix: str = "unet.") -> Weights:
    """In a naming that leaves out alpha, so that the rank stands for it."""
    made = {}
    for name, tensor in tensors.items():
        tensor = tensor * ALPHA / RANK if ".lora_B." in name else tensor
        made[prefix + name.replace(".lora_A.weight", down).replace(".lora_B.weight", up)] = tensor
    return made


def processors(tensors: Weights) -> Weights:
    """How diffusers named the LoRA of attentions before it used peft."""
    plain = renamed({n: t for n, t in tensors.items() if ".to_" in n}, ".lora.down.weight", ".lora.up.weight")
    pattern = r"\.(to_q|to_k|to_v|to_out)(?:\.0)?\.lora\."
    return {re.sub(pattern, r".processor.\1_lora.", name): tensor for name, tensor in plain.items()}


NAMINGS: dict[str, Callable[[Weights, Any], Weights]] = {
    "kohya": lambda tensors, base: kohya(tensors),
    "kohya, SGM": lambda tensors, base: kohya(tensors, sgm_names(weights(base))),
    "diffusers": lambda tensors, base: renamed(tensors, ".lora_A.weight", ".lora_B.weight"),
    "bare": lambda tensors, base: renamed(tensors, ".lora_A.weight", ".lora_B.weight", ""),
    "an adapter's name": lambda tensors, base: renamed(
        tensors, ".lora_A.default.weight", ".lora_B.default.weight"
    ),
    "older": lambda tensors, base: renamed(tensors, ".lora.down.weight", ".lora.up.weight"),
    "processors": lambda tensors, base: processors(tensors),
}


@pytest.mark.parametrize("xl", [True, False])
@pytest.mark.parametrize("naming", NAMINGS)
def test_a_lora_is_merged_as_peft_merges_it(naming: str, xl: bool, tmp_path: Path) -> None:
    base = weights(unet(xl))
    tensors = NAMINGS[naming](factors(xl), unet(xl))
    before = {name: tensor.clone() for name, tensor in base.items()}
    save_file(tensors, tmp_path / "a.safetensors")
    torch.save(tensors, tmp_path / "a.bin")
    merged = fused(xl)
    if naming == "processors":
        merged = {name: tensor for name, tensor in merged.items() if ".to_" in name}
    for name in ("a.safetensors", "a.bin"):
        found = read_unet(tmp_path / name, base)
        torch.testing.assert_close(found, base | merged, rtol=1e-5, atol=1e-6)
        assert sum(not torch.equal(found[name], base[name]) for name in base) == len(merged)
    same(base, before)


@pytest.mark.parametrize("prefix", ["", "base_model.model.", "module.feedforward_model."])
def test_a_training_folder_of_a_lora_is_merged_with_the_alpha_of_the_recipe(
    prefix: str, tmp_path: Path, refusal: Refusal
) -> None:
    trained, base = weights(adapted(unet())), weights(unet(seed=4))
    assert any(".base_layer." in name for name in trained)
    torch.save(prefixed(trained, prefix), tmp_path / "pytorch_model.bin")
    found = read_unet(tmp_path, base, LoraConfig(rank=RANK, alpha=ALPHA))
    torch.testing.assert_close(found, weights(unet()) | fused(), rtol=1e-5, atol=1e-6)
    assert "does not say the LoRA's alpha" in refusal(lambda: read_unet(tmp_path, base))
    assert "has rank 3, the recipe's has 64" in refusal(lambda: read_unet(tmp_path, base, LoraConfig()))


def test_a_merged_student_gives_the_same_output_as_the_adapter(tmp_path: Path) -> None:
    network, merged = adapted(unet()), unet()
    save_file(kohya(factors()), tmp_path / "a.safetensors")
    merged.load_state_dict(read_unet(tmp_path / "a.safetensors", weights(unet())))
    inputs = (torch.randn(2, 4, 8, 8), torch.tensor([999, 249]), torch.randn(2, 5, 20))
    more = {"text_embeds": torch.randn(2, 12), "time_ids": torch.rand(2, 6)}
    with torch.no_grad():
        outputs = [part(*inputs, added_cond_kwargs=more).sample for part in (network, merged, unet())]
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-4, atol=1e-5)
    assert (outputs[0] - outputs[2]).abs().max() > 0.05


def test_a_lora_is_added_in_float32_and_rounded_once(tmp_path: Path) -> None:
    base = weights(unet().to(torch.bfloat16))
    save_file(kohya(factors()), tmp_path / "a.safetensors")
    found = read_unet(tmp_path / "a.safetensors", base)
    exact = read_unet(tmp_path / "a.safetensors", {name: t.float() for name, t in base.items()})
    same(found, {name: tensor.to(torch.bfloat16) for name, tensor in exact.items()})


def test_alpha_is_read_where_diffusers_and_peft_write_it(tmp_path: Path, refusal: Refusal) -> None:
    base, network, wanted = weights(unet()), adapted(unet()), weights(unet()) | fused()
    network.save_lora_adapter(tmp_path / "adapter")
    diffusers.StableDiffusionXLPipeline.save_lora_weights(
        tmp_path / "pipeline",
        unet_lora_layers=factors(),
        unet_lora_adapter_metadata=network.peft_config["default"].to_dict(),
    )
    whole = peft.get_peft_model(unet(), peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS))
    peft.set_peft_model_state_dict(whole, prefixed(factors(), "base_model.model."))
    whole.save_pretrained(str(tmp_path / "peft"))
    files = [next((tmp_path / name).glob("*.safetensors")) for name in ("adapter", "pipeline", "peft")]
    assert files[2].name == "adapter_model.safetensors"
    for path in files:
        torch.testing.assert_close(read_unet(path, base), wanted, rtol=1e-5, atol=1e-6)
    (tmp_path / "peft" / "adapter_config.json").unlink()
    assert "without the adapter_config.json that says its alpha" in refusal(lambda: read_unet(files[2], base))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda t: t | {"lora_te1_x.lora_down.weight": torch.zeros(3, 8)},
            "'lora_te1_x.lora_down.weight' of the LoRA fits",
        ),
        (lambda t: t | {"lora_unet_conv_out.alpha": torch.zeros(1)}, "no down factor for conv_out.weight"),
        (
            lambda t: t | {"lora_unet_conv_out.lora_mid.weight": torch.zeros(1)},
            "conv_out.lora_mid.weight' of the LoRA fits",
        ),
        (
            lambda t: t | {"lora_unet_conv_out.dora_scale": torch.zeros(1)},
            "conv_out.dora_scale' of the LoRA fits",
        ),
        (lambda t: t | {"unet.conv_in.lora_A.weight": torch.zeros(3, 36)}, "no up factor for conv_in.weight"),
        (
            lambda t: (
                t
                | {
                    "unet.conv_in.lora_A.weight": torch.zeros(3, 4),
                    "unet.conv_in.lora_B.weight": torch.zeros(8, 3),
                }
            ),
            "factors of (8, 3) and (3, 4) for conv_in.weight of (8, 4, 3, 3)",
        ),
        (
            lambda t: t | {"unet.mid_block.resnets.0.conv1.lora_A.weight": torch.zeros(3, 16, 3, 3)},
            "is there a second time",
        ),
    ],
)
def test_a_lora_that_does_not_fit_is_refused_by_name(
    change: Callable[[Weights], Weights], words: str, tmp_path: Path, refusal: Refusal
) -> None:
    save_file(change(kohya(factors())), tmp_path / "a.safetensors")
    assert words in refusal(lambda: read_unet(tmp_path / "a.safetensors", weights(unet())))


def test_a_lora_needs_its_base(tmp_path: Path, refusal: Refusal) -> None:
    save_file(kohya(factors()), tmp_path / "a.safetensors")
    assert "give the base it was made from" in refusal(lambda: read_unet(tmp_path / "a.safetensors"))
    other = weights(unet(xl=False))
    assert "of the LoRA fits no weight of the base" in refusal(
        lambda: read_unet(tmp_path / "a.safetensors", other)
    )


@pytest.mark.parametrize(
    "settings",
    [
        {"use_dora": True},
        {"alpha_pattern": {"x": 1}},
        {"use_rslora": True},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "olora"},
        {"peft_type": "LOHA"},
        {"bias": "all"},
    ],
)
def test_a_lora_of_another_kind_is_refused(
    settings: dict[str, Any], tmp_path: Path, refusal: Refusal
) -> None:
    metadata = {f"unet.{name}": value for name, value in settings.items()} | {"unet.lora_alpha": 8}
    tensors = NAMINGS["diffusers"](factors(), None)
    save_file(tensors, tmp_path / "a.safetensors", {"lora_adapter_metadata": json.dumps(metadata)})
    assert next(iter(settings)) in refusal(lambda: read_unet(tmp_path / "a.safetensors", weights(unet())))


@pytest.mark.parametrize("xl", [True, False])
def test_sgm_names_are_those_that_diffusers_reads(xl: bool) -> None:
    network = unet(xl)
    convert: Any = single_file_utils.convert_ldm_unet_checkpoint
    same(convert(sgm(network), network.config), weights(network))


def test_sgm_names_are_those_of_published_files() -> None:
    """SDXL's downsampling at 3, first attention at 4 and upsampling at 2 behind one; SD1.5's upsampling has none."""
    xl, sd = sgm_names(weights(unet())), sgm_names(weights(unet(xl=False)))
    assert xl["down_blocks.0.downsamplers.0.conv"] == "input_blocks.3.0.op"
    attention = "transformer_blocks.0.attn1.to_q"
    assert xl[f"down_blocks.1.attentions.0.{attention}"] == f"input_blocks.4.1.{attention}"
    assert xl["mid_block.resnets.1.conv2"] == "middle_block.2.out_layers.3"
    assert xl["up_blocks.0.upsamplers.0.conv"] == "output_blocks.2.2.conv"
    assert sd["up_blocks.0.upsamplers.0.conv"] == "output_blocks.2.1.conv"
    assert sd[f"up_blocks.1.attentions.2.{attention}"] == f"output_blocks.5.1.{attention}"


def sgm(network: Any) -> Weights:
    """The UNet's weights in one file, in the layout of SGM."""
    names, made = sgm_names(weights(network)), {}
    for name, tensor in weights(network).items():
        module, _, leaf = name.rpartition(".")
        made[f"model.diffusion_model.{names[module]}.{leaf}"] = tensor
    return made


# Whole models in one file.


def words(folder: Path) -> Any:
    kind: Any = transformers.CLIPTokenizer
    letters = "abcdefghijklmnopqrstuvwxyz"
    vocab = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return kind({word: index for index, word in enumerate(vocab)}, [], model_max_length=12)


def clip(kind: str, width: int) -> Any:
    torch.manual_seed(width)
    sizes: dict[str, Any] = {"hidden_size": width, "intermediate_size": 2 * width, "projection_dim": width}
    ends: dict[str, Any] = {"vocab_size": 54, "bos_token_id": 52, "eos_token_id": 53}
    settings = transformers.CLIPTextConfig(
        **sizes, **ends, num_attention_heads=2, num_hidden_layers=2, max_position_embeddings=12
    )
    return getattr(transformers, kind)(settings).eval().requires_grad_(False)


def vae() -> Any:
    torch.manual_seed(0)
    return diffusers.AutoencoderKL(
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=2,
    ).requires_grad_(False)


def pipeline(xl: bool, folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """A tiny pipeline with random weights, also as a folder."""
    scheduler = diffusers.EulerDiscreteScheduler(beta_schedule="scaled_linear", steps_offset=1)
    token = words(folder)
    if xl:
        texts = clip("CLIPTextModel", 8), clip("CLIPTextModelWithProjection", 12), token, token
        made = diffusers.StableDiffusionXLPipeline(vae(), *texts, unet(), scheduler, add_watermarker=False)
    else:
        text = clip("CLIPTextModel", 8)
        made = diffusers.StableDiffusionPipeline(
            vae(), text, token, unet(xl=False), scheduler, None, None, requires_safety_checker=False
        )
    made.to(dtype).save_pretrained(folder)
    return made


VAE_NAMES = (
    (r"^(encoder|decoder)\.conv_norm_out", r"\1.norm_out"),
    (r"mid_block\.resnets\.0", "mid.block_1"),
    (r"mid_block\.resnets\.1", "mid.block_2"),
    (r"mid_block\.attentions\.0\.group_norm", "mid.attn_1.norm"),
    (r"mid_block\.attentions\.0\.to_out\.0", "mid.attn_1.proj_out"),
    (r"mid_block\.attentions\.0\.to_([qkv])", r"mid.attn_1.\1"),
    (r"(down|up)_blocks\.(\d)\.resnets\.(\d)", r"\1.\2.block.\3"),
    (r"(down|up)_blocks\.(\d)\.(down|up)samplers\.0", r"\1.\2.\3sample"),
    (r"conv_shortcut", "nin_shortcut"),
    (r"^decoder\.up\.(\d)", lambda match: f"decoder.up.{1 - int(match[1])}"),  # counted from the finest
)
"""diffusers' names of a VAE of two resolutions -> those of CompVis."""
OPEN_CLIP = (
    (r"^text_model\.encoder\.layers", "transformer.resblocks"),
    (r"layer_norm([12])", r"ln_\1"),
    (r"mlp\.fc1", "mlp.c_fc"),
    (r"mlp\.fc2", "mlp.c_proj"),
    (r"self_attn\.out_proj", "attn.out_proj"),
    (r"^text_model\.final_layer_norm", "ln_final"),
    (r"^text_model\.embeddings\.token_embedding", "token_embedding"),
    (r"^text_model\.embeddings\.position_embedding\.weight", "positional_embedding"),
    (r"^text_projection\.weight", "text_projection"),
)


def translated(name: str, rules: tuple[tuple[str, Any], ...]) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def open_clip(network: Any) -> Weights:
    made: Weights = {}
    tensors = weights(network)
    for name, tensor in tensors.items():
        if ".q_proj." in name:
            three = torch.cat([tensors[name.replace("q_proj", f"{which}_proj")] for which in "qkv"])
            name, tensor = name.replace("self_attn.q_proj.", "attn.in_proj_"), three
        if "k_proj." not in name and "v_proj." not in name:
            name = translated(name, OPEN_CLIP)
            made[name] = tensor.T if name == "text_projection" else tensor
    return made | {"logit_scale": torch.tensor(4.6)}


def compvis(pipe: Any) -> Weights:
    """A pipeline's weights in one file, in the layout they were published in."""
    made = sgm(pipe.unet)
    for name, tensor in weights(pipe.vae).items():
        square = "mid.attn" in (new := translated(name, VAE_NAMES)) and tensor.ndim == 2
        made[f"first_stage_model.{new}"] = tensor[:, :, None, None] if square else tensor
    first = {f"text_model.{n.removeprefix('text_model.')}": t for n, t in weights(pipe.text_encoder).items()}
    first["text_model.embeddings.position_ids"] = torch.arange(12)[None]
    if hasattr(pipe, "text_encoder_2"):
        made |= prefixed(first, "conditioner.embedders.0.transformer.")
        made |= prefixed(open_clip(pipe.text_encoder_2), "conditioner.embedders.1.model.")
    else:
        made |= prefixed(first, "cond_stage_model.transformer.")
    return {name: tensor.contiguous() for name, tensor in made.items()} | {"betas": torch.zeros(1000)}


def without_weights(folder: Path) -> Path:
    for path in folder.rglob("*.safetensors"):
        path.unlink()
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("xl", [True, False])
def test_a_whole_model_becomes_the_folder_it_was_made_from(
    xl: bool, dtype: torch.dtype, tmp_path: Path
) -> None:
    pipe = pipeline(xl, tmp_path / "config", dtype)
    save_file(compvis(pipe), tmp_path / "a.safetensors")
    convert_single_file(tmp_path / "a.safetensors", without_weights(tmp_path / "config"), tmp_path / "out")
    found = type(pipe).from_pretrained(tmp_path / "out", dtype=dtype)
    for name in ("unet", "vae", "text_encoder", "text_encoder_2")[: 4 if xl else 3]:
        same(weights(getattr(found, name)), weights(getattr(pipe, name)))
    assert found.scheduler.config.beta_schedule == "scaled_linear"
    assert found.tokenizer("ab").input_ids == pipe.tokenizer("ab").input_ids
    written = list((tmp_path / "out").rglob("*.safetensors"))
    assert len(written) == (4 if xl else 3)
    assert {tensor.dtype for path in written for tensor in load_file(path).values()} == {dtype}


def test_a_file_of_several_precisions_becomes_float32(tmp_path: Path) -> None:
    pipe = pipeline(True, tmp_path / "config")
    tensors = compvis(pipe)
    half = {name: t.half() for name, t in tensors.items() if name.startswith("model.diffusion_model.")}
    save_file(tensors | half, tmp_path / "a.safetensors")
    convert_single_file(tmp_path / "a.safetensors", tmp_path / "config", tmp_path / "out")
    found = diffusers.StableDiffusionXLPipeline.from_pretrained(tmp_path / "out")
    same(weights(found.vae), weights(pipe.vae))
    same(weights(found.unet), {name: tensor.half().float() for name, tensor in weights(pipe.unet).items()})


def dropped(tensors: Weights, part: str) -> Weights:
    return {name: tensor for name, tensor in tensors.items() if part not in name}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: dropped(t, "middle_block.0.in_layers.0"), "lacks weights of the networks in"),
        (lambda t: dropped(t, "decoder.conv_out"), "lacks weights of the networks in"),
        (
            lambda t: dropped(t, "resblocks.1.ln_1"),
            "has no text_encoder_2.text_model.encoder.layers.1.layer_norm1",
        ),
        (
            lambda t: t | {"model.diffusion_model.input_blocks.9.0.extra": torch.zeros(5)},
            "numbers for the unet, and the configs ask for",
        ),
        (
            lambda t: t | {"model.diffusion_model.out.2.weight": torch.zeros(4, 9, 3, 3)},
            "diffusers cannot convert it",
        ),
        (lambda t: dropped(t, "model.diffusion_model."), "no whole model of SD1.5 or SDXL"),
        (lambda t: dropped(dropped(t, "embedders.1."), "embedders.0."), "no whole model of SD1.5 or SDXL"),
    ],
)
def test_a_whole_model_that_its_configs_do_not_describe_is_refused(
    change: Callable[[Weights], Weights], words: str, tmp_path: Path, refusal: Refusal
) -> None:
    save_file(change(compvis(pipeline(True, tmp_path / "config"))), tmp_path / "a.safetensors")
    without_weights(tmp_path / "config")
    assert words in refusal(
        lambda: convert_single_file(tmp_path / "a.safetensors", tmp_path / "config", tmp_path / "out")
    )
    assert not (tmp_path / "out").exists()


def test_configs_of_another_kind_are_refused(tmp_path: Path, refusal: Refusal) -> None:
    path = tmp_path / "a.safetensors"
    save_file(compvis(pipeline(True, tmp_path / "xl")), path)
    pipeline(False, tmp_path / "sd")
    assert "holds a 'StableDiffusionPipeline'" in refusal(
        lambda: convert_single_file(path, tmp_path / "sd", tmp_path / "out")
    )
    assert "has no readable model_index.json" in refusal(
        lambda: convert_single_file(path, tmp_path / "none", tmp_path / "out")
    )


def test_configs_that_name_other_code_are_refused_and_it_is_not_imported(
    tmp_path: Path, refusal: Refusal, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, folder = tmp_path / "a.safetensors", tmp_path / "config"
    save_file(compvis(pipeline(True, folder)), path)
    (tmp_path / "evil_code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.syspath_prepend(str(tmp_path))
    index = json.loads((folder / "model_index.json").read_text()) | {"unet": ["evil_code", "Network"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    assert "from 'evil_code', not from diffusers" in refusal(
        lambda: convert_single_file(path, folder, tmp_path / "out")
    )
    assert not (tmp_path / "ran").exists()


def test_a_checkpoint_as_a_pickle_is_refused_and_does_not_run(tmp_path: Path, refusal: Refusal) -> None:
    (tmp_path / "a.ckpt").write_bytes(attack("os.system", tmp_path / "ran"))
    assert "convert it to safetensors" in refusal(
        lambda: convert_single_file(tmp_path / "a.ckpt", None, tmp_path / "out")
    )
    (tmp_path / "a.ckpt").rename(tmp_path / "a.safetensors")
    assert "not all of it" in refusal(
        lambda: convert_single_file(tmp_path / "a.safetensors", None, tmp_path / "out")
    )
    assert not (tmp_path / "ran").exists()


def test_without_configs_the_hub_is_asked_and_its_failure_is_one_sentence(
    tmp_path: Path, refusal: Refusal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    save_file(compvis(pipeline(True, tmp_path / "config")), tmp_path / "a.safetensors")
    assert "with the configs of the hub" in refusal(
        lambda: convert_single_file(tmp_path / "a.safetensors", None, tmp_path / "out")
    )
