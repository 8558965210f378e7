"""The pipeline that starts a distillation for each new teacher, to be run on a schedule: one task. Wiring only."""

from kfp import dsl, kubernetes

from components.find_teachers.component import find_teachers
from pipelines.pods import PodResources, pod, with_hub, with_registry

WATCH = PodResources(("250m", "1"), ("512Mi", "1Gi"), "2G")
API = "http://ml-pipeline.dmd2.svc.cluster.local:8888"
"""Address of the KFP API as `manifests` deploy it."""
LIMIT_S = 3600
"""Time limit of one run in seconds; the next run continues."""


@dsl.pipeline(name="dmd2-retrain")
def retrain(
    teachers: str,
    ledger: str,
    root: str,
    settings: dict,  # type: ignore[type-arg]
    pipeline: str = "dmd2-distill-retrain",
    service_account: str = "",
    max_runs: int = 2,
    gpu_hours: float = 0.0,
    max_gpu_hours: float = 512.0,
    pending_hours: float = 24.0,
    run_hours: float = 168.0,
    api: str = API,
) -> None:
    """Distil every new teacher once. To be run on a schedule: the ledger records which distillations were started.

    Args:
        teachers: Where teachers appear: folders, `hf://owner/name@revision`, `registry+http://host`, separated by spaces.
        ledger: Folder of the ledger, which records every distillation.
        root: Folder of the runs, with a folder for each distillation.
        settings: Parameters of every distillation, as `{"recipe": "sdxl-4step", "source": "gs://bucket/images"}`.
        pipeline: Name of the uploaded pipeline of a distillation; its newest version is run. The default gives way to runs that a person starts.
        service_account: Kubernetes service account of the distillations; empty = the default of KFP.
        max_runs: Largest number of distillations at a time.
        gpu_hours: GPU-hours that one distillation is expected to take, until one has reported what it took. `make schedule` takes them from the plan; 0 = a recipe on the CPU.
        max_gpu_hours: Largest sum of GPU-hours of the distillations of seven days.
        pending_hours: Hours that a run, or a step of it, may wait for its machine; then it is stopped and tried again.
        run_hours: Hours that a run may take; then it is stopped, which counts as a failure.
        api: Address of the KFP API inside the cluster; empty = the one in the namespace `kubeflow`.
    """
    task = find_teachers(
        teachers=teachers, ledger=ledger, root=root, settings=settings, pipeline=pipeline, service_account=service_account,
        max_runs=max_runs, gpu_hours=gpu_hours, max_gpu_hours=max_gpu_hours, pending_hours=pending_hours, run_hours=run_hours,
        api=api, run_id=dsl.PIPELINE_JOB_ID_PLACEHOLDER,
    )  # fmt: skip
    kubernetes.set_timeout(with_registry(with_hub(pod(task, WATCH, retries=2))), LIMIT_S)
