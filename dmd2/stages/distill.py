"""Distillation of a teacher into a student with DMD2: check the inputs, train, save the student (`distillation`).

Several processes may run this function for one output (torchrun); rank 0 reads the weights and writes the result.
"""

from __future__ import annotations

from dmd2.config import Config
from dmd2.io.artifact import Manifest, find_finished, read_manifest
from dmd2.stages.inputs import (
    check_prompts,
    check_start,
    prompts_digest,
    read_training_samples,
    sample_digests,
)


def distill(
    config: Config,
    data: str,
    teacher: str,
    out: str,
    start: str = "",
    prompts: str = "",
    progress: str = "",
    *,
    price: float = 0.0,
    budget: float = 0.0,
) -> Manifest:
    """Distil a teacher into a one- or few-step student with DMD2.

    Args:
        data: Folder of shards or latents: the real samples of the GAN, and the classes or captions to sample.
            With a regression, folder of pairs.
        teacher: Folder of the teacher.
        out: Folder to write the run to.
        start: Run to start from instead of the teacher: its student, and its critic if it had one.
        prompts: File of prompts to sample instead of those of the data.
        progress: HTML file that is rewritten while it trains: curves, previews, time left, cost. Empty: none.
        price: Price of a GPU for an hour, in any currency: the page and the metrics then say what it has cost so far.
        budget: Number of GPU-hours that the page and the metrics compare with what was spent. It ends no training.
    """
    check_start(config, start)
    check_prompts(config, prompts)
    from dmd2.parallel import ranks
    from dmd2.stages.distillation import Distillation
    from dmd2.stages.distributed import draft_for_all_ranks

    world = ranks.init_distributed()
    with world.main_process_first():
        regression = config.distill.regression
        samples = read_manifest(data, "pairs") if regression else read_training_samples(config, data)
        original = read_manifest(teacher, "teacher")
        inputs = sample_digests(samples) | {"teacher": original.digest} | prompts_digest(prompts)
        inputs |= {"start": read_manifest(start, "run").digest} if start else {}
        if done := find_finished(out, "run", config, inputs):
            return done
        distillation = Distillation.open(config, world, data, samples, teacher, original, prompts)
    with draft_for_all_ranks(world, out, "run", config, inputs) as draft:
        distillation.run(draft, start, progress, price, budget)
    return read_manifest(out, "run")
