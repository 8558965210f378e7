"""A distillation whose units Dynamo traces; the graphs run as they are, which takes no compiler's time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from dmd2 import stages
from dmd2.config import Config
from dmd2.training.metrics_log import read_metrics


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


def test_previews_compile_nothing_and_change_nothing(
    rows: list[int], micro: Config, made: Path, tmp_path: Path
) -> None:
    engine = micro.engine.model_copy(update={"compile": "on"})
    config = micro.model_copy(update={"engine": engine})
    stages.distill(config, str(made / "shards"), str(made / "teacher"), str(tmp_path / "run"))
    assert len(list((tmp_path / "run" / "previews").glob("*.png"))) == 2
    batch = config.distill.batch
    assert set(rows) == {batch, 2 * batch}, "the discriminator has reals and fakes; previews have 24 rows"
    plain, traced = (
        [line["student/dmd"] for line in read_metrics(run) if "student/dmd" in line]
        for run in (made / "run", tmp_path / "run")
    )
    assert traced == pytest.approx(plain, rel=1e-4)
