"""The parts of a distillation between its inputs and its result: trainer, batches, previews, scores of checkpoints, the student."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import torch

from dmd2.batch import Batch
from dmd2.config import Config
from dmd2.data.loader import Shards
from dmd2.data.shard_table import TRAIN
from dmd2.io.artifact import Manifest, open_artifact
from dmd2.io.staging import Draft
from dmd2.licence import carried_licences
from dmd2.model import Model
from dmd2.models.family import check_same_family
from dmd2.parallel import sharding
from dmd2.parallel.ranks import World
from dmd2.plan.utilization import training_throughput
from dmd2.stages.distributed import batch_reader, training_facts
from dmd2.stages.networks import (
    check_same_text_encoders,
    check_same_vae,
    load_artifact_model,
    save_student,
    starting_weights,
    student_model,
)
from dmd2.stages.pictures import preview_family, sample_grid
from dmd2.stages.progress_page import ProgressPage
from dmd2.stages.prompts import preview_prompts, with_fake_prompts
from dmd2.training import build
from dmd2.training.compile_cache import CompileCache
from dmd2.training.exporter import Exporter, metrics_endpoint
from dmd2.training.loop import LoopSettings, ScoreFunction, load_best, train
from dmd2.training.metrics_log import read_metrics
from dmd2.training.spending import Spending, training_seconds
from dmd2.training.trainer import DMD2Trainer, RegressionTrainer
from dmd2.training.trainjob_status import trainjob_status


@dataclass(frozen=True)
class Distillation:
    """One process's view of a distillation whose inputs were checked."""

    config: Config
    world: World
    data: str
    samples: Manifest
    """Manifest of `data`."""
    teacher: str
    teacher_manifest: Manifest
    prompts: str
    model: Model
    """The teacher; its weights are loaded on rank 0 only, until the trainer has them."""

    @classmethod
    def open(
        cls,
        config: Config,
        world: World,
        data: str,
        samples: Manifest,
        teacher: str,
        teacher_manifest: Manifest,
        prompts: str,
    ) -> Self:
        """Load the teacher, and refuse a teacher, VAE or batch size that does not fit the recipe and the processes."""
        model = load_artifact_model(teacher, teacher_manifest, weights=world.is_main)
        check_same_family(model.config, config.family)
        check_same_vae(open_artifact(teacher, teacher_manifest, "vae/*"), samples, data)
        if config.family.prompts != "classes":
            check_same_text_encoders(teacher_manifest, samples, data)
        world.local_rows(config.distill.batch)
        return cls(config, world, data, samples, teacher, teacher_manifest, prompts, model)

    def run(
        self, draft: Draft, start: str, progress: str = "", price: float = 0.0, budget: float = 0.0
    ) -> None:
        """Train from the newest checkpoint in the draft, or from the run `start` or the teacher, and save the student.

        Args:
            progress: Address of a page about the training while it goes on; empty for none.
            price: Price of a GPU for an hour, for the page and the metrics; 0 = unknown.
            budget: Largest number of GPU-hours, for the same; 0 = no limit.
        """
        settings = self.config.distill
        loop_settings = LoopSettings(
            settings.steps,
            training_throughput(self.config, self.model.family, self.world),
            settings.log_every,
            settings.save_every,
            settings.preview_every,
            settings.keep_checkpoints,
            self.config.engine.hang_timeout_s,
            self.config.engine.compile_timeout_s,
        )
        trainer = self._trainer(start)
        student = replace(student_model(self.model, self.config), network=trainer.student.module)
        draft.facts["prompts"] = preview_prompts(
            self.config.family, Shards(self.data, TRAIN, self.samples.kind), self.prompts
        )
        preview = self._preview(student, trainer, draft)
        score = self._score(student, trainer, draft.path)
        recipe = self.config.recipe
        spending = self._spending(draft, price, budget)
        page = ProgressPage(progress, recipe, draft.path, settings.steps, spending, self.world)
        graphs = CompileCache(self.config.engine.compile_cache, self.world)

        def on_log(step: int, eta_s: float) -> None:
            page.update(step, eta_s)
            graphs.save()

        exporter = Exporter(recipe, draft.path, settings.steps, spending)
        is_main = self.world.is_main
        with (
            metrics_endpoint(exporter, is_main),
            trainjob_status(exporter, is_main),
            page.from_start_to_end(),
        ):
            train(
                "distill", trainer, self._batches(), loop_settings, draft, preview, self.world, score, on_log,
                exporter.report,
            )  # fmt: skip
        if score:
            draft.facts |= load_best(draft, trainer.student, self.world)
        weights = sharding.gather_full_tensors(trainer.student.inference_weights(), self.world)
        if self.world.is_main:
            save_student(draft, self.config, student, weights, self.teacher, self.teacher_manifest)
            draft.facts |= training_facts(trainer.student.module, settings.steps, settings.batch)
            draft.facts["gpus"] = self.world.size if self.world.device.type == "cuda" else 0
            draft.facts |= carried_licences(self.samples, self.teacher_manifest)

    def _spending(self, draft: Draft, price: float, budget: float) -> Spending:
        gpus = self.world.size if self.world.device.type == "cuda" else 0
        watch = draft.stopwatch
        if not watch:  # of another process than the main one
            return Spending(gpus)
        # What was killed could not say how long it had run: then its steps count.
        before = max(watch.before, training_seconds(read_metrics(draft.path), self.config.distill.batch))
        return Spending(gpus, before, watch.restarts, price, budget, watch.start)

    def _trainer(self, start: str) -> DMD2Trainer | RegressionTrainer:
        weights = self.model.network.state_dict() if self.world.is_main else {}
        started_from = starting_weights(start, weights=self.world.is_main)
        trainer = build.trainer(self.config, self.model.family, weights, self.world, started_from)
        self.model.network.to("meta")  # the trainer has a copy: 10 GB of the host's memory for SDXL
        return trainer

    def _batches(self) -> Callable[[int], Iterator[Batch]]:
        settings, family = self.config.distill, self.model.family
        read_batch = family.read_pairs if settings.regression else family.read
        batches = batch_reader(
            self.config, self.data, settings.batch, self.world, self.samples.kind, read_batch
        )
        return with_fake_prompts(batches, self.config, family, self.prompts, self.world.device)

    def _preview(
        self, student: Model, trainer: DMD2Trainer | RegressionTrainer, draft: Draft
    ) -> Callable[[int], None]:
        """Saves a grid of the student's samples after a step; all ranks take part in the sampling.

        What training has not compiled for as many rows runs without: a few pictures are not worth minutes of compiling.
        """
        folder = open_artifact(self.teacher, self.teacher_manifest)
        previewed = replace(student, family=preview_family(self.config, self.model, folder))

        def preview(step: int) -> None:
            with (
                torch.compiler.set_stance("eager_on_recompile"),
                trainer.student.swap_in_inference_weights(),
            ):
                picture = sample_grid(
                    self.config.family, previewed.sample_unchecked, draft.facts["prompts"], self.config.seed
                )
            if self.world.is_main:
                (draft.path / "previews").mkdir(exist_ok=True)
                picture.save(draft.path / "previews" / f"{step:08d}.png")

        return preview

    def _score(
        self, student: Model, trainer: DMD2Trainer | RegressionTrainer, folder: Path
    ) -> ScoreFunction | None:
        """Scores checkpoints against training samples, if the recipe keeps the best one."""
        if not self.config.distill.best.images:
            return None
        from dmd2.stages.checkpoint_score import checkpoint_score  # slow to import

        weights = trainer.student.swap_in_inference_weights
        return checkpoint_score(
            self.config, student, weights, self.data, self.samples, self.prompts, self.world, folder
        )
