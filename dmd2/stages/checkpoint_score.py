"""The score that selects the best checkpoint of a distillation (`distill.best`): FID to the training samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from dmd2.config import Config
from dmd2.data.loader import RawBatch, Shards
from dmd2.data.prompts import read_prompts
from dmd2.data.shard_table import TRAIN
from dmd2.evaluation import features
from dmd2.evaluation.checkpoint_score import load_scorer
from dmd2.io.artifact import Manifest
from dmd2.model import Model
from dmd2.models.family import Prompt
from dmd2.parallel.ranks import World
from dmd2.stages.prompts import prompts_of_images, rows_of_prompts
from dmd2.training.loop import ScoreFunction


def checkpoint_score(
    config: Config,
    student: Model,
    weights: Callable[[], AbstractContextManager[None]],
    data: str,
    samples: Manifest,
    prompts: str,
    world: World,
    folder: Path | None = None,
) -> ScoreFunction:
    """A function that samples the student with its current weights and returns the FID to the training samples.

    Inside `weights()`, the student has its inference weights. Where the recipe scores no checkpoints during training, images and
    features are those of its evaluation.

    Args:
        folder: Of the run, where the moments of the training samples are kept for its next start, by the digest of the feature network.
    """
    best = config.distill.best
    settings = best if best.images else best.model_copy(update={"images": config.evaluate.images})
    texts = read_prompts(prompts) if prompts else ()

    def prompts_for(rows: range, images: RawBatch) -> Sequence[Prompt]:
        return rows_of_prompts(texts, rows) if texts else prompts_of_images(config.family, images)

    with world.main_process_first():
        if best.images:
            extract = features.load_pretrained(best, "distill.best", world.device)
        else:
            extract = features.load_extractor(config, data, world.device)
    train = Shards(data, TRAIN, samples.kind, config.loader.cache_gb)
    kept = folder / f"training-features-{extract.digest[:16]}.safetensors" if folder else None
    scorer = load_scorer(
        settings, extract, student.sample_unchecked, train, student.family, prompts_for, world, kept
    )

    def score(report: Callable[[str], None]) -> float:
        with weights():
            return scorer(report)

    return score
