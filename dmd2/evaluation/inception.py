"""The Inception-v3 of FID as a module of this process, with weights from a file of tensors: nothing in the file is executed.

The published network (that of TensorFlow's inception-2015-12-05, as clean-fid loads it) is a TorchScript program. `convert` reads its tensors
once, on a machine that has the file with the pinned digest, and compares what both compute before it writes. The blocks are torchvision's,
with the pooling of FID's network from clean-fid.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import safetensors.torch
import torch
from cleanfid import inception_pytorch as fid
from cleanfid.inception_torchscript import InceptionV3W
from torch import Tensor, nn
from torchvision.models import inception_v3

from dmd2.errors import Refused
from dmd2.io.local import atomic_write
from dmd2.io.tensors import save_tensors

SIZE, WIDTH, CLASSES = 299, 2048, 1008
SUFFIX = ".safetensors"
"""How the name of a file of tensors ends."""
TOLERANCE, OF_CLASSES = 1e-5, 1e-3
"""Largest relative difference of what the program and the module compute. For the classes the program resamples its images, though they have
the right size."""
A = "conv=branch1x1 tower_conv=branch5x5_1 tower_conv_1=branch5x5_2 tower_1_conv=branch3x3dbl_1 tower_1_conv_1=branch3x3dbl_2 "
A += "tower_1_conv_2=branch3x3dbl_3 tower_2_conv=branch_pool"
B = "conv=branch3x3 tower_conv=branch3x3dbl_1 tower_conv_1=branch3x3dbl_2 tower_conv_2=branch3x3dbl_3"
C = "conv=branch1x1 tower_conv=branch7x7_1 tower_conv_1=branch7x7_2 tower_conv_2=branch7x7_3 tower_1_conv=branch7x7dbl_1 "
C += "tower_1_conv_1=branch7x7dbl_2 tower_1_conv_2=branch7x7dbl_3 tower_1_conv_3=branch7x7dbl_4 tower_1_conv_4=branch7x7dbl_5 "
C += "tower_2_conv=branch_pool"
D = "tower_conv=branch3x3_1 tower_conv_1=branch3x3_2 tower_1_conv=branch7x7x3_1 tower_1_conv_1=branch7x7x3_2 tower_1_conv_2=branch7x7x3_3 "
D += "tower_1_conv_3=branch7x7x3_4"
E = "conv=branch1x1 tower_conv=branch3x3_1 tower_mixed_conv=branch3x3_2a tower_mixed_conv_1=branch3x3_2b tower_1_conv=branch3x3dbl_1 "
E += "tower_1_conv_1=branch3x3dbl_2 tower_1_mixed_conv=branch3x3dbl_3a tower_1_mixed_conv_1=branch3x3dbl_3b tower_2_conv=branch_pool"
STEM = {
    "conv": "Conv2d_1a_3x3", "conv_1": "Conv2d_2a_3x3", "conv_2": "Conv2d_2b_3x3", "conv_3": "Conv2d_3b_1x1", "conv_4": "Conv2d_4a_3x3",
}  # fmt: skip
BLOCKS = {
    "mixed": ("Mixed_5b", A), "mixed_1": ("Mixed_5c", A), "mixed_2": ("Mixed_5d", A), "mixed_3": ("Mixed_6a", B), "mixed_4": ("Mixed_6b", C),
    "mixed_5": ("Mixed_6c", C), "mixed_6": ("Mixed_6d", C), "mixed_7": ("Mixed_6e", C), "mixed_8": ("Mixed_7a", D), "mixed_9": ("Mixed_7b", E),
    "mixed_10": ("Mixed_7c", E),
}  # fmt: skip
"""{block of TensorFlow's graph: (torchvision's name, its convolutions)}."""
KINDS = {"mean": "bn.running_mean", "var": "bn.running_var", "bias": "bn.bias", "beta": "bn.bias"}
"""{what is in the name of a vector: torchvision's name}. There is no scale: it is 1."""


class Inception(nn.Module):
    """Images (B, 3, 299, 299) with values 0 to 255 -> features (B, 2048)."""

    def __init__(self) -> None:
        super().__init__()
        layers = inception_v3(weights=None, num_classes=CLASSES, aux_logits=False, init_weights=False)
        layers.Mixed_5b = fid.FIDInceptionA(192, 32)
        layers.Mixed_5c = fid.FIDInceptionA(256, 64)
        layers.Mixed_5d = fid.FIDInceptionA(288, 64)
        layers.Mixed_6b = fid.FIDInceptionC(768, 128)
        layers.Mixed_6c = fid.FIDInceptionC(768, 160)
        layers.Mixed_6d = fid.FIDInceptionC(768, 160)
        layers.Mixed_6e = fid.FIDInceptionC(768, 192)
        layers.Mixed_7b = fid.FIDInceptionE_1(1280)
        layers.Mixed_7c = fid.FIDInceptionE_2(2048)
        self.output, layers.fc = layers.fc, nn.Identity()
        self.layers = layers

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.layers((images - 128) / 128)
        return features

    def probabilities(self, images: Tensor) -> Tensor:
        """Of the classes (B, 1008), without the bias of the last layer, as the Inception Score is defined."""
        return (self(images) @ self.output.weight.T).softmax(1)


def load(path: Path) -> Inception:
    """The network with the weights of the file, in inference mode and frozen; missing or unexpected tensors are refused."""
    try:
        state = safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, OSError) as error:
        raise Refused(f"{path.name} is no file of tensors ({error}); make one by `dmd2 mirror`") from None
    return _network(state, path.name)


