"""What the pod of a stage asks for on Kubernetes. The local runner ignores all of it.

Nothing is cached: a hit of the platform's cache does not look whether what it promises is still on the bucket, nor
whether what lies behind a `source` or a tag has changed; a stage that is done finds its own folder, compares what it
was made of, and returns at once.
"""

from __future__ import annotations

from typing import NamedTuple

from kfp import dsl, kubernetes

USER = 65532
"""The user of the images."""
QUEUE = "dmd2"
"""Kueue's LocalQueue of pods with a GPU. A label of a pod can not be a parameter of a run."""
GPU = "nvidia.com/gpu"


class Need(NamedTuple):
    """Processors and memory: what is reserved, and what may be used."""

    cpu: tuple[str, str]
    memory: tuple[str, str]
    shared: str = ""
    """Shared memory, for processes that hand each other tensors; it counts as memory."""


LIGHT = Need(("500m", "2"), ("2Gi", "8Gi"))
BUSY = Need(("4", "32"), ("8Gi", "64Gi"), "8Gi")
HEAVY = Need(("8", "96"), ("32Gi", "512Gi"), "64Gi")


def pod(task: dsl.PipelineTask, need: Need, retries: int = 0) -> dsl.PipelineTask:
    """A pod without rights: no root, no writable place but /tmp. Retries are for a stage that goes on where it stopped."""
    task.set_caching_options(False)
    if retries:
        task.set_retry(retries, backoff_duration="30s", backoff_factor=2.0, backoff_max_duration="600s")
    task.set_cpu_request(need.cpu[0]).set_cpu_limit(need.cpu[1])
    task.set_memory_request(need.memory[0]).set_memory_limit(need.memory[1])
    kubernetes.set_security_context(task, run_as_user=USER, run_as_group=USER, run_as_non_root=True)
    kubernetes.empty_dir_mount(task, "scratch", "/tmp")
    if need.shared:
        kubernetes.empty_dir_mount(task, "shared", "/dev/shm", medium="Memory", size_limit=need.shared)
    return task


def on_gpus(
    task: dsl.PipelineTask, gpus: dsl.PipelineParameterChannel, pool: dsl.PipelineParameterChannel
) -> dsl.PipelineTask:
    """On a node of the pool, which keeps others out by a taint; after its turn in the queue."""
    task.set_accelerator_type(GPU).set_accelerator_limit(gpus)
    kubernetes.add_node_selector_json(task, pool)
    for taint in (GPU, "cloud.google.com/gke-spot", "cloud.google.com/gke-queued"):
        kubernetes.add_toleration(task, key=taint, operator="Exists", effect="NoSchedule")
    kubernetes.add_pod_label(task, "kueue.x-k8s.io/queue-name", QUEUE)
    return task
