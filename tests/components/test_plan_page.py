"""The plan of a run as a page, and what it refuses."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

import pytest

from components.prepare_run import plan_page
from components.prepare_run.cost import ACCELERATOR
from components.prepare_run.parameters import RunParameters, Training
from components.prepare_run.plan_page import disk_gb
from dmd2 import recipes
from dmd2.errors import Refused
from dmd2.plan import passes
from dmd2.plan.hardware import GPUS, USABLE
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
    return plan_page._plan(GIVEN, GIVEN.last, lambda plan: None)


@pytest.fixture
def planned(made: Plan, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """The page, with some of the figures of its plan replaced."""

    def call(given: RunParameters = GIVEN, **changes: object) -> str:
        changed = replace(made, **changes)  # type: ignore[arg-type]

        def plan(given: RunParameters, training: Training, check: Callable[[Plan], None]) -> Plan:
            check(changed)
            return changed

        monkeypatch.setattr(plan_page, "_plan", plan)
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
    assert "the trainings take at least 80.0 GPU-hours by their plan, more than the budget of 79" in said


def test_a_training_that_takes_more_disk_than_its_pod_has_is_refused(
    planned: Callable[..., str], refusal: Refusal
) -> None:
    assert "takes 650 GB of disk" in refusal(lambda: planned(checkpoint=200 * 10**9))


@pytest.fixture
def on_small_gpus(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], RunParameters]:
    """A training on one GPU with a fraction of the memory that it takes."""
    changes = "family.network.channels=64 engine.micro_batch=4"
    given = replace(GIVEN, overrides=f"{GIVEN.overrides} {changes}", gpus=1)
    needed = plan_page._plan(given, given.last, lambda plan: None).memory_gb

    def call(fraction: float) -> RunParameters:
        monkeypatch.setitem(GPUS, "small", replace(GPUS["l4-24gb"], gb=fraction * needed / USABLE))
        return replace(given, pool={ACCELERATOR: "nvidia-small"})

    return call


def test_the_refusal_of_a_training_that_does_not_fit_names_settings_with_which_it_does(
    on_small_gpus: Callable[[float], RunParameters], refusal: Refusal
) -> None:
    given = on_small_gpus(0.8)
    said = refusal(lambda: plan_page.plan_page(given, ROOT))
    assert "GB of a GPU by its plan, and small has" in said
    settings = re.search(
        r"; add (\S.*) to overrides, with which it takes .*, or take more or larger GPUs$", said
    )
    assert settings
    changed = replace(given, overrides=f"{given.overrides} {settings[1]}")
    assert plan_page.plan_page(changed, ROOT).startswith("# edm-digits")


def test_a_training_that_no_setting_makes_fit_needs_other_gpus(
    on_small_gpus: Callable[[float], RunParameters], refusal: Refusal
) -> None:
    said = refusal(lambda: plan_page.plan_page(on_small_gpus(0.001), ROOT))
    assert said.endswith("; no setting of engine or moments makes it fit; take more or larger GPUs")


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each pass of a network that the plan has run."""
    runs: list[int] = []
    measure = passes._measure

    def note(fake: passes.FakeTrainer, rows: int, forward: Callable[[], passes.Backward]) -> passes.PassCost:
        runs.append(rows)
        return measure(fake, rows, forward)

    monkeypatch.setattr(passes, "_measure", note)
    return runs


def test_a_refusal_waits_for_no_more_passes_than_it_takes_to_know(
    made: Plan, counted: list[int], refusal: Refusal
) -> None:
    longer = replace(GIVEN, overrides=f"{GIVEN.overrides} distill.steps=1000000000")
    known: list[Plan] = []
    plan_page._plan(longer, longer.last, known.append)
    assert (
        counted == [made.rows] * 6
    )  # student without and with its graph; two losses of the student, two of the critic
    for given, sentence, most in (
        (replace(longer, overrides=f"{longer.overrides} loader.cache_gb=600"), "GB of disk", 0),
        (replace(longer, budget=1), "more than the budget of 1;", 0),
        (replace(longer, budget=0.99 * known[3].gpu_hours), "more than the budget of", 3),
    ):
        counted.clear()
        assert sentence in refusal(lambda given=given: plan_page.plan_page(given, ROOT))  # type: ignore[misc]
        assert len(counted) <= most


def test_a_plan_of_some_passes_is_below_that_of_all(made: Plan) -> None:
    known: list[Plan] = []
    whole = plan_page._plan(GIVEN, GIVEN.last, known.append)
    assert len(known) == 7
    assert known[-1] == whole == made
    for name in ("memory_gb", "gpu_hours"):
        values = [getattr(plan, name) for plan in known]
        assert values == sorted(values)
        assert values[0] < values[-1]
    assert {plan.checkpoint for plan in known} == {whole.checkpoint}


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
