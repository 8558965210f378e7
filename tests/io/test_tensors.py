"""A safetensors file that is streamed is the one that the library writes."""

from __future__ import annotations

import io

import torch
from safetensors.torch import load, save
from torch import Tensor

from dmd2.io.tensors import stream_tensors

TENSORS = {
    "codes": torch.arange(5, dtype=torch.uint8),
    "half": torch.ones(3, dtype=torch.bfloat16),
    "weight": torch.randn(4, 6),
    "step": torch.tensor(7),
    "transposed": torch.randn(4, 6).T,
    "empty": torch.zeros(0, 3),
}


def streamed(tensors: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    stream = io.BytesIO()
    shapes = {name: (one.dtype, one.shape) for name, one in tensors.items()}
    stream_tensors(stream, shapes, tensors.__getitem__, metadata)
    return stream.getvalue()


def test_the_bytes_are_those_of_the_library() -> None:
    whole = {name: one.contiguous() for name, one in TENSORS.items()}
    assert streamed(TENSORS, {"format": "pt"}) == save(whole, {"format": "pt"})


def test_the_library_reads_what_was_streamed() -> None:
    found = load(streamed(TENSORS, {"format": "pt", "more": '{"a": [1]}'}))
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[name], one) for name, one in TENSORS.items())
