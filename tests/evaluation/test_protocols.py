"""Protocols: each recipe names one, and what differs from it is on the card of a result."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dmd2 import recipes
from dmd2.config import BestConfig, Config
from dmd2.data.loader import Shards
from dmd2.evaluation.features import cut_and_reduce
from dmd2.evaluation.protocols import PROTOCOLS, check_comparable, describe_selection, make_card
from dmd2.io.artifact import read_manifest
from dmd2.stages.evaluation import check_split

Refusal = Callable[[Callable[[], object]], str]


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_every_recipe_follows_its_protocol(name: str) -> None:
    settings = recipes.get(name).evaluate
    assert settings.protocol != "folder"
    assert make_card(settings)["differs"] == {}


def test_values_of_the_published_evaluations() -> None:
    coco, sdxl, imagenet = (PROTOCOLS[n].settings for n in ("coco30k-256", "coco10k-1024", "imagenet64-50k"))
    assert (coco.images, coco.resize, coco.teacher_guidance) == (30_000, 256, 3.0)
    assert (sdxl.images, sdxl.resize, sdxl.teacher_steps) == (10_000, 512, 50)
    assert (imagenet.images, imagenet.prompts, imagenet.seed) == (50_000, "balanced", 10)
    for settings in (coco, sdxl, imagenet):
        assert (settings.features, settings.inception.sha256[:12]) == ("inception", "f58cb9b6ec32")


def test_a_card_says_what_differs_from_the_protocol(made: Path) -> None:
    card = read_manifest(made / "evaluation", "evaluation").facts["card"]
    assert card["protocol"] == "digits"
    assert card["differs"] == {"images": 24, "batch": 12, "teacher_steps": 3}
    assert len(card["weights"]["features"]) == len(card["prompts_sha256"]) == 64


def test_cards_that_differ_are_not_compared(made: Path, refusal: Refusal) -> None:
    card = read_manifest(made / "evaluation", "evaluation").facts["card"]
    check_comparable(card, card | {"protocol": "emoji"}, "a and b")
    other = card | {"seed": 11}
    assert "seed is 10 in one and 11 in the other" in refusal(
        lambda: check_comparable(card, other, "a and b")
    )
    more = card | {"weights": card["weights"] | {"clip": "1"}}
    check_comparable(card, more, "a and b")
    changed = card | {"weights": {"features": "1"}}
    assert "weights of features" in refusal(lambda: check_comparable(card, changed, "a and b"))


def test_the_card_says_by_which_images_the_checkpoint_was_chosen(
    made: Path, micro: Config, refusal: Refusal
) -> None:
    card = read_manifest(made / "evaluation", "evaluation").facts["card"]
    assert card["selection"] == {"checkpoint": "last"}
    assert card["final"] == {"split": "holdout", "seed": 10}
    chosen = micro.distill.model_copy(update={"best": BestConfig(images=16)})
    selection = describe_selection(chosen, {"best_step": 8})
    assert selection == {"checkpoint": 8, "metric": "fid", "images": 16, "split": "train", "seed": 20}
    check_comparable(card, card | {"selection": selection}, "a and b")
    train, held_out = (Shards(made / "shards", split) for split in ("train", "holdout"))
    check_split(selection, held_out, train)
    check_split(card["selection"], train, train)
    assert "would be too good" in refusal(lambda: check_split(selection, train, train))


def test_an_unknown_protocol_is_refused(refusal: Refusal) -> None:
    settings = recipes.resolve("edm-digits", ("evaluate.protocol=digit",)).evaluate
    assert "did you mean" in refusal(lambda: make_card(settings))


def test_images_are_cut_at_the_centre_and_reduced_by_lanczos() -> None:
    image = np.random.default_rng(0).integers(0, 256, (40, 64, 3), dtype=np.uint8)
    expected = Image.fromarray(image).crop((12, 0, 52, 40)).resize((16, 16), Image.Resampling.LANCZOS)
    assert np.array_equal(cut_and_reduce(image, 16), np.asarray(expected))
