"""The admission policy lets our pods in and nothing else, judged by an implementation of CEL on pods as they arrive."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest

from tests.manifests.policy import Object, of
from tests.manifests.test_policies import one, pod, rendered

celpy = pytest.importorskip(
    "celpy", reason="cel-python is of the extra `dev`: run `make lock` and `make` again"
)

DIGEST = "@sha256:" + 64 * "0"
OURS = f"europe-west4-docker.pkg.dev/my-project/dmd2/dmd2:0.1.0{DIGEST}"
OVERLAYS = ("gke-a3-high", "gke-a3-ultra", "spot")


@cache
def program(expression: str) -> Any:
    environment = celpy.Environment()
    return environment.program(environment.compile(expression))


def refusals(overlay: str, arrived: Object) -> list[str]:
    """The messages of the rules that refuse a pod."""
    spec = one(rendered(overlay), "ValidatingAdmissionPolicy")["spec"]
    variables = celpy.celtypes.MapType()
    known = {"object": celpy.json_to_cel(arrived), "variables": variables}
    for each in spec["variables"]:
        variables[celpy.celtypes.StringType(each["name"])] = program(each["expression"]).evaluate(known)
    return [
        each["message"] for each in spec["validations"] if not program(each["expression"]).evaluate(known)
    ]


def training(overlay: str) -> Object:
    """A pod of a TrainJob, with images by digest, as `make manifests` writes them."""
    found = pod(rendered(overlay))
    for container in (*found["spec"].get("initContainers", []), *found["spec"]["containers"]):
        googles = container["image"].startswith("us-docker.pkg.dev/gce-ai-infra/")
        container["image"] = f"{container['image']}{DIGEST}" if googles else OURS
    return found


def run(**main: Any) -> Object:
    """A pod of a stage, as KFP 2.17 and Argo make it."""
    secure = {
        "runAsUser": 65532, "runAsNonRoot": True, "allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]},
    }  # fmt: skip
    spec = {
        "serviceAccountName": "steps",
        "initContainers": [
            {"name": "kfp-launcher", "image": "ghcr.io/kubeflow/kfp-launcher:2.17.0"},
            {"name": "init", "image": "quay.io/argoproj/argoexec:v3.7.3"},
        ],
        "containers": [{"name": "main", "image": OURS, "securityContext": secure, **main}],
    }
    return {"metadata": {"labels": {"workflows.argoproj.io/workflow": "w"}}, "spec": spec}


def of_kfp(**spec: Any) -> Object:
    """A pod of KFP's own services."""
    container = {"name": "mysql", "image": "mysql:8.4"}
    return {"metadata": {}, "spec": {"serviceAccountName": "mysql", "containers": [container], **spec}}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_our_pods_and_those_of_kfp_are_let_in(overlay: str) -> None:
    for each in (training(overlay), run(), of_kfp()):
        assert refusals(overlay, each) == []


def first(found: Object, key: str = "containers") -> Object:
    return found["spec"][key][0]


def daemon(found: Object) -> Object:
    return first(found, "initContainers")


