"""The settings of baselines, and what is no pipeline that can be one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dmd2 import recipes
from dmd2.evaluation.baselines import Baseline, parse_baselines
from dmd2.models.pipeline import Pipeline, find_pipeline
from dmd2.stages.baselines import baseline_digests

Refusal = Callable[[Callable[[], object]], str]


def test_a_baseline_has_a_name_a_source_and_perhaps_steps_and_guidance() -> None:
    specs = ("lcm=gs://b/lcm:4:1.5", "lightning=ByteDance/SDXL@main:2", "dmd2=runs/a:b")
    assert parse_baselines(specs) == [
        Baseline("lcm", "gs://b/lcm", 4, 1.5),
        Baseline("lightning", "ByteDance/SDXL@main", 2, 1.0),
        Baseline("dmd2", "runs/a:b", 0, 1.0),
    ]
    assert [each.calls for each in parse_baselines(specs)] == [8, 2, 0]


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        ("runs/a", "is no baseline"),
        ("a b=runs/a", "is no baseline"),
        ("teacher_4step=runs/a", "another set of images"),
        ("real=a", "another set of images"),
    ],
)
def test_other_settings_are_refused(spec: str, sentence: str, refusal: Refusal) -> None:
    assert sentence in refusal(lambda: parse_baselines([spec]))
    assert "another set of images" in refusal(lambda: parse_baselines(["a=b", "a=c"]))


def pipeline_index(folder: Path, **changes: Any) -> str:
    index = {
        "_class_name": "StableDiffusionXLPipeline",
        "unet": ["diffusers", "UNet2DConditionModel"],
        "scheduler": ["diffusers", "LCMScheduler"],
        "feature_extractor": [None, None],
        "force_zeros_for_empty_prompt": True,
    }
    folder.mkdir(exist_ok=True)
    (folder / "model_index.json").write_text(json.dumps(index | changes))
    return str(folder)


def test_the_parts_of_a_pipeline_are_those_that_it_names(tmp_path: Path) -> None:
    found = find_pipeline(pipeline_index(tmp_path / "a"))
    assert (found.kind, set(found.parts)) == ("StableDiffusionXLPipeline", {"unet", "scheduler"})
    assert found.flags == {"force_zeros_for_empty_prompt": True}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"_class_name": ["my_code", "MyPipeline"]}, "give a text-to-image pipeline"),
        ({"_class_name": "DiTPipeline"}, "takes no prompt"),
        ({"unet": ["my_code", "MyNetwork"]}, "only classes of diffusers and transformers are loaded"),
        ({"../x": ["diffusers", "UNet2DConditionModel"]}, "only classes of diffusers"),
    ],
)
def test_a_pipeline_with_code_of_its_own_or_without_prompts_is_refused(
    changes: dict[str, Any], sentence: str, tmp_path: Path, refusal: Refusal
) -> None:
    source = pipeline_index(tmp_path / "a", **changes)
    assert sentence in refusal(lambda: find_pipeline(source))


def test_guidance_costs_a_second_call_unless_the_network_gets_it_as_an_input(tmp_path: Path) -> None:
    def calls(guidance: float, **config: int) -> int:
        (tmp_path / "unet").mkdir(exist_ok=True)
        (tmp_path / "unet" / "config.json").write_text(json.dumps(config))
        parts = {"unet": ("diffusers", "UNet2DConditionModel")}
        return Pipeline("a", tmp_path, "StableDiffusionXLPipeline", parts, {}).calls(4, guidance)

    assert (calls(1.0), calls(5.0), calls(5.0, time_cond_proj_dim=256)) == (4, 8, 4)


def test_a_folder_without_a_model_and_a_pipeline_for_classes_are_refused(
    tmp_path: Path, refusal: Refusal
) -> None:
    assert "no model_index.json" in refusal(lambda: find_pipeline(str(tmp_path)))
    digits = recipes.resolve("edm-digits", (f"evaluate.baselines=other={tmp_path}:4",))
    assert "not by classes" in refusal(lambda: baseline_digests(digits))
    emoji = recipes.resolve("sdxl-4step-emoji", (f"evaluate.baselines=other={tmp_path}",))
    assert "in how many steps" in refusal(lambda: baseline_digests(emoji))
