"""Resources and security of the pod of a stage on Kubernetes. The local runner ignores them.

KFP's cache is off: a hit does not check whether the result is still on the bucket, nor whether the data behind a `source`
or a tag has changed. A stage that is done finds its own folder, compares the digests of its inputs, and returns at once.
"""

from __future__ import annotations

from typing import NamedTuple

from kfp import dsl, kubernetes

from components.prepare_run.disk import TRAINING_DISK_GB
from components.prepare_run.parameters import STEP_REQUESTS
from components.prepare_run.queues import QUEUE

USER = 65532
"""User and group id in the images."""
PRIORITY, RUN, RETRAIN = "kueue.x-k8s.io/priority-class", "dmd2-run", "dmd2-retrain"
"""Label of Kueue's priority, and its values for runs that a person starts and for those of retraining, which give way."""
USES_HUB, USES_REGISTRY = "dmd2/uses-hub", "dmd2/uses-registry"
"""Labels of pods that may reach a hub or a Model Registry, where `manifests/components` are taken into the overlay."""
HUB_TOKEN = "dmd2-hub-token"
"""Secret with the token of an account of the Hugging Face Hub."""
STAGE, COST_CENTRE = "dmd2/stage", "dmd2/cost-centre"
"""Labels of all pods of a run, by which their cost is divided: the step, and who pays."""
NOBODY = "none"
"""Cost centre of runs that are submitted without one."""
METRICS, METRICS_PORT = "DMD2_METRICS_PORT", 9400
"""Environment variable and port by which a training serves its metrics in a pod; a local run opens none by itself."""
GPU = "nvidia.com/gpu"
SIGNING_KEY = "dmd2-signing-key"
"""Secret with the private key that signs packages, and its folder below /var/run."""


class PodResources(NamedTuple):
    """(request, limit) of processors and memory."""

    cpu: tuple[str, str]
    memory: tuple[str, str]
    disk: str
    """Largest size of /tmp, beyond which the pod is evicted."""
    shared: str = ""
    """Size of /dev/shm, for processes that exchange tensors; it counts as memory."""


LIGHT = PodResources(("500m", "2"), ("2Gi", "8Gi"), "10G")
COPYING = LIGHT._replace(disk="200G")
"""A light stage through which a whole package goes: that of SDXL has 20 GB and more."""
BUSY = PodResources(("4", "32"), ("8Gi", "64Gi"), "2T", "8Gi")
HEAVY = PodResources(
    (STEP_REQUESTS["here"][0], "96"), (STEP_REQUESTS["here"][1], "512Gi"), f"{TRAINING_DISK_GB}G", "64Gi"
)


def pod(task: dsl.PipelineTask, resources: PodResources, retries: int = 0) -> dsl.PipelineTask:
    """Run the task in a pod without root, with /tmp as its only writable folder. Retries are for stages that continue."""
    task.set_caching_options(False)
    task.set_env_variable("DMD2_IMAGE", task.container_spec.image)  # for the provenance of what it makes
    if retries:
        task.set_retry(retries, backoff_duration="30s", backoff_factor=2.0, backoff_max_duration="600s")
    task.set_cpu_request(resources.cpu[0]).set_cpu_limit(resources.cpu[1])
    task.set_memory_request(resources.memory[0]).set_memory_limit(resources.memory[1])
    kubernetes.add_pod_label(task, STAGE, task.component_spec.name)
    kubernetes.add_pod_label(task, COST_CENTRE, NOBODY)
    kubernetes.set_security_context(task, run_as_user=USER, run_as_group=USER, run_as_non_root=True)
    kubernetes.empty_dir_mount(task, "scratch", "/tmp", size_limit=resources.disk)
    if resources.shared:
        kubernetes.empty_dir_mount(task, "shared", "/dev/shm", medium="Memory", size_limit=resources.shared)
    return task


def on_gpus(
    task: dsl.PipelineTask, gpus: dsl.PipelineParameterChannel, pool: dsl.PipelineParameterChannel
) -> dsl.PipelineTask:
    """Run the task on a node of the pool, tolerating its taints, after admission by Kueue."""
    task.set_accelerator_type(GPU).set_accelerator_limit(gpus)
    task.register_pipeline_channels(
        [gpus]
    )  # or the compiler gives it to no loop or condition around the task
    kubernetes.add_node_selector_json(task, pool)
    for taint in (GPU, "cloud.google.com/gke-spot", "cloud.google.com/gke-queued"):
        kubernetes.add_toleration(task, key=taint, operator="Exists", effect="NoSchedule")
    kubernetes.add_pod_label(task, "kueue.x-k8s.io/queue-name", QUEUE)
    kubernetes.add_pod_label(task, PRIORITY, RUN)
    return task


def requesting(
    task: dsl.PipelineTask, cpu: dsl.PipelineParameterChannel, memory: dsl.PipelineParameterChannel
) -> dsl.PipelineTask:
    """Request what the run decides: a training in the step takes a machine, the step of a TrainJob only follows it."""
    task.set_cpu_request(cpu).set_memory_request(memory)
    task.register_pipeline_channels([cpu, memory])
    return task


def with_signing_key(task: dsl.PipelineTask) -> dsl.PipelineTask:
    """Let the task read the key that signs packages, if the namespace has one."""
    return kubernetes.use_secret_as_volume(task, SIGNING_KEY, f"/var/run/{SIGNING_KEY}", optional=True)


def with_metrics(task: dsl.PipelineTask) -> dsl.PipelineTask:
    """Let the training in the task, or in the TrainJob that it makes, serve its metrics."""
    return task.set_env_variable(METRICS, str(METRICS_PORT))


def with_hub(task: dsl.PipelineTask) -> dsl.PipelineTask:
    """Let the task reach a hub, if the cluster allows it, with the account of the namespace, if it has one."""
    kubernetes.use_secret_as_env(task, HUB_TOKEN, {"token": "HF_TOKEN"}, optional=True)
    return kubernetes.add_pod_label(task, USES_HUB, "true")


def with_registry(task: dsl.PipelineTask) -> dsl.PipelineTask:
    """Let the task reach a Model Registry, if the cluster allows it."""
    return kubernetes.add_pod_label(task, USES_REGISTRY, "true")
