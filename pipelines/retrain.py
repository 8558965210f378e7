"""The pipeline that looks for new teachers, to be run on a schedule: one task. Wiring only."""

from kfp import dsl, kubernetes

from components.find_teachers.component import find_teachers
from pipelines.pods import Need, pod

WATCH = Need(("250m", "1"), ("512Mi", "1Gi"))
API = "http://ml-pipeline.dmd2.svc.cluster.local:8888"
"""Where `manifests` have it."""
LIMIT_S = 3600
"""For one look; the next one goes on where it was."""


@dsl.pipeline(name="dmd2-retrain")
def retrain(
    teachers: str,
    ledger: str,
    root: str,
    settings: dict,  # type: ignore[type-arg]
    pipeline: str = "dmd2-distill",
    service_account: str = "",
    max_runs: int = 2,
    gpu_hours: float = 64.0,
    max_gpu_hours: float = 512.0,
    api: str = API,
) -> None:
    """Distil every teacher that is new, once. Made to be run again and again: what it has begun is in the ledger.

    Args:
        teachers: Where teachers are announced: folders, `hf://owner/name@revision`, `registry+http://host`, separated by spaces.
        ledger: Folder of the ledger, which remembers what was done.
        root: Folder that receives what the distillations make, in a folder for each.
        settings: Parameters of every distillation, as `{"recipe": "sdxl-4step", "source": "gs://bucket/images"}`.
        pipeline: Name of the uploaded pipeline of a distillation; its newest version is run.
        service_account: Of Kubernetes, for the distillations; empty for the default of the platform.
        max_runs: Distillations at a time.
        gpu_hours: What one distillation takes, in GPU-hours.
        max_gpu_hours: What all distillations of seven days may take, in GPU-hours.
        api: Address of the API of pipelines, as a pod reaches it; empty for the one in the namespace `kubeflow`.
    """
    task = find_teachers(
        teachers=teachers, ledger=ledger, root=root, settings=settings, pipeline=pipeline, service_account=service_account,
        max_runs=max_runs, gpu_hours=gpu_hours, max_gpu_hours=max_gpu_hours, api=api, run_id=dsl.PIPELINE_JOB_ID_PLACEHOLDER,
    )  # fmt: skip
    kubernetes.set_timeout(
        pod(task, WATCH, retries=2), LIMIT_S
    )  # uncached, or it would find what it found yesterday
