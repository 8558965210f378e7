"""What the rendered manifests must keep, each rule a function from all objects of an overlay to what breaks it.

A finding begins with the object it is about. Rules look for pods in anything that holds a pod's spec, so a new kind of
object is judged without being named here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from itertools import chain, permutations
from typing import Any

from components.failure import FINAL
from components.prepare_run.parameters import STEP_REQUESTS
from images import pins
from images.__main__ import IMAGES
from manifests.__main__ import PLACEHOLDER

Object = dict[str, Any]
Objects = list[Object]
Rule = Callable[[Objects], Iterator[str]]

CLUSTER_WIDE = (
    "Namespace", "ValidatingAdmissionPolicy", "ValidatingAdmissionPolicyBinding", "ClusterRules", "ResourceFlavor", "ClusterQueue", "Topology", "WorkloadPriorityClass", "Network", "GKENetworkParamSet",
)  # fmt: skip
PRIVATE = {"10.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.168.0.0/16"}
SIDECARS = {"cpu": 0.2, "memory": 2 * 2**28}
"""Requests of the containers that KFP and Argo add to the pod of a step, by the LimitRange."""
FORBIDDEN_VERBS = {"*", "escalate", "bind", "impersonate"}
FORBIDDEN_RESOURCES = {"*", "secrets", "pods/exec", "pods/attach", "serviceaccounts/token", "nodes"}


def title(item: Object) -> str:
    return f"{item['kind']}/{item['metadata']['name']}"


def of(objects: Objects, *kinds: str) -> Objects:
    return [item for item in objects if item["kind"] in kinds]


def names(objects: Objects, *kinds: str) -> set[str]:
    return {item["metadata"]["name"] for item in of(objects, *kinds)}


def walk(value: Any) -> Iterator[Object]:
    """Every object inside, whole ones first."""
    if isinstance(value, dict):
        yield value
    if isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from walk(part)


def pods(objects: Objects) -> Iterator[tuple[str, Object]]:
    """(whose, {"metadata", "spec"}) of everything that becomes a pod."""
    for item in objects:
        for part in walk(item):
            if isinstance(part.get("spec"), dict) and "containers" in part["spec"]:
                yield title(item), part


def containers(objects: Objects) -> Iterator[tuple[str, Object, Object]]:
    """(whose, pod's spec, container)."""
    for whose, pod in pods(objects):
        for kind in ("initContainers", "containers"):
            for container in pod["spec"].get(kind, []):
                yield f"{whose} {container['name']}", pod["spec"], container


def security(spec: Object, container: Object) -> Object:
    """A container's settings over those of its pod."""
    return {**spec.get("securityContext", {}), **container.get("securityContext", {})}


def images(objects: Objects) -> Iterator[str]:
    """Only what `make manifests` gives a digest: the placeholder for ours, and other people's images in images.lock."""
    known = {PLACEHOLDER, *(found for name, found in pins.pins().items() if name not in IMAGES)}
    for where, _, container in containers(objects):
        image = container.get("image", "")
        if image not in known:
            yield f"{where}: image {image!r} is not in images.lock"


def non_root(objects: Objects) -> Iterator[str]:
    for where, spec, container in containers(objects):
        settings = security(spec, container)
        if settings.get("runAsNonRoot") is not True or settings.get("runAsUser", 0) == 0:
            yield f"{where}: may be root"


def read_only(objects: Objects) -> Iterator[str]:
    for where, spec, container in containers(objects):
        if security(spec, container).get("readOnlyRootFilesystem") is not True:
            yield f"{where}: its root can be written"


def no_escalation(objects: Objects) -> Iterator[str]:
    for where, spec, container in containers(objects):
        settings = security(spec, container)
        if settings.get("allowPrivilegeEscalation") is not False or settings.get("privileged"):
            yield f"{where}: may gain privileges"


def capabilities(objects: Objects) -> Iterator[str]:
    for where, spec, container in containers(objects):
        held = security(spec, container).get("capabilities", {})
        if held.get("drop") != ["ALL"] or held.get("add"):
            yield f"{where}: keeps capabilities {held.get('add', '')}".rstrip()


def seccomp(objects: Objects) -> Iterator[str]:
    for where, spec, container in containers(objects):
        if security(spec, container).get("seccompProfile", {}).get("type") != "RuntimeDefault":
            yield f"{where}: has no seccomp profile"


def host(objects: Objects) -> Iterator[str]:
    """Nothing of the machine."""
    for whose, pod in pods(objects):
        spec = pod["spec"]
        yield from (f"{whose}: {name}" for name in ("hostNetwork", "hostPID", "hostIPC") if spec.get(name))
        for volume in spec.get("volumes", []):
            if "hostPath" in volume:
                yield f"{whose}: directory {volume['hostPath']['path']} of the host"
    for where, _, container in containers(objects):
        if any("hostPort" in port for port in container.get("ports", [])):
            yield f"{where}: a port of the host"


def pod_security(objects: Objects) -> Iterator[str]:
    """The namespace refuses what these rules would find, whoever brings it."""
    denying = {
        item["spec"]["policyName"] for item in of(objects, "ValidatingAdmissionPolicyBinding")
        if item["spec"]["validationActions"] == ["Deny"]
    }  # fmt: skip
    for item in of(objects, "Namespace"):
        level = item["metadata"].get("labels", {}).get("pod-security.kubernetes.io/enforce")
        if level not in ("baseline", "restricted"):
            yield f"{title(item)}: enforces {level}" + ("" if denying else " and has no policy")


def resources(objects: Objects) -> Iterator[str]:
    for where, _, container in containers(objects):
        for kind in ("requests", "limits"):
            held = container.get("resources", {}).get(kind, {})
            yield from (f"{where}: no {kind} of {name}" for name in ("cpu", "memory") if name not in held)


def rbac(objects: Objects) -> Iterator[str]:
    for item in of(objects, "ClusterRole", "ClusterRoleBinding"):
        yield f"{title(item)}: reaches beyond the namespace"
    for item in of(objects, "Role"):
        for rule in item["rules"]:
            for name, forbidden in (
                ("verbs", FORBIDDEN_VERBS), ("resources", FORBIDDEN_RESOURCES), ("apiGroups", {"*"}),
            ):  # fmt: skip
                yield from (f"{title(item)}: {name} {each}" for each in forbidden & set(rule.get(name, [])))


def secrets(objects: Objects) -> Iterator[str]:
    for item in objects:
        if item["kind"] == "Secret" or item.get("imagePullSecrets") or item.get("secrets"):
            yield f"{title(item)}: holds a secret"
        for part in walk(item):
            yield from (
                f"{title(item)}: {word}"
                for word in ("secretKeyRef", "secretRef", "secretName")
                if word in part
            )


def bound(objects: Objects) -> set[str]:
    """Service accounts that may do something."""
    subjects = chain.from_iterable(item["subjects"] for item in of(objects, "RoleBinding"))
    return {subject["name"] for subject in subjects if subject["kind"] == "ServiceAccount"}


def tokens(objects: Objects) -> Iterator[str]:
    """A token only for who may do something with it."""
    for item in of(objects, "ServiceAccount"):
        if item.get("automountServiceAccountToken") is not (item["metadata"]["name"] in bound(objects)):
            yield f"{title(item)}: automountServiceAccountToken does not follow from its roles"
    for whose, pod in pods(objects):
        allowed = pod["spec"].get("serviceAccountName", "default") in bound(objects)
        if not allowed and pod["spec"].get("automountServiceAccountToken") is not False:
            yield f"{whose}: mounts a token that is good for nothing"


def closed(policy: Object) -> bool:
    spec = policy["spec"]
    both = sorted(spec.get("policyTypes", [])) == ["Egress", "Ingress"]
    return both and spec["podSelector"] == {} and not spec.get("ingress") and not spec.get("egress")


def network(objects: Objects) -> Iterator[str]:
    """Closed, and opened by name only."""
    for space in names(objects, "Namespace"):
        here = [item for item in of(objects, "NetworkPolicy") if item["metadata"].get("namespace") == space]
        if not any(closed(item) for item in here):
            yield f"Namespace/{space}: no policy denies everything"
    for item in of(objects, "NetworkPolicy"):
        for rule in item["spec"].get("ingress", []):
            yield from _open(title(item), rule.get("from"), rule.get("ports"), item["spec"]["podSelector"])
        for rule in item["spec"].get("egress", []):
            yield from _open(title(item), rule.get("to"), rule.get("ports"), item["spec"]["podSelector"])


def _open(where: str, peers: Objects | None, ports: Objects | None, own: Object) -> Iterator[str]:
    if not peers or {} in peers:
        yield f"{where}: everybody"
    for peer in peers or []:
        block = peer.get("ipBlock")
        if block and block["cidr"].endswith("/0"):
            yield (
                f"{where}: the Internet"
                if set(block.get("except", [])) >= PRIVATE
                else f"{where}: everywhere"
            )
        if peer.get("namespaceSelector") == {} or peer.get("podSelector") == {}:
            yield f"{where}: every pod"
        # Without ports only among themselves: KFP's services know which they use.
        if not ports and peer != {"podSelector": own}:
            yield f"{where}: every port"


def spaces(objects: Objects) -> Iterator[str]:
    known = names(objects, "Namespace")
    for item in objects:
        space = item["metadata"].get("namespace")
        if (space is None) is not (item["kind"] in CLUSTER_WIDE) or (space and space not in known):
            yield f"{title(item)}: namespace {space}"


def references(objects: Objects) -> Iterator[str]:
    """What is named exists: (who, what kind, name) of every name there is."""
    for who, kind, name in chain(
        _names_of_accounts(objects), _names_of_queues(objects), _names_of_pods(objects)
    ):
        if name not in names(objects, *kind.split("|")):
            yield f"{who}: no {kind} {name}"


def _names_of_accounts(objects: Objects) -> Iterator[tuple[str, str, str]]:
    for item in of(objects, "RoleBinding"):
        yield title(item), item["roleRef"]["kind"], item["roleRef"]["name"]
        yield from ((title(item), each["kind"], each["name"]) for each in item["subjects"])
    for item in of(objects, "ValidatingAdmissionPolicyBinding"):
        yield title(item), "ValidatingAdmissionPolicy", item["spec"]["policyName"]
    kinds = {"configmaps": "ConfigMap", "trainingruntimes": "TrainingRuntime"}
    for item in of(objects, "Role"):
        for rule in item["rules"]:
            for name in rule.get("resourceNames", []):
                yield from ((title(item), kinds[resource], name) for resource in rule["resources"])


def _names_of_queues(objects: Objects) -> Iterator[tuple[str, str, str]]:
    for item in of(objects, "LocalQueue"):
        yield title(item), "ClusterQueue", item["spec"]["clusterQueue"]
    for item in of(objects, "ClusterQueue"):
        selected = item["spec"]["namespaceSelector"]["matchLabels"]["kubernetes.io/metadata.name"]
        yield title(item), "Namespace", selected
        for group in item["spec"]["resourceGroups"]:
            yield from ((title(item), "ResourceFlavor", flavor["name"]) for flavor in group["flavors"])
    for item in of(objects, "ResourceFlavor"):
        if "topologyName" in item["spec"]:
            yield title(item), "Topology", item["spec"]["topologyName"]
    for item in of(objects, "Network"):
        yield title(item), item["spec"]["parametersRef"]["kind"], item["spec"]["parametersRef"]["name"]


def _names_of_pods(objects: Objects) -> Iterator[tuple[str, str, str]]:
    for whose, pod in pods(objects):
        yield whose, "ServiceAccount", pod["spec"].get("serviceAccountName", "default")
        for volume in pod["spec"].get("volumes", []):
            if "configMap" in volume:
                yield whose, "ConfigMap", volume["configMap"]["name"]
        notes = pod.get("metadata", {}).get("annotations", {})
        for card in json.loads(notes.get("networking.gke.io/interfaces", "[]")):
            if card["network"] != "default":
                yield whose, "Network", card["network"]


def inside(objects: Objects) -> Iterator[str]:
    """Names within one object: volumes, containers, topology levels."""
    levels = {level["nodeLabel"] for item in of(objects, "Topology") for level in item["spec"]["levels"]}
    for whose, pod in pods(objects):
        volumes = {volume["name"] for volume in pod["spec"].get("volumes", [])}
        present = {
            each["name"] for kind in ("initContainers", "containers") for each in pod["spec"].get(kind, [])
        }
        for where, spec, container in containers(objects):
            if spec is pod["spec"]:
                mounted = {mount["name"] for mount in container.get("volumeMounts", [])}
                yield from (f"{where}: no volume {name}" for name in mounted - volumes)
        for note, value in pod.get("metadata", {}).get("annotations", {}).items():
            if note.startswith("devices.gke.io/container.") and note.rpartition(".")[2] not in present:
                yield f"{whose}: no container {note.rpartition('.')[2]}"
            if note.startswith("kueue.x-k8s.io/podset-") and value not in levels:
                yield f"{whose}: no level {value} in a Topology"
    for item in of(objects, "TrainingRuntime"):
        yield from _trainer(item)


def _trainer(item: Object) -> Iterator[str]:
    """Kubeflow Trainer looks for the container `node`, and exit codes are read of a container that is there."""
    for job in item["spec"]["template"]["spec"]["replicatedJobs"]:
        spec = job["template"]["spec"]
        present = {each["name"] for each in spec["template"]["spec"]["containers"]}
        meant = {
            rule["onExitCodes"]["containerName"]
            for rule in spec["podFailurePolicy"]["rules"]
            if "onExitCodes" in rule
        }
        yield from (f"{title(item)}: no container {name}" for name in (meant | {"node"}) - present)
        for rule in spec["podFailurePolicy"]["rules"]:
            if "onExitCodes" in rule and rule["onExitCodes"]["values"] != sorted(FINAL):
                yield f"{title(item)}: exit codes {rule['onExitCodes']['values']} are not those that end a training"


def topologies(objects: Objects) -> Iterator[str]:
    """Kueue admits a pod without an annotation only where all flavors of its queue have a topology, or none has one."""
    placed = {
        item["metadata"]["name"] for item in of(objects, "ResourceFlavor") if "topologyName" in item["spec"]
    }
    for item in of(objects, "ClusterQueue"):
        used = {flavor["name"] for group in item["spec"]["resourceGroups"] for flavor in group["flavors"]}
        if used & placed and used - placed:
            yield f"{title(item)}: flavors with a topology beside {', '.join(sorted(used - placed))} without one"


def fits(objects: Objects) -> Iterator[str]:
    """A pod of the runtime, a step that trains in its own pod, and two nodes beside the step that follows them can be admitted: Kueue
    leaves out what asks for a resource that no flavor has or has too little of."""
    flavors = [
        {each["name"]: amount(each["nominalQuota"]) for each in flavor["resources"]}
        for item in of(objects, "ClusterQueue") for group in item["spec"]["resourceGroups"] for flavor in group["flavors"]
    ]  # fmt: skip
    for whose, pod in pods(objects):
        asked = total(pod["spec"])
        if not _admitted(asked, flavors):
            yield f"{whose}: no flavor has {asked}"
        node = pod["spec"]["containers"][0]
        shared = sum(
            amount(volume["emptyDir"]["sizeLimit"]) for volume in pod["spec"].get("volumes", [])
            if volume.get("emptyDir", {}).get("medium") == "Memory"
        )  # fmt: skip
        if shared >= amount(node["resources"]["limits"]["memory"]):
            yield f"{whose}: /dev/shm may take all of the memory"
    alone, following = (_step(*STEP_REQUESTS[where]) for where in ("here", "trainjob"))
    if flavors and not _admitted(alone, flavors):
        yield f"the step distill: no flavor has {alone}"
    for item in of(objects, "TrainingRuntime"):
        (_, node), *_ = pods([item])
        gang = {name: 2 * much for name, much in total(node["spec"]).items()}
        if flavors and not _admitted_together(following, gang, flavors):
            yield f"{title(item)}: the queue has no room for two nodes beside the step that follows them"
    hard = [item["spec"]["hard"] for item in of(objects, "ResourceQuota")]
    gpus = sum(have.get("nvidia.com/gpu", 0) for have in flavors)
    if any(amount(limit["requests.nvidia.com/gpu"]) != gpus for limit in hard):
        yield f"ResourceQuota: another number of GPUs than the queue's {gpus:.0f}"


def _step(cpu: str, memory: str) -> dict[str, float]:
    """What the pod of a step asks for, with the containers of KFP and Argo."""
    return {"cpu": amount(cpu) + SIDECARS["cpu"], "memory": amount(memory) + SIDECARS["memory"]}


def _admitted_together(
    step: dict[str, float], gang: dict[str, float], flavors: list[dict[str, float]]
) -> bool:
    """In one flavor, or each in its own."""
    both = {name: step.get(name, 0) + gang.get(name, 0) for name in step | gang}
    pairs = permutations(flavors, 2)
    return _admitted(both, flavors) or any(_admitted(step, [a]) and _admitted(gang, [b]) for a, b in pairs)


def _admitted(asked: dict[str, float], flavors: list[dict[str, float]]) -> bool:
    return any(all(have.get(name, 0) >= much for name, much in asked.items()) for have in flavors)


def total(spec: Object) -> dict[str, float]:
    """What a pod asks for: its containers and sidecars together, or one init container if that is more."""
    lasting = [
        *spec["containers"],
        *(each for each in spec.get("initContainers", []) if each.get("restartPolicy")),
    ]
    passing = [each for each in spec.get("initContainers", []) if not each.get("restartPolicy")]
    found: dict[str, float] = {}
    for container in lasting:
        for name, value in container["resources"]["requests"].items():
            found[name] = found.get(name, 0) + amount(value)
    for container in passing:
        for name, value in container["resources"]["requests"].items():
            found[name] = max(found.get(name, 0), amount(value))
    return found


def amount(quantity: str) -> float:
    """Kubernetes' quantities as numbers."""
    number, unit = re.fullmatch(r"([\d.]+)(m|[KMGT]i|)", quantity).groups()  # type: ignore[union-attr]
    factor = {"": 1, "m": 1e-3, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
    return float(number) * factor[unit]


RULES: dict[str, Rule] = {
    rule.__name__: rule
    for rule in (
        images, non_root, read_only, no_escalation, capabilities, seccomp, host, pod_security, resources, rbac,
        secrets, tokens, network, spaces, references, inside, topologies, fits,
    )
}  # fmt: skip