HOST = {"name": "x", "hostPath": {"path": "/sys"}}
MOUNT = {"name": "sys", "mountPath": "/x"}
MISTAKES: list[tuple[str, Callable[[], Object], Callable[[Object], Any]]] = [
    ("network, processes or memory", lambda: run(), lambda p: p["spec"].update(hostNetwork=True)),
    ("network, processes or memory", lambda: of_kfp(), lambda p: p["spec"].update(hostPID=True)),
    ("network, processes or memory", lambda: of_kfp(), lambda p: first(p).update(ports=[{"hostPort": 80}])),
    ("directories of the machine", lambda: of_kfp(), lambda p: p["spec"].update(volumes=[HOST])),
    ("directories of the machine", lambda: run(), lambda p: p["spec"].update(volumes=[HOST])),
    ("directories of the machine", lambda: training("gke-a3-high"), lambda p: p["spec"]["volumes"].append({"name": "x", "hostPath": {"path": "/"}})),
    ("directories of the machine", lambda: training("gke-a3-high"), lambda p: first(p)["volumeMounts"].append(MOUNT)),
    ("directories of the machine", lambda: training("gke-a3-high"), lambda p: p["metadata"]["labels"].pop("app.kubernetes.io/component")),
    ("directories of the machine", lambda: training("gke-a3-high"), lambda p: p["spec"].update(serviceAccountName="steps")),
    ("seccomp", lambda: of_kfp(), lambda p: p["spec"].update(securityContext={"sysctls": [{"name": "kernel.x", "value": "1"}]})),
    ("seccomp", lambda: of_kfp(), lambda p: first(p).update(securityContext={"seccompProfile": {"type": "Unconfined"}})),
    ("seccomp", lambda: of_kfp(), lambda p: first(p).update(securityContext={"procMount": "Unmasked"})),
    ("no container may be privileged", lambda: of_kfp(), lambda p: first(p).update(securityContext={"privileged": True})),
    ("no container may be privileged", lambda: training("gke-a3-high"), lambda p: daemon(p)["securityContext"].update(privileged=True)),
    ("add a capability", lambda: of_kfp(), lambda p: first(p).update(securityContext={"capabilities": {"add": ["SYS_ADMIN"]}})),
    ("add a capability", lambda: training("gke-a3-high"), lambda p: daemon(p)["securityContext"]["capabilities"].update(add=["SYS_ADMIN"])),
    ("add a capability", lambda: training("gke-a3-high"), lambda p: first(p)["securityContext"]["capabilities"].update(add=["NET_ADMIN"])),
    ("by digest", lambda: run(image="europe-west4-docker.pkg.dev/my-project/dmd2/dmd2:0.1.0"), lambda p: None),
    ("by digest", lambda: run(image=f"docker.io/somebody/dmd2{DIGEST}"), lambda p: None),
    ("by digest", lambda: run(image=f"us-docker.pkg.dev/gce-ai-infra/x{DIGEST}"), lambda p: None),
    ("by digest", lambda: training("gke-a3-high"), lambda p: daemon(p).update(image="us-docker.pkg.dev/gce-ai-infra/gpudirect-tcpx/tcpgpudmarxd-dev:v2.0.15")),
    ("by digest", lambda: run(), lambda p: first(p, "initContainers").update(image="ghcr.io/kubeflow/kfp-launcher:latest")),
    ("by digest", lambda: run(), lambda p: p["spec"].update(ephemeralContainers=[{"name": "debug", "image": "busybox"}])),
    ("another user than root", lambda: run(securityContext={"runAsUser": 0, "runAsNonRoot": True, "allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}), lambda p: None),
    ("another user than root", lambda: training("gke-a3-high"), lambda p: p["spec"]["securityContext"].pop("runAsNonRoot")),
    ("another user than root", lambda: training("gke-a3-ultra"), lambda p: daemon(p)["securityContext"].update(runAsNonRoot=False)),
    ("not gain privileges", lambda: run(securityContext={"runAsUser": 1, "runAsNonRoot": True}), lambda p: None),
    ("not gain privileges", lambda: training("gke-a3-high"), lambda p: daemon(p)["securityContext"].pop("allowPrivilegeEscalation")),
    ("not gain privileges", lambda: training("gke-a3-high"), lambda p: first(p)["securityContext"].pop("capabilities")),
]  # fmt: skip


@pytest.mark.parametrize(
    ("message", "make", "mistake"), MISTAKES, ids=[f"{n}: {message}" for n, (message, *_) in enumerate(MISTAKES)]
)  # fmt: skip
def test_a_pod_with_a_mistake_is_refused(
    message: str, make: Callable[[], Object], mistake: Callable[[Object], Any]
) -> None:
    mistake(arrived := make())
    said = refusals("gke-a3-high", arrived)
    assert any(message in each for each in said), said


def test_every_rule_was_tried_on_a_mistake() -> None:
    for each in one(rendered("gke-a3-high"), "ValidatingAdmissionPolicy")["spec"]["validations"]:
        assert any(message in each["message"] for message, *_ in MISTAKES), each["message"]


def test_only_tcpx_needs_anything_of_the_machine() -> None:
    daemons = training("gke-a3-high")
    assert any("directories" in each for each in refusals("gke-a3-ultra", daemons))
    assert any("capability" in each for each in refusals("gke-a3-ultra", daemons))


def test_an_update_of_labels_is_not_judged_and_one_of_an_image_is() -> None:
    (condition,) = one(rendered("spot"), "ValidatingAdmissionPolicy")["spec"]["matchConditions"]
    old, new = run(), run(image="busybox")
    for operation, before, after, judged in (
        ("CREATE", None, old, True), ("UPDATE", old, old | {"metadata": {}}, False), ("UPDATE", old, new, True),
    ):  # fmt: skip
        known = {"object": after, "oldObject": before, "request": {"operation": operation}}
        assert program(condition["expression"]).evaluate(celpy.json_to_cel(known)) == judged


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_policy_is_bound_and_denies(overlay: str) -> None:
    (binding,) = of(rendered(overlay), "ValidatingAdmissionPolicyBinding")
    assert binding["spec"] == {"policyName": "dmd2-pods", "validationActions": ["Deny"]}
