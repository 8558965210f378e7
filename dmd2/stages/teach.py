"""Training of a small teacher, where none is given."""

from __future__ import annotations

from dmd2.config import Config
from dmd2.errors import Refused
from dmd2.io.artifact import Manifest, find_finished, open_artifact, read_manifest
from dmd2.licence import carried_licences
from dmd2.stages.inputs import read_training_samples, sample_digests


def teach(config: Config, data: str, out: str) -> Manifest:
    """Train a small teacher on the shards, for demos, tests and ablations. A real user brings a teacher.

    Args:
        data: Folder of shards, or of latents if the network works on them (--family.vae-stride).
        out: Folder to write the teacher to.
    """
    samples = read_training_samples(config, data)
    inputs = sample_digests(samples)
    if done := find_finished(out, "teacher", config, inputs):
        return done
    if not config.family.can_teach:
        raise Refused(
            f"teach trains small teachers that need no text encoders; recipe {config.recipe!r} needs a teacher of kind {config.family.kind}: bring one with dmd2 resolve"
        )
    from dmd2.model import Model, save_network
    from dmd2.models.family import make_family
    from dmd2.parallel import ranks, sharding
    from dmd2.stages.distributed import batch_reader, draft_for_all_ranks, training_facts
    from dmd2.training import build
    from dmd2.training.loop import LoopSettings, train
    from dmd2.training.metrics_log import Throughput

    world, settings = ranks.init_distributed(), config.teach
    with draft_for_all_ranks(world, out, "teacher", config, inputs) as draft:
        trainer = build.diffusion_trainer(config, world)
        loop_settings = LoopSettings(
            settings.steps,
            Throughput(settings.batch),
            settings.log_every,
            settings.save_every,
            settings.steps,
            1,
            config.engine.hang_timeout_s,
        )
        family = make_family(
            config.family, open_artifact(data, samples, "vae/*") if config.family.vae_stride else None
        )
        batches = batch_reader(config, data, settings.batch, world, samples.kind, family.read)
        train("teach", trainer, batches, loop_settings, draft, lambda step: None, world)
        result = sharding.gather_full_tensors(trainer.teacher.inference_weights(), world)
        if world.is_main:
            save_network(draft.path, Model(config.family, family, trainer.teacher.module, ()), result)
            draft.facts |= training_facts(trainer.teacher.module, settings.steps, settings.batch)
            draft.facts |= carried_licences(samples)
    return read_manifest(out, "teacher")
