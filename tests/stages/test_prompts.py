"""What the fake samples of a training step are conditioned on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dmd2 import recipes, stages
from dmd2.batch import Batch, Conditioning
from dmd2.config import Config
from dmd2.models.family import make_family
from dmd2.rng import Rng
from dmd2.stages.prompts import with_fake_prompts

CPU = torch.device("cpu")


def batches_of(rows: range, seed: int = 5) -> Callable[[int], Iterator[Batch]]:
    """Endless batches of these rows of 8, all of class 0 and with the step as their caption."""

    def batches(first: int) -> Iterator[Batch]:
        step = first
        while True:
            cond = Conditioning(label=torch.zeros(len(rows), dtype=torch.int64))
            text = Conditioning(text=torch.full((len(rows), 1, 1), float(step)))
            yield Batch(torch.zeros(len(rows), 1, 8, 8), cond, text, Rng.at(seed, step, rows, CPU))
            step += 1

    return batches


def labels(config: Config, rows: range, steps: range) -> torch.Tensor:
    """The classes of the fakes: (steps, rows)."""
    stream = with_fake_prompts(batches_of(rows), config, make_family(config.family), "", CPU)(steps.start)
    return torch.stack([next(stream).for_fakes().cond["label"] for _ in steps])


def test_classes_of_fakes_are_uniform_and_not_those_of_the_real_samples(micro: Config) -> None:
    drawn = labels(micro, range(8), range(300))
    counts = drawn.flatten().bincount(minlength=3)
    assert len(counts) == 3
    assert (counts - 800).abs().max() < 5 * (2400 * 2 / 9) ** 0.5  # five standard deviations
    assert (drawn[:, 0] != drawn[:, 1]).any()


def test_classes_of_fakes_are_the_same_for_any_number_of_processes_and_after_a_resume(micro: Config) -> None:
    whole = labels(micro, range(8), range(6))
    parts = [labels(micro, range(rank, 8, 2), range(6)) for rank in range(2)]
    assert torch.equal(whole[:, 0::2], parts[0])
    assert torch.equal(whole[:, 1::2], parts[1])
    assert torch.equal(whole[4:], labels(micro, range(8), range(4, 6)))


def test_captions_of_fakes_are_those_of_the_next_batch(micro: Config) -> None:
    config = recipes.get("sdxl-4step")
    stream = with_fake_prompts(batches_of(range(8)), config, make_family(micro.family), "", CPU)(3)
    found = next(stream)
    assert found.uncond["text"][0] == 3
    assert found.for_fakes().uncond["text"][0] == 4
    assert all(part.for_fakes().uncond["text"][0] == 4 for part in found.split(3))


def test_fakes_have_the_conditioning_of_the_real_samples_where_the_recipe_says_so(micro: Config) -> None:
    config = recipes.resolve("edm-digits", ["distill.fake_prompts=batch"])
    stream = with_fake_prompts(batches_of(range(8)), config, make_family(micro.family), "", CPU)(0)
    assert next(stream).of_fakes is None


FROM_A_LIST = {"sd15-1step", "sd15-1step-gan", "sdxl-1step"}
FIRST_STAGE = {
    "edm-digits-longer": "edm-digits-no-gan",
    "edm-imagenet64-longer": "edm-imagenet64-no-gan",
    "sd15-1step-gan": "sd15-1step",
    "sdxl-1step": "sdxl-1step-warmup",
    "sdxl-1step-emoji": "sdxl-1step-warmup-emoji",
}


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_a_recipe_says_what_its_fakes_are_conditioned_on_and_what_it_starts_from(name: str) -> None:
    settings = recipes.get(name).distill
    wanted = "list" if name in FROM_A_LIST else "independent"
    own = settings.regression or settings.inputs == "noised-real"
    assert settings.fake_prompts == ("batch" if own else wanted)
    assert settings.first_stage == FIRST_STAGE.get(name, "teacher")
    if name in FIRST_STAGE:
        assert FIRST_STAGE[name] in recipes.RECIPES


@pytest.mark.parametrize(
    ("recipe", "given", "sentence"),
    [
        ("sd15-1step", {}, "draws the prompts of fake samples from a list; give a file as --prompts"),
        ("sdxl-1step", {"prompts": "a.txt"}, "starts from a run of sdxl-1step-warmup; give it as --start"),
        ("edm-digits", {"prompts": "a.txt"}, "conditioned on classes; leave out --prompts"),
        ("sdxl-4step-noised-real", {"prompts": "a.txt"}, "leave out --prompts"),
        ("sdxl-1step-warmup", {"prompts": "a.txt"}, "leave out --prompts"),
    ],
)
def test_what_a_recipe_needs_and_cannot_use_is_said_before_anything_is_read(
    recipe: str, given: dict[str, str], sentence: str, tmp_path: Path, refusal: Callable[..., str]
) -> None:
    nothing = str(tmp_path / "nothing")
    arguments: dict[str, Any] = {"data": nothing, "teacher": nothing, "out": str(tmp_path / "run")} | given
    assert sentence in refusal(lambda: stages.distill(recipes.get(recipe), **arguments))


@pytest.mark.parametrize("field", ["distill.fake_prompts=independent", "distill.fake_prompts=list"])
def test_noised_real_inputs_have_prompts_of_their_own(field: str, refusal: Callable[..., str]) -> None:
    assert "set it to batch" in refusal(lambda: recipes.resolve("sdxl-4step-noised-real", [field]))
