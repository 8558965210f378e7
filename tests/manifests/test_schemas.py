"""Every object that is rendered is one that Kubernetes 1.37, Kueue, Kubeflow Trainer and GKE know, to the last field."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from tests.manifests import schemas
from tests.manifests.test_policies import OVERLAYS, STRICTEST, one, pod, rendered

Object = dict[str, Any]


@cache
def validator(api: str, kind: str) -> Draft202012Validator:
    return Draft202012Validator(json.loads((schemas.HERE / schemas.named(api, kind)).read_text()))


def errors(item: Object) -> Iterator[str]:
    for error in validator(item["apiVersion"], item["kind"]).iter_errors(item):
        yield f"{item['kind']}/{item['metadata']['name']} {error.json_path}: {error.message}"


def jobs(item: Object) -> Iterator[Object]:
    """What Trainer and JobSet make of a runtime: jobs of Kubernetes' own kind."""
    for each in item["spec"]["template"]["spec"]["replicatedJobs"]:
        made = {"apiVersion": "batch/v1", "kind": "Job", **each["template"]}
        yield made | {"metadata": {"name": each["name"], **made["metadata"]}}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_object_is_valid(overlay: str) -> None:
    assert not [error for item in rendered(overlay) for error in errors(item)]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_jobs_of_a_training_are_valid_for_kubernetes_itself(overlay: str) -> None:
    assert not [error for job in jobs(one(rendered(overlay), "TrainingRuntime")) for error in errors(job)]


def test_no_schema_is_kept_that_nothing_needs() -> None:
    objects = [item for overlay in OVERLAYS for item in rendered(overlay)]
    used = {schemas.named(item["apiVersion"], item["kind"]) for item in objects} | {"batch_v1_Job.json"}
    assert {path.name for path in schemas.HERE.glob("*.json")} == used


def rule(item: Object) -> Object:
    return item["spec"]["groups"][0]["rules"][0]


MISTAKES: list[tuple[str, str, Callable[[Object], Any]]] = [
    ("ClusterQueue", "'cohort' was unexpected", lambda o: o["spec"].update(cohort="x")),  # its name in v1beta1
    ("ClusterQueue", "is not one of", lambda o: o["spec"].update(queueingStrategy="Fifo")),
    ("LocalQueue", "does not match", lambda o: o["spec"].update(clusterQueue="no such name")),
    ("ResourceFlavor", "'taint' was unexpected", lambda o: o["spec"].update(taint=[])),
    ("WorkloadPriorityClass", "is not of type 'integer'", lambda o: o.update(value="high")),
    ("Topology", "'levels' is a required", lambda o: o["spec"].pop("levels")),
    ("CronJob", "'cron' was unexpected", lambda o: o["spec"].update(cron="")),
    ("Deployment", "'replica' was unexpected", lambda o: o["spec"].update(replica=2)),
    ("Service", "'port' is a required", lambda o: o["spec"]["ports"][0].pop("port")),
    ("HorizontalPodAutoscaler", "'maxReplicas' is a required", lambda o: o["spec"].pop("maxReplicas")),
    ("PodDisruptionBudget", "'minUnavailable' was unexpected", lambda o: o["spec"].update(minUnavailable=1)),
    ("ClusterRules", "'expression' was unexpected", lambda o: rule(o).update(expression="up")),
    ("PrometheusRule", "'expression' was unexpected", lambda o: rule(o).update(expression="up")),
    ("PodMonitoring", "'ports' was unexpected", lambda o: o["spec"]["endpoints"][0].update(ports=9400)),
    ("PodMonitor", "'endpoints' was unexpected", lambda o: o["spec"].update(endpoints=[])),
    ("Network", "is not one of", lambda o: o["spec"].update(type="Fast")),
    ("GKENetworkParamSet", "is not one of", lambda o: o["spec"].update(deviceMode="NIC")),
    ("NetworkPolicy", "'ingres' was unexpected", lambda o: o["spec"].update(ingres=[])),
    ("Role", "is not of type 'array'", lambda o: o["rules"][0].update(verbs="get")),
    ("RoleBinding", "'roleRef' is a required", lambda o: o.pop("roleRef")),
    ("ServiceAccount", "is not of type 'boolean'", lambda o: o.update(automountServiceAccountToken="no")),
    ("Namespace", "'label' was unexpected", lambda o: o["metadata"].update(label={})),
    ("ResourceQuota", "'soft' was unexpected", lambda o: o["spec"].update(soft={})),
    ("LimitRange", "'type' is a required", lambda o: o["spec"]["limits"][0].pop("type")),
    ("ConfigMap", "is not of type 'string'", lambda o: o["data"].update(x=1)),
    ("ValidatingAdmissionPolicy", "'rules' was unexpected", lambda o: o["spec"].update(rules=[])),
    ("ValidatingAdmissionPolicyBinding", "'action' was unexpected", lambda o: o["spec"].update(action="Deny")),
    ("TrainingRuntime", "'podTemplateOverrides' was unexpected", lambda o: o["spec"].update(podTemplateOverrides=[])),
    ("TrainingRuntime", "'numProcPerNode' was unexpected", lambda o: o["spec"]["mlPolicy"]["torch"].update(numProcPerNode="auto")),
    ("TrainingRuntime", "'runAsNonroot' was unexpected", lambda o: pod([o])["spec"]["securityContext"].update(runAsNonroot=True)),
]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "message", "mistake"), MISTAKES, ids=[f"{kind}: {text}" for kind, text, _ in MISTAKES]
)
def test_a_schema_refuses_the_mistake(kind: str, message: str, mistake: Callable[[Object], Any]) -> None:
    item = one(rendered(STRICTEST) + rendered("dev+prometheus-operator+reaper+serving"), kind)
    mistake(item)
    assert any(message in error for error in errors(item))


def test_every_schema_was_tried_on_a_mistake() -> None:
    assert {f"_{kind}.json" for kind, _, _ in MISTAKES} | {"_Job.json"} == {
        f"_{path.name.rpartition('_')[2]}" for path in schemas.HERE.glob("*.json")
    }


def test_a_job_refuses_a_field_it_does_not_know() -> None:
    job = next(jobs(one(rendered("dev"), "TrainingRuntime")))
    job["spec"]["template"]["spec"]["containers"][0]["comand"] = []
    assert any("'comand' was unexpected" in error for error in errors(job))
