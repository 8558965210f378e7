"""Scores of the checkpoints of a training while it runs, by another process or machine than those that train.

Each complete checkpoint is scored once, by the code with which `distill.best` scores it during training: FID to training samples. The
curve is `curve/metrics.jsonl` of the unfinished result, to which a line is added after each score, so that a follower that is started
again goes on behind it. What is read of a checkpoint is a snapshot: the training may delete it meanwhile.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from dmd2.config import Config
from dmd2.errors import Refused
from dmd2.io.artifact import MANIFEST, Manifest
from dmd2.io.local import LocalStore, write_text
from dmd2.io.staging import Draft, draft_folder
from dmd2.io.storage import open_store
from dmd2.io.store import Store
from dmd2.model import Model
from dmd2.parallel.ranks import World
from dmd2.stages.checkpoint_score import checkpoint_score
from dmd2.stages.image_sets import precision
from dmd2.stages.networks import load_artifact_model, student_model
from dmd2.training import checkpoint, networks
from dmd2.training.checkpoint import Stateful
from dmd2.training.ema import Ema
from dmd2.training.metrics_log import METRICS, SCORE, checkpoint_scores, truncate_after
from dmd2.training.optim import TrainableWeights

logger = logging.getLogger(__name__)
BEST = "best.json"
"""File with the step and score of the best checkpoint up to now."""
POLL_S = 10.0
"""Seconds between looks at the training's folder."""
CHECKPOINT = re.compile(rf"checkpoints/(\d+)/{re.escape(MANIFEST)}")
ALL = 2**62


@dataclass(frozen=True)
class FollowedRun:
    """The folder of a training, unfinished or finished."""

    uri: str

    @property
    def stores(self) -> list[Store]:
        """Where its files may be: on this machine, those of an unfinished run are in a hidden folder beside it."""
        store = open_store(self.uri)
        if store.local_folder is None:
            return [store]
        return [store, LocalStore(draft_folder(store.local_folder.absolute()))]

    @property
    def is_finished(self) -> bool:
        return open_store(self.uri).version(MANIFEST) is not None

    def steps(self) -> set[int]:
        """Steps of the complete checkpoints that are there now."""
        names = [info.name for store in self.stores for info in store.list_objects("checkpoints/")]
        return {int(found[1]) for found in map(CHECKPOINT.fullmatch, names) if found}

    def take_snapshot(self, step: int, root: Path) -> None:
        """Have the files of a checkpoint in `root/<step>`, without a copy where the disk is the same.

        Raises:
            FileNotFoundError: It was deleted meanwhile.
        """
        shutil.rmtree(root, ignore_errors=True)
        prefix = f"checkpoints/{step:08d}/"
        for store in self.stores:
            for info in store.list_objects(prefix):
                path = checkpoint.folder_of(root, step) / info.name.removeprefix(prefix)
                path.parent.mkdir(parents=True, exist_ok=True)
                _link_or_download(store, info.name, path)


def _link_or_download(store: Store, name: str, path: Path) -> None:
    if store.local_folder:
        try:
            os.link(store.local_folder / name, path)
            return
        except FileNotFoundError:
            raise
        except OSError:  # another disk
            pass
    store.download(name, path)


class FollowedStudent:
    """The student of a training, with the inference weights of one checkpoint after another."""

    def __init__(self, config: Config, teacher: str, original: Manifest, device: torch.device) -> None:
        base, lora = load_artifact_model(teacher, original), config.distill.lora
        if lora:
            network = networks.with_lora(base.network, base.family, lora)
        else:
            network = base.network.requires_grad_(True)
        student = student_model(base, config)
        self.model: Model = replace(student, network=network.to(device), dtype=precision(device))
        self.weights, emas = TrainableWeights(network), config.distill.student.ema
        self.ema = Ema(network, emas[-1]) if emas else None
        self.saved: dict[str, Stateful] = {"student": self.weights}
        if self.ema:
            self.saved = {f"student.average{len(emas) - 1}": self.ema}

    def load(self, root: Path, step: int) -> None:
        checkpoint.load(root, step, self.saved)
        if self.ema:
            self.weights.load_state_dict(self.ema.shadow)


