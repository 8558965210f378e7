"""Protocols: what has to be the same for two scores to be comparable, one table, `PROTOCOLS`.

A protocol is the evaluation section of a recipe, under a name. Every result comes with a *card*: the values that were used, those
that differ from the protocol, and digests of prompts, reference images and weights. Cards that differ in a value are not compared.
The rows follow what the reference implementation of DMD2 measured, and say where they do not. Importing this imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dmd2.config import DistillConfig, EvaluateConfig
from dmd2.errors import Refused, near_miss

PINNED = (
    "images",
    "seed",
    "batch",
    "prompts",
    "resize",
    "features",
    "inception",
    "teacher_steps",
    "teacher_guidance",
)
"""Fields of the evaluation's settings that decide a score. The metrics are free."""
SELECTION_SPLIT = "train"
"""The images by which checkpoints are chosen, during training and by --follow."""
DESCRIPTIVE = ("protocol", "differs", "selection", "final")
"""Fields of a card that two comparable cards may differ in."""


@dataclass(frozen=True)
class Protocol:
    """A row of the table."""

    settings: EvaluateConfig
    reference: str
    """What the reference images are."""
    differs: str
    """Where it differs from what was published, and why."""


def _protocol(name: str, reference: str, differs: str, **settings: Any) -> tuple[str, Protocol]:
    return name, Protocol(EvaluateConfig(protocol=name, **settings), reference, differs)


PROTOCOLS: dict[str, Protocol] = dict(
    (
        _protocol(
            "imagenet64-50k",
            "held-out training images, or those of a set given as --reference; published FIDs use the statistics of all training images",
            "published: blocks of 128 seeded by rank, and a second moment that begins at one instead of zero",
            prompts="balanced",
        ),
        _protocol(
            "coco30k-256",
            "the 30,000 captioned images of COCO 2014's validation set, sharded and given as --reference (zero-shot)",
            "published: noise seeded by batch, alpha of timestep 999 set to 0.0047 by hand, reference of all 40,504 images",
            images=30_000,
            batch=64,
            resize=256,
            teacher_steps=50,
            teacher_guidance=3.0,
        ),
        _protocol(
            "coco10k-1024",
            "10,000 captioned images of COCO 2014's validation set, sharded and given as --reference (zero-shot)",
            "published: both text encoders got the tokens of the first tokenizer; here each gets its own",
            images=10_000,
            batch=32,
            resize=512,
            teacher_steps=50,
            teacher_guidance=6.0,
        ),
        _protocol("folder", "the held-out images of the shards, or those of --reference", "not published"),
        _protocol(
            "digits",
            "1,000 held-out digits",
            "not published",
            features="classifier",
            images=2000,
        ),
        _protocol(
            "emoji",
            "786 held-out emoji",
            "not published",
            features="efficientnet",
            images=786,
            teacher_steps=30,
            teacher_guidance=3.0,
        ),
    )
)
"""{name: row}."""


def find_protocol(name: str) -> Protocol:
    """The row with this name; an unknown name is refused."""
    if name not in PROTOCOLS:
        raise Refused(f"evaluate.protocol is {name!r}, which is none; {near_miss(name, PROTOCOLS)}")
    return PROTOCOLS[name]


def make_card(settings: EvaluateConfig) -> dict[str, Any]:
    """The values that decide a score, and as `differs` those of them that are not the protocol's."""
    given, protocol = _pinned_values(settings), _pinned_values(find_protocol(settings.protocol).settings)
    differs = {name: value for name, value in given.items() if value != protocol[name]}
    return {"protocol": settings.protocol, "differs": differs} | given


def describe_selection(training: DistillConfig | None, facts: Mapping[str, Any]) -> dict[str, Any]:
    """How the checkpoint of a run was chosen, from its settings and the facts of its manifest; `split` are the images that its scores
    were compared with."""
    if not training or "best_step" not in facts:
        return {"checkpoint": "last"}
    by = {
        "metric": "fid",
        "images": training.best.images,
        "split": SELECTION_SPLIT,
        "seed": training.best.seed,
    }
    return {"checkpoint": facts["best_step"]} | by


def _pinned_values(settings: EvaluateConfig) -> dict[str, Any]:
    values = settings.model_dump(mode="json", include=set(PINNED))
    values["inception"] = values["inception"]["sha256"]
    return {name: values[name] for name in PINNED}


def check_comparable(one: Mapping[str, Any], other: Mapping[str, Any], what: str) -> None:
    """Raise Refused if two cards differ in a value; `what` says whose they are, as `A and B`."""
    flat, theirs = _flat(one, other), _flat(other, one)
    for name in (name for name in flat | theirs if name not in DESCRIPTIVE):
        if flat.get(name) != theirs.get(name):
            raise Refused(
                f"the scores of {what} cannot be compared: {name} is {flat.get(name)!r} in one and {theirs.get(name)!r} in the other; "
                "evaluate both by the same protocol"
            )


def _flat(card: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """A card with the weights of those networks that both cards know, each as a value of its own."""
    common = {name: sha for name, sha in card["weights"].items() if name in other["weights"]}
    return {k: v for k, v in card.items() if k != "weights"} | {
        f"weights of {k}": v for k, v in common.items()
    }
