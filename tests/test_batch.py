"""A conditioning holds whatever tensors a family needs, one row per sample."""

from __future__ import annotations

import pytest
import torch

from dmd2.batch import Batch, Conditioning


def conditioning(first: int, count: int) -> Conditioning:
    """Rows that are numbered from `first` on, under names that no built-in family uses."""
    numbers = torch.arange(first, first + count)
    return Conditioning(tokens=numbers[:, None].repeat(1, 3), camera=numbers.float())


def test_a_conditioning_is_sliced_and_concatenated_row_by_row_under_any_names() -> None:
    both = conditioning(0, 2).cat(conditioning(5, 3))
    assert both["camera"].tolist() == [0, 1, 5, 6, 7]
    assert both["tokens"][:, 2].tolist() == [0, 1, 5, 6, 7]
    assert both.rows(slice(1, 3))["camera"].tolist() == [1, 5]


def test_micro_batches_keep_samples_and_conditioning_together() -> None:
    batch = Batch(torch.arange(5.0).reshape(5, 1, 1, 1), conditioning(0, 5), conditioning(10, 5))
    parts = batch.split(2)
    assert [len(part.x) for part in parts] == [2, 2, 1]
    for part in parts:
        assert part.cond["camera"].tolist() == part.x.flatten().tolist()
        assert (part.uncond["camera"] - part.cond["camera"]).tolist() == [10] * len(part.x)
    assert len(batch.split(0)) == 1


def test_a_missing_tensor_is_named_with_those_that_there_are() -> None:
    with pytest.raises(KeyError, match="conditioned on tokens, camera, and the network needs label"):
        conditioning(0, 1)["label"]
    with pytest.raises(KeyError, match="conditioned on nothing, and the network needs tokens"):
        conditioning(0, 1).cat(Conditioning())
