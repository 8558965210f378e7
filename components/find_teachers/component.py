from kfp import dsl

from components.image import image


@dsl.component(base_image=image("dmd2-launch"), install_kfp_package=False)
def find_teachers(
    teachers: str,
    ledger: str,
    root: str,
    settings: dict,  # type: ignore[type-arg]
    pipeline: str,
    service_account: str,
    max_runs: int,
    gpu_hours: float,
    max_gpu_hours: float,
    pending_hours: float,
    run_hours: float,
    api: str,
    run_id: str,
    table: dsl.Output[dsl.Markdown],
) -> None:
    """Start one distillation for each new teacher, within the limits, and record the end of runs that could not do so.

    Args:
        teachers: Where teachers appear: folders, `hf://owner/name@revision`, `registry+http://host`, separated by spaces.
        ledger: Folder of the ledger.
        root: Folder of the runs, with a folder for each distillation.
        settings: Parameters of every distillation.
        pipeline: Name of the uploaded pipeline of a distillation; its newest version is run.
        service_account: Kubernetes service account of the distillations; empty = the default of KFP.
        max_runs: Largest number of distillations at a time.
        gpu_hours: GPU-hours that one distillation is expected to take, until one has reported what it took; 0 = a recipe on the CPU.
        max_gpu_hours: Largest sum of GPU-hours of the distillations of seven days.
        pending_hours: Hours that a run, or a step of it, may wait for its machine; then it is stopped and tried again.
        run_hours: Hours that a run may take; then it is stopped, which counts as a failure.
        api: Address of the KFP API inside the cluster; empty = the one in the namespace `kubeflow`.
        run_id: The KFP id of this run.
        table: What was found and the ledger, for the UI.
    """
    import json
    import os
    import subprocess
    import sys

    arguments = {
        "teachers": teachers, "ledger": ledger, "root": root, "settings": settings, "pipeline": pipeline,
        "service_account": service_account, "max_runs": max_runs, "gpu_hours": gpu_hours, "max_gpu_hours": max_gpu_hours,
        "pending_hours": pending_hours, "run_hours": run_hours, "owner": run_id, "api": api,
    }  # fmt: skip
    # In a process of its own: kfp has no client where this variable is set, as it is in components.
    environment = {name: value for name, value in os.environ.items() if name != "_KFP_RUNTIME"}
    command = [sys.executable, "-m", "components.find_teachers", json.dumps(arguments), table.path]
    if status := subprocess.run(command, env=environment).returncode:
        raise SystemExit(status)
