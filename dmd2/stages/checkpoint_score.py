"""The score that selects the best checkpoint of a distillation (`distill.best`): FID to the training samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from dmd2.config import Config
from dmd2.data.loader import RawBatch, Shards
from dmd2.data.prompts import read_prompts
from dmd2.data.shards import TRAIN
from dmd2.evaluation import features
from dmd2.evaluation.checkpoint_score import load_scorer
from dmd2.io.artifact import Manifest
from dmd2.model import Model
from dmd2.models.family import Prompt
from dmd2.parallel.ranks import World
from dmd2.stages.prompts import prompts_of_images, rows_of_prompts
from dmd2.training.loop import ScoreFunction
from dmd2.training.optim import Trainable


def checkpoint_score(
    config: Config,
    student: Model,
    trainable: Trainable,
    data: str,
    samples: Manifest,
    prompts: str,
    world: World,
) -> ScoreFunction:
    """A function that samples the student with its current weights and returns the FID to the training samples."""
    settings = config.distill.best
    texts = read_prompts(prompts) if prompts else ()

    def prompts_for(rows: range, images: RawBatch) -> Sequence[Prompt]:
        return rows_of_prompts(texts, rows) if texts else prompts_of_images(config.family, images)

    with world.main_process_first():
        extract = features.load_pretrained(settings, "distill.best", world.device)
    train = Shards(data, TRAIN, samples.kind, config.loader.cache_gb)
    scorer = load_scorer(
        settings, extract, student.sample_unchecked, train, student.family, prompts_for, world
    )

    def score(report: Callable[[str], None]) -> float:
        with trainable.swap_in_inference_weights():
            return scorer(report)

    return score
