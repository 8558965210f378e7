"""The overlays keep the rules of policy.py, and each rule sees what it is there to see."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from copy import deepcopy
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import yaml

from manifests.__main__ import ROOT, overlays, render
from pipelines.pods import HEAVY
from tests.manifests import policy
from tests.manifests.policy import Object, Objects

TCPX = {
    "non_root": {"TrainingRuntime/dmd2-torch tcpx-daemon: may be root"},
    "capabilities": {"TrainingRuntime/dmd2-torch tcpx-daemon: keeps capabilities ['NET_ADMIN']"},
    "host": {
        f"TrainingRuntime/dmd2-torch: directory {path} of the host"
        for path in ("/home/kubernetes/bin/nvidia/lib64", "/sys", "/proc/sys")
    },
    "pod_security": {"Namespace/dmd2: enforces privileged"},
}
EXCEPTIONS: dict[str, dict[str, set[str]]] = {
    "gke-a3-high": TCPX,
    "spot": TCPX,
    "dev": {"network": {"NetworkPolicy/runs-to-internet: the Internet"}},
}
"""What GPUDirect-TCPX's daemon can not do without, and the hubs that one may read from while trying things out."""


STRICTEST = "gke-a3-ultra+topology+monitoring"
"""An overlay with components that a user may add."""
OVERLAYS = [*overlays(), STRICTEST, "spot+topology", "dev+prometheus-operator+reaper+serving"]


def take(copy: Path, overlay: str, component: str) -> None:
    """Add a component to an overlay, as the README says."""
    path = copy / "overlays" / overlay / "kustomization.yaml"
    held = yaml.safe_load(path.read_text())
    held["components"] = [*held.get("components", []), f"../../components/{component}"]
    path.write_text(yaml.safe_dump(held))


@cache
def _rendered(named: str) -> Objects:
    overlay, *components = named.split("+")
    with TemporaryDirectory() as folder:
        copy = Path(shutil.copytree(ROOT, Path(folder) / "manifests"))
        for component in components:
            take(copy, overlay, component)
        return list(yaml.safe_load_all(render(overlay, copy)))


def rendered(overlay: str) -> Objects:
    return deepcopy(_rendered(overlay))


@pytest.mark.parametrize("rule", policy.RULES)
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_an_overlay_breaks_no_rule_beyond_its_exceptions(overlay: str, rule: str) -> None:
    assert set(policy.RULES[rule](rendered(overlay))) == EXCEPTIONS.get(overlay.split("+")[0], {}).get(
        rule, set()
    )


def test_there_are_the_four_overlays_of_the_design() -> None:
    assert overlays() == ["dev", "gke-a3-high", "gke-a3-ultra", "spot"]


def one(objects: Objects, kind: str, name: str = "") -> Object:
    return next(item for item in policy.of(objects, kind) if name in ("", item["metadata"]["name"]))


def pod(objects: Objects) -> Object:
    return next(found for _, found in policy.pods(objects))


def node(objects: Objects) -> Object:
    return pod(objects)["spec"]["containers"][0]


def role(objects: Objects) -> Object:
    return one(objects, "Role", "launch")["rules"][0]


def exit_codes(objects: Objects) -> Object:
    (job,) = one(objects, "TrainingRuntime")["spec"]["template"]["spec"]["replicatedJobs"]
    rules = job["template"]["spec"]["podFailurePolicy"]["rules"]
    return next(rule["onExitCodes"] for rule in rules if "onExitCodes" in rule)


def small_queue() -> Objects:
    """One flavor that has just what the step itself asks for, and nothing for the containers beside it."""
    quotas = {"cpu": HEAVY.cpu[0], "memory": HEAVY.memory[0], "nvidia.com/gpu": "16"}
    resources = [{"name": name, "nominalQuota": much} for name, much in quotas.items()]
    return [{"coveredResources": list(quotas), "flavors": [{"name": "dmd2-gpu", "resources": resources}]}]


def drop(objects: Objects, kind: str, name: str = "") -> None:
    objects.remove(one(objects, kind, name))


def egress(objects: Objects, name: str) -> Object:
    return one(objects, "NetworkPolicy", name)["spec"]["egress"][0]


def add(objects: Objects, kind: str, **more: Any) -> None:
    objects.append(
        {"apiVersion": "v1", "kind": kind, "metadata": {"name": "new", "namespace": "dmd2"}, **more}
    )


