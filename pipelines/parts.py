"""Parts of a stage in pods side by side. The stage itself comes after them, and puts the parts together.

Each is a pipeline of its own, because its loop then has an input of a pipeline for a list: kfp's local runner loops over no named
output of a task, and the backend over nothing directly inside an exit handler. An empty list gives no pod.
"""

from kfp import dsl

from components.encode_latents.component import encode_latents
from components.evaluate.component import evaluate
from components.shard_dataset.component import shard_dataset
from pipelines.pods import BUSY, on_gpus, pod


@dsl.pipeline(name="shard-parts")
def shard_parts(parts: list, source: str, recipe: str, overrides: str, root: str) -> None:  # type: ignore[type-arg]
    """Write the shards of each part, `i/n`."""
    with dsl.ParallelFor(parts, name="parts") as part:
        sharded = shard_dataset(source=source, recipe=recipe, overrides=overrides, root=root, part=part)
        pod(sharded, BUSY, retries=2)


@dsl.pipeline(name="encode-parts")
def encode_parts(
    parts: list,  # type: ignore[type-arg]
    recipe: str,
    overrides: str,
    root: str,
    gpu: int,
    pool: dict,  # type: ignore[type-arg]
    shards: dsl.Input[dsl.Dataset],
    teacher: dsl.Input[dsl.Model],
) -> None:
    """Encode the images of each part, `i/n`."""
    with dsl.ParallelFor(parts, name="parts") as part:
        encoded = encode_latents(
            recipe=recipe, overrides=overrides, root=root, part=part, shards=shards, teacher=teacher
        )
        on_gpus(pod(encoded, BUSY, retries=2), gpu, pool)


@dsl.pipeline(name="evaluate-parts")
def evaluate_parts(
    parts: list,  # type: ignore[type-arg]
    recipe: str,
    overrides: str,
    root: str,
    gpu: int,
    pool: dict,  # type: ignore[type-arg]
    shards: dsl.Input[dsl.Dataset],
    teacher: dsl.Input[dsl.Model],
    run: dsl.Input[dsl.Model],
    scores: str,
) -> None:
    """Sample the images of each part, `i/n`."""
    with dsl.ParallelFor(parts, name="parts") as part:
        judged = evaluate(
            recipe=recipe,
            overrides=overrides,
            root=root,
            part=part,
            shards=shards,
            teacher=teacher,
            run=run,
            scores=scores,
        )
        on_gpus(pod(judged, BUSY, retries=2), gpu, pool)
