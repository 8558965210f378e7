"""An evaluation between its inputs and its result: all sets of images, made and measured in blocks of rows, and their scores.

Only one block of images is in memory at a time, and it is forgotten once it is measured. A block has its own seed, so that its images
are the same whoever makes it.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dmd2.config import Config
from dmd2.data.loader import Shards
from dmd2.data.shard_table import TRAIN
from dmd2.encoders.text import CutTexts, count_cut_texts
from dmd2.errors import Refused
from dmd2.evaluation.baselines import BASELINE
from dmd2.evaluation.blocks import FOLDER, MeasuredBlocks
from dmd2.evaluation.evaluator import BATCH, Evaluator, score_states
from dmd2.evaluation.features import load_extractor
from dmd2.evaluation.measurements import FEATURES
from dmd2.evaluation.memorisation import PAIRS, QUANTILE, Neighbours
from dmd2.evaluation.metrics import Metric
from dmd2.evaluation.protocols import describe_selection, make_card
from dmd2.evaluation.scores import REAL, MetricScores, score_facts
from dmd2.image_grid import image_grid
from dmd2.io.local import LocalStore, json_digest
from dmd2.io.store import Store
from dmd2.models.family import Prompt
from dmd2.progress import Progress
from dmd2.rng import seed_of_part
from dmd2.stages.baselines import baseline_sets
from dmd2.stages.image_sets import (
    REFERENCE,
    Network,
    RealSet,
    SampledSet,
    precision,
    prompts_to_sample,
    sampled_sets,
)
from dmd2.stages.kept_scores import BLOCKS, PICTURE, KeptScores
from dmd2.stages.parts import Part
from dmd2.stages.pictures import sample_grid, save_png
from dmd2.stages.prompts import grid_columns, preview_prompts

logger = logging.getLogger(__name__)
CLIP, CLIP_GALLERY = "clip", "lowest_clip"
"""The measurement, and the fact and file with the samples that fit their prompts least."""
GALLERIES = "galleries"
"""Folder of an evaluation with pictures of chosen samples."""
MAIN_SETS = ("student", "teacher")
CUT = "prompts_cut"
"""Beside the measurements of a block, (B,): the window of the text encoder if it does not see the end of the prompt, else 0."""


@dataclass(frozen=True)
class ImageBlocks:
    """A set of images that is made block by block."""

    title: str
    pins: dict[str, Any]
    """What decides the images and how they are measured."""
    blocks: MeasuredBlocks
    images: Callable[[range], Tensor]
    """Rows of a block -> images, uint8 (B, C, H, W)."""
    kept: Path | None
    """The files of the set if an earlier evaluation has kept it."""

    @property
    def depends_on_student(self) -> bool:
        return "student" in self.pins

    def redraw(self, rows: Sequence[int]) -> Tensor:
        """The images of single rows, each drawn with the block that it is in."""
        drawn: dict[int, Tensor] = {}
        for block in self.blocks.rows():
            if wanted := [row for row in rows if row in block]:
                images = self.images(block)
                drawn |= {row: images[row - block.start].clone() for row in wanted}
        return torch.stack([drawn[row] for row in rows])

    def measure_missing(self, evaluator: Evaluator, part: Part, visible: bool) -> None:
        """Make and measure those blocks of this part that are not there."""
        there = self.blocks.starts()
        mine = self.blocks.rows()[part[0] :: part[1]]
        done = sum(len(rows) for rows in mine if rows.start in there)
        title = f"evaluate {self.title}"
        with Progress(title, sum(map(len, mine)), "images", done, visible) as progress:
            for rows in (rows for rows in mine if rows.start not in there):
                prompts = self.blocks.prompts[rows.start : rows.stop]
                with count_cut_texts() as cut:
                    images = self.images(rows)
                windows = torch.tensor([cut.window if prompt in cut.texts else 0 for prompt in prompts])
                self.blocks.write(rows, evaluator.measure(images, prompts) | {CUT: windows})
                progress.advance(len(rows))


@dataclass(frozen=True)
class Evaluation:
    """One process's view of an evaluation whose inputs were checked."""

    config: Config
    sets: Mapping[str, SampledSet]
    reference: Shards
    train: Shards
    evaluator: Evaluator
    device: torch.device
    keep: KeptScores
    selection: Mapping[str, Any]
    """How the student's checkpoint was chosen."""

    def image_blocks(self, store: Store) -> dict[str, ImageBlocks]:
        """All sets of images by name, whose blocks are kept in the draft of the evaluation."""
        sampled = {name: self._sampled_blocks(each, store) for name, each in self.sets.items()}
        real = {name: self._real_blocks(name, store) for name in self.real}
        return {REFERENCE: real[REFERENCE]} | sampled | {REAL: real[REAL]}

    @cached_property
    def real(self) -> dict[str, RealSet]:
        count, family = self.config.evaluate.images, self.config.family
        reference = RealSet.of("real reference images", self.reference, count, family)
        return {REFERENCE: reference, REAL: RealSet.of("real training images", self.train, count, family)}

    @cached_property
    def prompts(self) -> list[Prompt]:
        """What is sampled, by student and teacher alike."""
        return prompts_to_sample(self.config, self.real[REFERENCE].prompts)

    @cached_property
    def card(self) -> dict[str, Any]:
        """All that decides the scores of a given network."""
        return make_card(self.config.evaluate) | {
            "prompts_sha256": json_digest(self.prompts),
            "reference": self.reference.manifest.digest,
            "reference_images": len(self.real[REFERENCE].prompts),
            "weights": {name: each.weights for name, each in self.evaluator.measurements.items()},
            "dtype": self._precision,
            "selection": self.selection,
            "final": {"split": self.reference.split, "seed": self.config.evaluate.seed},
        }

    def measure(self, store: Store, part: Part, visible: bool) -> None:
        """Make and measure the blocks of this part that are not there yet."""
        for each in self.image_blocks(store).values():
            each.measure_missing(self.evaluator, part, visible)

    def score(self, store: Store, selected: Sequence[Metric]) -> dict[str, Any]:
        """The scores of all sets, from their blocks, and what else the manifest says about them."""
        blocks = {name: each.blocks for name, each in self.image_blocks(store).items()}
        reference = blocks.pop(REFERENCE)
        states = self.evaluator.fold(reference.read_all())
        scores = {
            name: score_states(self.evaluator.fold(each.read_all()), states) for name, each in blocks.items()
        }
        by_metric = [
            MetricScores.of(metric, {name: found[metric.name] for name, found in scores.items()})
            for metric in selected
        ]
        facts = score_facts(by_metric, [each.description for each in self.sets.values()])
        facts |= self.evaluator.facts | self.evaluator.prompt_facts(self.prompts)
        settings = self.config.evaluate
        calls = {f"nfe_{name}": self.sets[name].description.calls for name in ("student", "teacher")}
        facts |= calls | {"images": settings.images, "seed": settings.seed, "dtype": self._precision}
        facts |= {"grid_prompts": self.grid_prompts, "images_real": len(reference.prompts), "card": self.card}
        facts |= self._memorisation(blocks, reference) | self._lowest_clip(blocks["student"])
        return (
            facts if self.config.family.prompts == "classes" else facts | self._cut_prompts(blocks["student"])
        )

    def _memorisation(
        self, blocks: Mapping[str, MeasuredBlocks], reference: MeasuredBlocks
    ) -> dict[str, Any]:
        """How many samples are nearer to training images than held-out ones are, and the nearest ones of the student."""
        if FEATURES not in self.evaluator.measurements:
            return {}
        training = blocks[REAL].column(FEATURES)
        held_out = Neighbours.of(reference.column(FEATURES), training)
        names = [n for n, s in self.sets.items() if n in MAIN_SETS or s.description.recipe == BASELINE]
        found = {name: Neighbours.of(blocks[name].column(FEATURES), training) for name in names}
        shares = {name: each.share_nearer(held_out) for name, each in found.items()}
        about = {"quantile": QUANTILE, "training_images": len(training), "shares": shares}
        return {"memorisation": about | {"nearest": found["student"].nearest(self.prompts)}}

    def _lowest_clip(self, student: MeasuredBlocks) -> dict[str, Any]:
        """The student's samples that fit their prompts least."""
        if CLIP not in self.evaluator.measurements:
            return {}
        cosines = student.column(CLIP)[:, 0]
        rows = cosines.argsort()[:PAIRS].tolist()
        found = [{"row": row, "score": float(cosines[row]), "prompt": self.prompts[row]} for row in rows]
        return {CLIP_GALLERY: found}

    def save_picture_grids(self, store: Store, folder: Path) -> None:
        """Save a picture grid of each set as `<name>.png`, and one of real reference images, for the preview prompts."""
        family, settings = self.config.family, self.config.evaluate
        prompts = self.grid_prompts
        kept = {name: each.kept for name, each in self.image_blocks(store).items()}
        for name, each in self.sets.items():
            if found := kept[name]:
                shutil.copyfile(found / PICTURE, folder / f"{name}.png")
            else:
                save_png(sample_grid(family, each.sampler, prompts, settings.seed), folder / f"{name}.png")
        real = next(self.reference.evenly_spaced_batches(settings.images, len(prompts))).image
        save_png(image_grid(real, grid_columns(family)), folder / f"{REAL}.png")

    @cached_property
    def grid_prompts(self) -> list[Prompt]:
        """Those of the picture grids, cell by cell."""
        return preview_prompts(self.config.family, self.reference)

    def save_galleries(self, store: Store, folder: Path, facts: Mapping[str, Any]) -> None:
        """Save the samples that the facts name in `galleries/`: `nearest.png`, above their nearest training images, and
        `lowest_clip.png`."""
        (folder / GALLERIES).mkdir(exist_ok=True)
        student = self.image_blocks(store)["student"]
        if about := facts.get("memorisation"):
            pairs = about["nearest"]
            samples = student.redraw([each["row"] for each in pairs])
            real = self.real[REAL].select([each["training_row"] for each in pairs])
            save_png(image_grid(torch.cat([samples, real]), len(pairs)), folder / GALLERIES / "nearest.png")
        if found := facts.get(CLIP_GALLERY):
            images = student.redraw([each["row"] for each in found])
            save_png(image_grid(images, len(found)), folder / GALLERIES / f"{CLIP_GALLERY}.png")

    def keep_scores(self, store: Store, scores: Mapping[str, Any], pictures: Path) -> None:
        """Keep the sets that do not depend on the student for later evaluations."""
        for name, each in self.image_blocks(store).items():
            if self.keep.uri and not each.kept and not each.depends_on_student:
                facts = {"scores": {name: scores[name]}} if name in scores else {}
                picture = pictures / f"{name}.png" if name in self.sets else None
                self.keep.keep(each.pins, each.blocks, facts, picture)

    def _real_blocks(self, name: str, store: Store) -> ImageBlocks:
        real = self.real[name]
        pins = {"shards": real.shards.manifest.digest, "split": real.shards.split}
        return self._blocks(store, real.title, pins, real.prompts, BATCH, real.images)

    def _sampled_blocks(self, each: SampledSet, store: Store) -> ImageBlocks:
        settings = self.config.evaluate
        pins = {"reference": self.reference.manifest.digest, "seed": settings.seed, "dtype": self._precision}

        def images(rows: range) -> Tensor:
            prompts = self.prompts[rows.start : rows.stop]
            return each.sampler(prompts, seed_of_part(settings.seed, rows.start))

        title = each.description.title
        return self._blocks(store, title, each.pins | pins, self.prompts, settings.batch, images)

    def _blocks(
        self,
        store: Store,
        title: str,
        pins: dict[str, Any],
        prompts: list[Prompt],
        size: int,
        images: Callable[[range], Tensor],
    ) -> ImageBlocks:
        pins |= {"images": len(prompts), "prompts_sha256": json_digest(prompts), "batch": size}
        pins |= {"resize": self.config.evaluate.resize, "weights": self.card["weights"]}
        kept = None if "student" in pins else self.keep.find(pins)
        place = (LocalStore(kept), BLOCKS) if kept else (store, f"{FOLDER}/{json_digest(pins)[:32]}")
        return ImageBlocks(title, pins, MeasuredBlocks(*place, prompts, size), images, kept)

    @property
    def _precision(self) -> str:
        return str(precision(self.device)).removeprefix("torch.")

    def _cut_prompts(self, blocks: MeasuredBlocks) -> dict[str, int]:
        """How many different texts were sampled, and how many of them are longer than the window of a text encoder; logged, too."""
        cut = CutTexts()
        for measured, prompts in blocks.read_all():
            windows = measured[CUT].tolist()
            cut.texts |= {str(text) for text, window in zip(prompts, windows, strict=True) if window}
            cut.window = max(cut.window, *windows)
        count = len(set(self.prompts))
        if said := cut.describe(count, "prompts"):
            logger.warning(said)
        return {"prompts": count, "prompts_cut": len(cut.texts)}


