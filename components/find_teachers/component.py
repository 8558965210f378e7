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
    api: str,
    run_id: str,
    table: dsl.Output[dsl.Markdown],
) -> None:
    """Start one distillation for each teacher that is new, as far as there is room; settle those whose run has died.

    Args:
        teachers: Where teachers are announced: folders, `hf://owner/name@revision`, `registry+http://host`, separated by spaces.
        ledger: Folder of the ledger.
        root: Folder that receives what the distillations make, in a folder for each.
        settings: Parameters of every distillation.
        pipeline: Name of the uploaded pipeline of a distillation; its newest version is run.
        service_account: Of Kubernetes, for the distillations; empty for the default of the platform.
        max_runs: Distillations at a time.
        gpu_hours: What one distillation takes, in GPU-hours.
        max_gpu_hours: What all distillations of seven days may take, in GPU-hours.
        api: Address of the API of pipelines, as a pod reaches it; empty for the one in the namespace `kubeflow`.
        run_id: The platform's name of this run.
        table: The ledger, for the UI.
    """
    import json
    import os
    import subprocess
    import sys

    look = {
        "teachers": teachers, "ledger": ledger, "root": root, "settings": settings, "pipeline": pipeline,
        "service_account": service_account, "max_runs": max_runs, "gpu_hours": gpu_hours, "max_gpu_hours": max_gpu_hours,
        "owner": run_id, "api": api,
    }  # fmt: skip
    # In a process of its own: under this variable, which is that of components, kfp has no client.
    environment = {name: value for name, value in os.environ.items() if name != "_KFP_RUNTIME"}
    command = [sys.executable, "-m", "components.find_teachers", json.dumps(look), table.path]
    if status := subprocess.run(command, env=environment).returncode:
        raise SystemExit(status)