def _network(state: dict[str, Tensor], name: str) -> Inception:
    with torch.device("meta"):
        network = Inception()
    try:
        network.load_state_dict(state, assign=True)
    except RuntimeError as error:
        reason = str(error).partition("\n\t")[2].partition(",")[0]
        raise Refused(
            f"{name} has not the tensors of FID's Inception-v3 ({reason}); make the file by `dmd2 mirror`"
        ) from None
    return network.eval().requires_grad_(False)


def convert(program: Path, out: Path) -> None:
    """Write the tensors of the TorchScript program as safetensors, if the module computes the same with them. The program is run: it must
    be a trusted one, in a file named as clean-fid names it."""
    published = InceptionV3W(str(program.parent), download=False)
    state = dict(rename_tensors(published.base.state_dict()))
    network = _network(state, program.name)
    generator = torch.Generator().manual_seed(0)
    images = 255 * torch.rand(2, 3, SIZE, SIZE, generator=generator)
    with torch.no_grad():
        for name, limit, ours, its in (
            ("features", TOLERANCE, network(images), published(images)),
            (
                "classes",
                OF_CLASSES,
                network.probabilities(images),
                published.base(images, no_output_bias=True),
            ),
        ):
            if not torch.allclose(ours, its, rtol=limit, atol=limit * float(its.abs().max())):
                raise Refused(
                    f"{program.name} computes other {name} than the module with its tensors (by {float((ours - its).abs().max()):.2g}); nothing "
                    "was written, use the program itself"
                )
    with atomic_write(out) as scratch:
        save_tensors(state, scratch)


def rename_tensors(state: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of the program by the names of `Inception`; units are told by TensorFlow's names, whatever joins their parts."""
    units = dict(_units())
    for key, tensor in state.items():
        if tensor.ndim == 0:
            continue  # the number of batches that a norm has seen
        parts = re.sub(r"[./]", "_", key.removeprefix("layers."))
        if key.startswith("output."):
            yield key, tensor.float()
            continue
        unit = max((unit for unit in units if parts.startswith(f"{unit}_")), key=len, default="")
        kinds = [name for word, name in KINDS.items() if word in parts[len(unit) :]]
        kind = "conv.weight" if tensor.ndim == 4 else kinds[0] if kinds else ""
        if not unit or not kind:
            raise Refused(
                f"the program has a tensor {key} of shape {tuple(tensor.shape)}, which FID's Inception-v3 has not"
            )
        yield f"layers.{units[unit]}.{kind}", tensor.float()
        if kind == "conv.weight":
            yield f"layers.{units[unit]}.bn.weight", torch.ones(len(tensor))
            yield f"layers.{units[unit]}.bn.num_batches_tracked", torch.zeros((), dtype=torch.int64)


def _units() -> Iterator[tuple[str, str]]:
    """(TensorFlow's, torchvision's) name of each convolution with its norm."""
    yield from STEM.items()
    for block, (name, pairs) in BLOCKS.items():
        for pair in pairs.split():
            ours, _, its = pair.partition("=")
            yield f"{block}_{ours}", f"{name}.{its}"
