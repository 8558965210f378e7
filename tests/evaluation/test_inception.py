"""Inception's weights as tensors: what clean-fid's program computes, without running it again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from cleanfid.inception_torchscript import InceptionV3W
from torch import Tensor, nn

from dmd2 import recipes, stages
from dmd2.config import INCEPTION, Config
from dmd2.evaluation import inception
from dmd2.evaluation.features import load_pretrained
from dmd2.evaluation.inception_score import _classes_of
from dmd2.io.local import sha256
from tests.evaluation.test_features import inception as with_inception

Refusal = Callable[[Callable[[], object]], str]


class Norm(nn.Module):
    """A batch norm without scale, with the statistics of its training."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.bias, self.running_mean, self.running_var = (nn.Parameter(torch.empty(width)) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, None, self.bias, eps=1e-3)


class Unit(nn.Module):
    """A convolution, a norm, a ReLU, as in TensorFlow's graph."""

    def __init__(
        self, inputs: int, outputs: int, size: int | tuple[int, int], stride: int = 1, pad: bool = True
    ) -> None:
        super().__init__()
        sizes = (size, size) if isinstance(size, int) else size
        padding = (sizes[0] // 2, sizes[1] // 2) if pad else (0, 0)
        self.conv = nn.Conv2d(inputs, outputs, sizes, stride, padding, bias=False)
        self.bn = Norm(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


def tower(
    inputs: int, *units: tuple[int, int | tuple[int, int]], last: int = 1, pool: nn.Module | None = None
) -> nn.Sequential:
    """Units one after the other, named conv, conv_1, ...; `last` is the stride of the last, which then has no padding."""
    found = nn.Sequential()
    if pool is not None:
        found.add_module("pool", pool)
    for index, (outputs, size) in enumerate(units):
        strided = last > 1 and index == len(units) - 1
        name = f"conv_{index}" if index else "conv"
        found.add_module(name, Unit(inputs, outputs, size, last if strided else 1, not strided))
        inputs = outputs
    return found


class Branches(nn.Module):
    """The outputs of all children, one after the other."""

    def __init__(self, **children: nn.Module) -> None:
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)

    def forward(self, x: Tensor) -> Tensor:
        found = []
        for child in self.children():
            found.append(child(x))
        return torch.cat(found, 1)


class Fork(nn.Module):
    """Units, and two side by side behind them."""

    def __init__(self, inputs: int, *units: tuple[int, int]) -> None:
        super().__init__()
        for name, child in tower(inputs, *units).named_children():
            self.add_module(name, child)
        self.mixed = Branches(conv=Unit(384, 384, (1, 3)), conv_1=Unit(384, 384, (3, 1)))

    def forward(self, x: Tensor) -> Tensor:
        for child in self.children():
            x = child(x)
        return x


def mean() -> nn.Module:
    return nn.AvgPool2d(3, 1, 1, count_include_pad=False)


def a(inputs: int, pooled: int) -> Branches:
    return Branches(
        conv=Unit(inputs, 64, 1), tower=tower(inputs, (48, 1), (64, 5)), tower_1=tower(inputs, (64, 1), (96, 3), (96, 3)),
        tower_2=tower(inputs, (pooled, 1), pool=mean()),
    )  # fmt: skip


def c(width: int) -> Branches:
    across, down = (1, 7), (7, 1)
    return Branches(
        conv=Unit(768, 192, 1), tower=tower(768, (width, 1), (width, across), (192, down)),
        tower_1=tower(768, (width, 1), (width, down), (width, across), (width, down), (192, across)), tower_2=tower(768, (192, 1), pool=mean()),
    )  # fmt: skip


def e(inputs: int, pool: nn.Module) -> Branches:
    return Branches(
        conv=Unit(inputs, 320, 1), tower=Fork(inputs, (384, 1)), tower_1=Fork(inputs, (448, 1), (384, 3)),
        tower_2=tower(inputs, (192, 1), pool=pool),
    )  # fmt: skip


class Program(nn.Module):
    """The published program: TensorFlow's Inception-v3 of 2015-12-05 by its own names, with random weights."""

    def __init__(self) -> None:
        super().__init__()
        children = {
            "conv": Unit(3, 32, 3, 2, pad=False), "conv_1": Unit(32, 32, 3, pad=False), "conv_2": Unit(32, 64, 3), "pool0": nn.MaxPool2d(3, 2),
            "conv_3": Unit(64, 80, 1), "conv_4": Unit(80, 192, 3, pad=False), "pool1": nn.MaxPool2d(3, 2),
            "mixed": a(192, 32), "mixed_1": a(256, 64), "mixed_2": a(288, 64),
            "mixed_3": Branches(conv=Unit(288, 384, 3, 2, pad=False), tower=tower(288, (64, 1), (96, 3), (96, 3), last=2), pool=nn.MaxPool2d(3, 2)),
            "mixed_4": c(128), "mixed_5": c(160), "mixed_6": c(160), "mixed_7": c(192),
            "mixed_8": Branches(
                tower=tower(768, (192, 1), (320, 3), last=2), tower_1=tower(768, (192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3), last=2),
                pool=nn.MaxPool2d(3, 2),
            ),
            "mixed_9": e(1280, mean()), "mixed_10": e(2048, nn.MaxPool2d(3, 1, 1)), "pool2": nn.AvgPool2d(8),
        }  # fmt: skip
        self.layers = nn.Sequential()
        for name, child in children.items():
            self.layers.add_module(name, child)
        self.output = nn.Linear(2048, 1008)

    def forward(self, img: Tensor, return_features: bool = False, no_output_bias: bool = False) -> Tensor:
        features = self.layers((img - 128) / 128).reshape(-1, 2048)
        if return_features:
            return features
        bias = None if no_output_bias else self.output.bias
        return F.linear(features, self.output.weight, bias).softmax(1)


def random_program() -> Program:
    torch.manual_seed(0)
    network = Program().eval().requires_grad_(False)
    for name, tensor in network.state_dict().items():
        if tensor.ndim == 4:
            nn.init.kaiming_normal_(tensor)
        elif name.startswith("layers."):
            nn.init.uniform_(tensor, 0.5 if "var" in name else -0.1, 1.5 if "var" in name else 0.1)
    return network


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("program") / "inception-2015-12-05.pt"
    torch.jit.script(random_program()).save(path)
    return path


@pytest.fixture
def trusted(program: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The digest of the program, which is trusted as the published one is."""
    monkeypatch.setattr("dmd2.evaluation.features.TRUSTED_PROGRAMS", (sha256(program),))
    return sha256(program)


def test_tensors_from_a_mirror_give_the_features_and_classes_of_the_program(
    program: Path, trusted: str, micro: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = [
        "evaluate.features=inception",
        f"evaluate.inception.uri={program}",
        f"evaluate.inception.sha256={trusted}",
    ]
    lines = stages.mirror(recipes.resolve("edm-digits", changes), str(tmp_path)).split("\n")
    assert [line.partition("=")[0] for line in lines] == [
        "evaluate.inception.uri",
        "evaluate.inception.sha256",
    ]
    config = recipes.resolve("edm-digits", [*changes, *lines])
    assert stages.mirror(config, str(tmp_path)) == lines[0], "tensors are copied as they are"
    published = InceptionV3W(str(program.parent), download=False)
    monkeypatch.setattr(torch.jit, "load", None)
    extractor = load_pretrained(config.evaluate, "evaluate", torch.device("cpu"))
    assert extractor.digest == config.evaluate.inception.sha256
    images = torch.randint(0, 256, (2, 3, 299, 299), dtype=torch.uint8)
    expected = published(torch.from_numpy(images.float().numpy()))
    found = extractor(images).float()
    assert expected.std() > 0.01
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    classes = _classes_of(extractor.network)(images.float())
    torch.testing.assert_close(
        classes, published.base(images.float(), no_output_bias=True), rtol=1e-4, atol=1e-7
    )


def test_a_program_that_computes_something_else_is_not_converted(tmp_path: Path, refusal: Refusal) -> None:
    other, path = random_program(), tmp_path / "inception-2015-12-05.pt"
    other.layers.pool2 = nn.MaxPool2d(8)
    torch.jit.script(other).save(path)
    said = refusal(lambda: inception.convert(path, tmp_path / "no.safetensors"))
    assert "computes other features than the module with its tensors" in said
    assert not (tmp_path / "no.safetensors").exists()


def test_a_file_without_all_tensors_is_refused(micro: Config, tmp_path: Path, refusal: Refusal) -> None:
    path = tmp_path / "few.safetensors"
    safetensors.torch.save_file({"output.weight": torch.zeros(1008, 2048)}, path)
    config = with_inception(micro, str(path), sha256(path))
    said = refusal(lambda: load_pretrained(config.evaluate, "evaluate", torch.device("cpu")))
    assert "has not the tensors of FID's Inception-v3" in said
    path.write_bytes(b"PK program")
    config = with_inception(micro, str(path), sha256(path))
    assert "is no file of tensors" in refusal(
        lambda: load_pretrained(config.evaluate, "evaluate", torch.device("cpu"))
    )
    config = with_inception(micro, str(path), INCEPTION.sha256)
    assert "it was not loaded" in refusal(
        lambda: load_pretrained(config.evaluate, "evaluate", torch.device("cpu"))
    )
