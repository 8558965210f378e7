"""Kueue admits what the pipeline makes on every overlay with GPUs: the queues, against played nodes of those pools."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from components.distill.kube import Pod
from components.distill.launch import JobSize, Training
from components.distill.trainjob import TrainJob
from components.prepare_run.queues import QUEUE
from manifests.__main__ import render
from pipelines.pods import BUSY, HEAVY, PRIORITY, RUN, PodResources
from tests.cluster.conftest import NAMESPACE, Cluster, Json, kubelet, wait_for
from tests.manifests.test_policies import OVERLAYS, rendered

IMAGE = f"europe-west4-docker.pkg.dev/my-project/dmd2/dmd2:0.1.0@sha256:{64 * '0'}"
ACCELERATORS = {
    "gke-a3-high": "nvidia-h100-80gb",
    "gke-a3-ultra": "nvidia-h200-141gb",
    "spot": "nvidia-h100-80gb",
}
OF_GOOGLE = ("networking.gke.io", "monitoring.googleapis.com")
"""Kinds that the servers of the bed do not know."""
MACHINES: dict[str, Json] = {
    "nvidia-h100-80gb": {
        "cpu": "208",
        "memory": "1872G",
        "ephemeral-storage": "6T",
        "nvidia.com/gpu": "8",
        "pods": "110",
    },
    "nvidia-h200-141gb": {
        "cpu": "224",
        "memory": "2952G",
        "ephemeral-storage": "12T",
        "nvidia.com/gpu": "8",
        "pods": "110",
    },
}
"""What such machines have: a3-highgpu-8g and a3-ultragpu-8g."""
GKE = "cloud.google.com"


def machine(accelerator: str, number: int, spot: bool) -> Json:
    labels = {
        f"{GKE}/gce-topology-{level}": f"{level}-{number if level == 'host' else 0}"
        for level in ("block", "subblock", "host")
    }
    labels |= {"dmd2/pool": "gpu", f"{GKE}/gke-accelerator": accelerator} | (
        {f"{GKE}/gke-spot": "true"} if spot else {}
    )
    taints = [{"key": "nvidia.com/gpu", "value": "present", "effect": "NoSchedule"}]
    taints += [{"key": f"{GKE}/gke-spot", "value": "true", "effect": "NoSchedule"}] if spot else []
    name = f"{accelerator.split('-')[1]}{'-spot' if spot else ''}-{number}"
    return {"name": name, "labels": labels, "taints": taints, "capacity": MACHINES[accelerator]}


@pytest.fixture(scope="module")
def machines(cluster: Cluster) -> Iterator[None]:
    """Two machines of each pool. None of them has an image, so no pod runs."""
    kinds = [("nvidia-h100-80gb", False), ("nvidia-h100-80gb", True), ("nvidia-h200-141gb", False)]
    nodes = [machine(accelerator, number, spot) for accelerator, spot in kinds for number in range(2)]
    with kubelet(cluster.bed, cluster.bed.folder / "gpus", {}, nodes):
        yield
    cluster.bed.kubectl(
        "delete", "nodes", *(node["name"] for node in nodes)
    )  # or pods of later tests wait on them for ever
    for kind in ("validatingadmissionpolicybindings", "validatingadmissionpolicies"):  # `dev` has none
        cluster.bed.kubectl("delete", kind, "dmd2-pods")
    replace_queues(cluster, list(yaml.safe_load_all(render("dev"))))


def replace_queues(cluster: Cluster, objects: list[Json]) -> None:
    """Apply an overlay in place of another. The nodes of a flavor with a topology cannot be changed, so flavors are made anew."""
    for kind in ("clusterqueues", "resourceflavors", "topologies"):
        cluster.bed.kubectl("delete", f"{kind}.kueue.x-k8s.io", "--all", "--wait=true", "--timeout=60s")
    text = yaml.safe_dump_all(objects)
    cluster.bed.kubectl(
        "apply", "--server-side", "--validate=strict", "--force-conflicts", "-f", "-", given=text
    )


def step(resources: PodResources, gpus: int, pool: Json) -> Json:
    """The pod of a step as KFP makes it (pipelines/pods.py), with the containers of KFP and Argo beside it."""
    secure = {
        "runAsUser": 65532, "runAsNonRoot": True, "allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]},
    }  # fmt: skip
    limits = {"cpu": resources.cpu[1], "memory": resources.memory[1]} | (
        {"nvidia.com/gpu": str(gpus)} if gpus else {}
    )
    requests = {"cpu": resources.cpu[0], "memory": resources.memory[0]}
    main = {
        "name": "main",
        "image": IMAGE,
        "securityContext": secure,
        "resources": {"requests": requests, "limits": limits},
    }
    wait = {"name": "wait", "image": "quay.io/argoproj/argoexec:v3.7.3", "securityContext": secure}
    keys = ("nvidia.com/gpu", f"{GKE}/gke-spot", f"{GKE}/gke-queued")
    return {
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": "step", "namespace": NAMESPACE, "labels": {"kueue.x-k8s.io/queue-name": QUEUE, PRIORITY: RUN}},
        "spec": {
            "serviceAccountName": "steps", "restartPolicy": "Never", "containers": [main, wait], "nodeSelector": pool,
            "tolerations": [{"key": key, "operator": "Exists", "effect": "NoSchedule"} for key in keys],
        },
    }  # fmt: skip


def trainjob(pool: Json) -> Json:
    training = Training(["distill", "sdxl-4step"], JobSize(2, 8, QUEUE), "run", "gs://b/r", "run", pool)
    pod = Pod("step", NAMESPACE, IMAGE, {PRIORITY: RUN}, None)
    unconnected: Any = None
    return TrainJob(training, unconnected, pod).body()


def is_admitted(cluster: Cluster) -> bool:
    found = cluster.all("workloads.kueue.x-k8s.io")
    conditions = [one for workload in found for one in workload.get("status", {}).get("conditions", [])]
    return any((one["type"], one["status"]) == ("Admitted", "True") for one in conditions)


@pytest.mark.parametrize("overlay", [name for name in OVERLAYS if name.split("+")[0] in ACCELERATORS])
def test_kueue_admits_a_training_and_the_steps_with_and_without_gpus(
    cluster: Cluster, machines: None, overlay: str
) -> None:
    objects = [one for one in rendered(overlay) if not one["apiVersion"].startswith(OF_GOOGLE)]
    replace_queues(cluster, objects)
    pool = {f"{GKE}/gke-accelerator": ACCELERATORS[overlay.split("+")[0]]}
    made = [trainjob(pool), step(HEAVY, 8, pool), step(BUSY, 1, pool), step(HEAVY, 0, {})]
    for one in made:
        cluster.create(one)
        try:
            wait_for(lambda: is_admitted(cluster), 60)
        finally:
            cluster.kubectl(
                "delete", one["kind"], one["metadata"]["name"], "--wait=true", "--grace-period=0", "--force"
            )
            wait_for(lambda: not cluster.all("workloads.kueue.x-k8s.io"), 60)
