"""The plan of a run as a page, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from components.prepare_run import plan_page
from components.prepare_run.cost import ACCELERATOR
from components.prepare_run.parameters import RunParameters
from components.prepare_run.plan_page import disk_gb
from dmd2 import recipes
from dmd2.errors import Refused
from dmd2.plan.prediction import Plan
from pipelines.pods import HEAVY
from tests.conftest import MICRO

ROOT = "gs://b/a run"
Refusal = Callable[[Callable[[], object]], str]
GIVEN = RunParameters(
    recipe="edm-digits", overrides=" ".join(MICRO), gpus=8, pool={ACCELERATOR: "nvidia-h100-80gb"}, price=2.5
)


@pytest.fixture(scope="module")
def made() -> Plan:
    """The plan of a small training."""
    return plan_page._plan(GIVEN, GIVEN.last)


@pytest.fixture
def planned(made: Plan, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """The page, with some of the figures of its plan replaced."""

    def call(given: RunParameters = GIVEN, **changes: object) -> str:
        monkeypatch.setattr(plan_page, "_plan", lambda given, training: replace(made, **changes))  # type: ignore[arg-type]
        return plan_page.plan_page(given, ROOT)

    return call


def test_the_page_says_what_is_run_and_what_it_takes(planned: Callable[..., str], made: Plan) -> None:
    page = planned(replace(GIVEN, budget=1e3))
    assert page.startswith("# edm-digits\n\n1. distillation of edm-digits\n")
    assert (
        "[gs://b/a run/progress-run.html](https://storage.cloud.google.com/b/a%20run/progress-run.html)"
        in page
    )
    assert "progress-first" not in page
    assert "| edm-digits | 8 x h100-80gb | 0.0 of 73.6 |" in page
    assert f"| {made.gpu_hours:.1f} | {made.cost:,.0f} |" in page
    assert "GPU-hours of at most 1000." in page
    assert made.alternatives == ()


def test_a_run_that_takes_more_than_its_budget_is_refused(
    planned: Callable[..., str], refusal: Refusal
) -> None:
    longer = {"seconds": {"computing": 3600.0}}
    assert "GPU-hours" in planned(replace(GIVEN, budget=81), **longer)
    said = refusal(lambda: planned(replace(GIVEN, budget=79), **longer))
    assert "the trainings take 80.0 GPU-hours by their plan, more than the budget of 79" in said


def test_a_training_that_does_not_fit_is_refused(planned: Callable[..., str], refusal: Refusal) -> None:
    said = refusal(lambda: planned(memory={"activations": 90e9}, largest_micro_batch=3))
    assert "takes 90.0 GB of a GPU" in said
    assert "override engine.micro_batch=3" in said
    assert "activation_checkpointing=full" in refusal(
        lambda: planned(memory={"activations": 90e9}, largest_micro_batch=0)
    )
    assert "takes 650 GB of disk" in refusal(lambda: planned(checkpoint=200 * 10**9))


def test_without_a_known_gpu_there_is_no_plan_and_no_budget() -> None:
    for given, why in (
        (replace(GIVEN, gpus=0), "the run uses no GPU"),
        (replace(GIVEN, pool={}), f"the pool has no label {ACCELERATOR}"),
        (replace(GIVEN, pool={ACCELERATOR: "nvidia-tesla-t4"}), "the plan does not know the GPU tesla-t4"),
    ):
        assert f"There is no plan: {why}" in plan_page.plan_page(given, ROOT)
        with pytest.raises(Refused, match=f"budget is 5 GPU-hours, and {why}"):
            plan_page.plan_page(replace(given, budget=5), ROOT)


def test_the_pod_of_a_training_has_the_disk_that_sdxl_takes() -> None:
    weights = {"teacher": 2_567_460_000, "student": 2_567_460_000}
    needed = disk_gb(recipes.get("sdxl-4step"), 62_900_000_000, weights)
    assert round(needed) == 259  # 3 checkpoints, 50 GB of shards, two networks in float32
    assert HEAVY.disk == "500G"
