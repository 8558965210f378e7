"""Trainings whose units Dynamo traces; the graphs run as they are, which takes no compiler's time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from dmd2 import stages
from dmd2.batch import Batch, Conditioning
from dmd2.config import Config
from dmd2.models.family import make_family
from dmd2.training.metrics_log import read_metrics
from tests.conftest import make_trainer


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The number of rows of each graph, in the order in which they were compiled."""
    found: list[int] = []

    def as_it_is(graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        found.append(next(len(x) for x in inputs if x.dim() == 4 and not isinstance(x, torch.nn.Parameter)))
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=as_it_is))
    monkeypatch.setattr("dmd2.training.build.missing_for_compiling", lambda device: "")
    yield found
    torch._dynamo.reset()


def with_engine(config: Config, **changes: Any) -> Config:
    return config.model_copy(update={"engine": config.engine.model_copy(update=changes)})


@pytest.mark.parametrize("how", ["selective", "full"])
def test_units_that_recompute_their_activations_are_compiled_and_make_the_same_steps(
    how: str, rows: list[int], micro: Config
) -> None:
    family = make_family(micro.family)
    network, cond = family.network(), Conditioning(label=torch.arange(8) % 3)
    real = Batch(torch.randn(8, *family.shape), cond, Conditioning())
    found = []
    for compiling in ("off", "on"):
        config = with_engine(micro, compile=compiling, activation_checkpointing=how)
        trainer = make_trainer(config, network)
        found.append([trainer.step(real, step) for step in range(2)])
    assert rows
    for plain, traced in zip(*found, strict=True):
        torch.testing.assert_close(traced, plain, rtol=1e-5, atol=1e-6)


def test_previews_compile_nothing_and_change_nothing(
    rows: list[int], micro: Config, made: Path, tmp_path: Path
) -> None:
    config = with_engine(micro, compile="on")
    stages.distill(config, str(made / "shards"), str(made / "teacher"), str(tmp_path / "run"))
    assert len(list((tmp_path / "run" / "previews").glob("*.png"))) == 2
    batch = config.distill.batch
    assert set(rows) == {batch, 2 * batch}, "the discriminator has reals and fakes; previews have 24 rows"
    plain, traced = (
        [line["student/dmd"] for line in read_metrics(run) if "student/dmd" in line]
        for run in (made / "run", tmp_path / "run")
    )
    assert traced == pytest.approx(plain, rel=1e-4)