@dataclass
class Follower:
    """Scores checkpoints until the training is done, or none has been better for long."""

    run: FollowedRun
    draft: Draft
    """Of the curve."""
    student: FollowedStudent
    score: Callable[[], float]
    patience: int
    """Checkpoints without an improvement after which it stops; 0 = it does not."""
    idle_s: float
    """Seconds without a new checkpoint after which it stops."""
    broken: set[int] = field(default_factory=set)
    """Steps whose checkpoint could not be read."""

    def follow(self) -> str:
        """Score what comes until the end; why it ended."""
        self.folder.mkdir(exist_ok=True)
        if not self.run.steps():
            logger.warning("%s has no complete checkpoint yet; waiting for one", self.run.uri)
        truncate_after(self.folder / METRICS, ALL)  # drops half a line that a killed follower has left
        last_news = time.monotonic()
        while True:
            finished = (
                self.run.is_finished
            )  # before the checkpoints are listed, or the last ones could be missed
            before = len(self.scores)
            for step in self._missing():
                self._score(step)
                if self._is_exhausted():
                    return f"no improvement for {self.patience} checkpoints"
            if len(self.scores) > before:
                last_news = time.monotonic()
            elif finished:
                return "the training is done"
            elif time.monotonic() - last_news > self.idle_s:
                if not self.scores:
                    logger.warning("no checkpoint of %s could be scored; check the address", self.run.uri)
                return f"no new checkpoint for {self.idle_s / 60:g} minutes"
            else:
                time.sleep(POLL_S)

    @property
    def folder(self) -> Path:
        return self.draft.path / "curve"

    @property
    def scores(self) -> dict[int, float]:
        return checkpoint_scores(self.folder)

    def facts(self, why: str) -> dict[str, Any]:
        """What the manifest says of the curve."""
        scores = self.scores
        best = min(scores, key=scores.__getitem__, default=None)
        found = {} if best is None else {"best_step": best, "best_fid": scores[best]}
        return {"stopped": why, "checkpoints": len(scores), "unreadable": sorted(self.broken)} | found

    def _missing(self) -> Iterator[int]:
        """Steps that were not scored yet, in their order."""
        yield from sorted(self.run.steps() - self.scores.keys())

    def _score(self, step: int) -> None:
        """Score a checkpoint and note it, unless it is gone or unreadable: then it is tried again as long as it is there."""
        snapshot = self.draft.path / ".snapshot"
        try:
            self.run.take_snapshot(step, snapshot)
            self.student.load(snapshot, step)
        except (OSError, Refused, ValueError) as error:
            if step not in self.broken:
                logger.warning("the checkpoint of step %d is not scored: %s", step, error)
            self.broken.add(step)
            return
        finally:
            shutil.rmtree(snapshot, ignore_errors=True)
        score = self.score()
        self.broken.discard(step)
        self._note(step, score)

    def _note(self, step: int, score: float) -> None:
        with (self.folder / METRICS).open("a") as stream:
            stream.write(json.dumps({"step": step, SCORE: float(f"{score:.6g}")}) + "\n")
            stream.flush()
            os.fsync(stream.fileno())
        best = min(self.scores.items(), key=lambda found: found[1])
        write_text(self.folder / BEST, json.dumps({"step": best[0], "fid": best[1]}))
        self.draft.save()
        logger.info("step %d: FID %.4g; best: %.4g at step %d", step, score, best[1], best[0])

    def _is_exhausted(self) -> bool:
        scores = self.scores
        if not self.patience or not scores:
            return False
        best = min(scores, key=scores.__getitem__)
        return sum(step > best for step in scores) >= self.patience


def make_score(
    config: Config, data: str, samples: Manifest, teacher: str, original: Manifest, world: World
) -> tuple[FollowedStudent, Callable[[], float]]:
    """The student, and the function that scores it as it is."""
    student = FollowedStudent(config, teacher, original, world.device)
    score = checkpoint_score(config, student.model, nullcontext, data, samples, "", world)
    return student, lambda: score(lambda note: None)