MISTAKES: list[tuple[str, str, Callable[[Objects], Any]]] = [
    ("images", ": image 'dmd2'", lambda o: node(o).update(image="dmd2")),
    ("images", ": image 'dmd2:latest'", lambda o: node(o).update(image="dmd2:latest")),
    ("images", ": image 'dmd2:0.1.0'", lambda o: node(o).update(image="dmd2:0.1.0")),
    ("images", "is not in images.lock", lambda o: node(o).update(image="dmd2@sha256:" + 64 * "0")),
    ("images", "is not in images.lock", lambda o: node(o).update(image="us-docker.pkg.dev/gce-ai-infra/x/y:latest")),
    ("non_root", "node: may be root", lambda o: pod(o)["spec"]["securityContext"].pop("runAsNonRoot")),
    ("non_root", "node: may be root", lambda o: pod(o)["spec"]["securityContext"].update(runAsUser=0)),
    ("non_root", "node: may be root", lambda o: node(o)["securityContext"].update(runAsNonRoot=False)),
    ("read_only", "node: its root", lambda o: node(o)["securityContext"].pop("readOnlyRootFilesystem")),
    ("no_escalation", "node: may gain", lambda o: node(o)["securityContext"].pop("allowPrivilegeEscalation")),
    ("no_escalation", "node: may gain", lambda o: node(o)["securityContext"].update(privileged=True)),
    ("capabilities", "node: keeps", lambda o: node(o)["securityContext"].pop("capabilities")),
    ("capabilities", "SYS_ADMIN", lambda o: node(o)["securityContext"]["capabilities"].update(add=["SYS_ADMIN"])),
    ("seccomp", "node: has no", lambda o: pod(o)["spec"]["securityContext"].pop("seccompProfile")),
    ("seccomp", "node: has no", lambda o: node(o)["securityContext"].update(seccompProfile={"type": "Unconfined"})),
    ("host", "hostNetwork", lambda o: pod(o)["spec"].update(hostNetwork=True)),
    ("host", "directory /", lambda o: pod(o)["spec"]["volumes"].append({"name": "x", "hostPath": {"path": "/"}})),
    ("host", "a port", lambda o: node(o).update(ports=[{"containerPort": 80, "hostPort": 80}])),
    ("pod_security", "enforces None and has no policy", lambda o: drop(o, "ValidatingAdmissionPolicyBinding") or one(o, "Namespace")["metadata"].pop("labels")),
    ("references", "no ValidatingAdmissionPolicy dmd2-pods", lambda o: drop(o, "ValidatingAdmissionPolicy")),
    ("pod_security", "enforces None", lambda o: one(o, "Namespace")["metadata"].pop("labels")),
    ("resources", "node: no limits of memory", lambda o: node(o)["resources"]["limits"].pop("memory")),
    ("resources", "node: no requests of cpu", lambda o: node(o)["resources"]["requests"].pop("cpu")),
    ("rbac", "verbs *", lambda o: role(o).update(verbs=["*"])),
    ("rbac", "resources *", lambda o: role(o).update(resources=["*"])),
    ("rbac", "apiGroups *", lambda o: role(o).update(apiGroups=["*"])),
    ("rbac", "resources secrets", lambda o: role(o).update(resources=["secrets"])),
    ("rbac", "resources pods/exec", lambda o: role(o)["resources"].append("pods/exec")),
    ("rbac", "verbs impersonate", lambda o: role(o)["verbs"].append("impersonate")),
    ("rbac", "beyond the namespace", lambda o: add(o, "ClusterRoleBinding", subjects=[])),
    ("secrets", "holds a secret", lambda o: add(o, "Secret", stringData={"key": "x"})),
    ("secrets", "secretName", lambda o: pod(o)["spec"]["volumes"].append({"name": "x", "secret": {"secretName": "y"}})),
    ("secrets", "secretKeyRef", lambda o: node(o).update(env=[{"name": "X", "valueFrom": {"secretKeyRef": {}}}])),
    ("tokens", "ServiceAccount/trainer", lambda o: one(o, "ServiceAccount", "trainer").pop("automountServiceAccountToken")),
    ("tokens", "ServiceAccount/default", lambda o: one(o, "ServiceAccount", "default").update(automountServiceAccountToken=True)),
    ("tokens", "good for nothing", lambda o: pod(o)["spec"].pop("automountServiceAccountToken")),
    ("network", "no policy denies", lambda o: drop(o, "NetworkPolicy", "default-deny")),
    ("network", "no policy denies", lambda o: one(o, "NetworkPolicy", "default-deny")["spec"].update(policyTypes=["Ingress"])),
    ("network", "default-deny: everybody", lambda o: one(o, "NetworkPolicy", "default-deny")["spec"].update(egress=[{}])),
    ("network", "ranks: everybody", lambda o: egress(o, "ranks").pop("to")),
    ("network", "ranks: every pod", lambda o: egress(o, "ranks").update(to=[{"podSelector": {}}])),
    ("network", "google: everywhere", lambda o: egress(o, "google").update(to=[{"ipBlock": {"cidr": "0.0.0.0/0"}}])),
    ("network", "google: every port", lambda o: egress(o, "google").pop("ports")),
    ("spaces", "LimitRange/dmd2: namespace None", lambda o: one(o, "LimitRange")["metadata"].pop("namespace")),
    ("spaces", "namespace other", lambda o: one(o, "LimitRange")["metadata"].update(namespace="other")),
    ("references", "no ServiceAccount trainer", lambda o: drop(o, "ServiceAccount", "trainer")),
    ("references", "no Role launch", lambda o: drop(o, "Role", "launch")),
    ("references", "no ServiceAccount launcher", lambda o: drop(o, "ServiceAccount", "launcher")),
    ("references", "no ClusterQueue", lambda o: drop(o, "ClusterQueue")),
    ("references", "no ResourceFlavor", lambda o: drop(o, "ResourceFlavor", "dmd2-gpu")),
    ("references", "no Topology", lambda o: drop(o, "Topology")),
    ("references", "no ConfigMap kfp-launcher", lambda o: drop(o, "ConfigMap", "kfp-launcher")),
    ("references", "no TrainingRuntime dmd2-torch", lambda o: drop(o, "TrainingRuntime")),
    ("references", "no Network rdma-7", lambda o: drop(o, "Network", "rdma-7")),
    ("references", "no GKENetworkParamSet rdma-0", lambda o: drop(o, "GKENetworkParamSet", "rdma-0")),
    ("references", "no ConfigMap x", lambda o: pod(o)["spec"]["volumes"].append({"name": "x", "configMap": {"name": "x"}})),
    ("inside", "no volume", lambda o: pod(o)["spec"]["volumes"].pop()),
    ("inside", "no container node", lambda o: node(o).update(name="trainer")),
    ("inside", "no container gone", lambda o: pod(o)["metadata"]["annotations"].update({"devices.gke.io/container.gone": ""})),
    ("inside", "no level", lambda o: one(o, "Topology")["spec"]["levels"].pop(0)),
    ("inside", "exit codes [64, 75, 76]", lambda o: exit_codes(o).update(values=[64, 75, 76])),
    ("topologies", "beside dmd2-cpu without one", lambda o: one(o, "ResourceFlavor", "dmd2-cpu")["spec"].pop("topologyName")),
    ("fits", "distill: no flavor has", lambda o: one(o, "ClusterQueue")["spec"].update(resourceGroups=small_queue())),
    ("fits", "no flavor has", lambda o: node(o)["resources"]["requests"].update({"nvidia.com/gpu": "32"})),
    ("fits", "no flavor has", lambda o: node(o)["resources"]["requests"].update({"example.com/fpga": "1"})),
    ("fits", "/dev/shm", lambda o: node(o)["resources"]["limits"].update(memory="1Gi")),
    ("fits", "another number of GPUs", lambda o: one(o, "ResourceQuota")["spec"]["hard"].update({"requests.nvidia.com/gpu": "8"})),
]  # fmt: skip


@pytest.mark.parametrize(
    ("rule", "finding", "mistake"), MISTAKES, ids=[f"{rule}: {what}" for rule, what, _ in MISTAKES]
)
def test_a_rule_sees_the_mistake(rule: str, finding: str, mistake: Callable[[Objects], Any]) -> None:
    objects = rendered(STRICTEST)
    assert not list(policy.RULES[rule](objects)), "the strictest overlay has no exceptions"
    mistake(objects)
    assert any(finding in found for found in policy.RULES[rule](objects))


def test_every_rule_was_tried_on_a_mistake() -> None:
    assert {rule for rule, _, _ in MISTAKES} == set(policy.RULES)


def test_a_pod_is_found_in_any_kind_of_object() -> None:
    objects = rendered("dev")
    template = {"spec": {"containers": [{"name": "new", "image": "busybox:latest"}]}}
    add(objects, "CronJob", spec={"jobTemplate": {"spec": {"template": template}}})
    for rule in ("images", "non_root", "read_only", "no_escalation", "capabilities", "seccomp", "resources"):
        assert any(found.startswith("CronJob/new") for found in policy.RULES[rule](objects)), rule