def open_evaluation(
    config: Config,
    data: str,
    reference: Shards,
    selected: Sequence[Metric],
    student: Network,
    teacher: Network,
    baselines: Mapping[str, str],
    device: torch.device,
    keep: KeptScores,
) -> Evaluation:
    """Check the reference images, and load the networks that measure.

    Args:
        baselines: {name of a baseline: its digest}.
    """
    settings = config.evaluate
    if (count := min(settings.images, len(reference))) < 2:
        raise Refused(
            f"{reference.uri} has {count} {reference.split} image; an evaluation needs at least 2, better thousands: shard again"
        )
    made = student.manifest
    selection = describe_selection(made.config.distill if made.config else None, made.facts)
    train = Shards(data, TRAIN)
    check_split(selection, reference, train)
    sets = sampled_sets(config, student, teacher) | baseline_sets(config, baselines, device)
    evaluator = Evaluator.load(selected, settings, lambda: load_extractor(config, data, device), device)
    return Evaluation(config, sets, reference, train, evaluator, device, keep, selection)


def check_split(selection: Mapping[str, Any], reference: Shards, train: Shards) -> None:
    """Raise Refused if the student's checkpoint was chosen by the images of its final score."""
    same = (reference.manifest.digest, reference.split) == (train.manifest.digest, selection.get("split"))
    if same:
        raise Refused(
            f"the student's checkpoint was chosen by FID to the {reference.split} images of {reference.uri} (distill.best), so a score by "
            "the same images would be too good; evaluate with held-out images, or give other shards as --reference"
        )
