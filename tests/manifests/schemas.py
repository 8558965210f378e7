"""`python -m tests.manifests.schemas`: fetch anew the schemas that the manifests are checked against.

They come from the Go modules of Kubernetes, Kueue, Kubeflow Trainer and GKE (`go mod download`), cut down to the kinds in
use and made strict: a field that a schema does not name is an error, where an API server might only drop it. The rules
in CEL of the custom resources stay behind; an API server checks those.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

Schema = dict[str, Any]

HERE = Path(__file__).parent / "schemas"
KUBERNETES = "k8s.io/kubernetes@v1.37.0"
BUILT_IN = {
    "api__v1": ("Namespace", "ServiceAccount", "ConfigMap", "ResourceQuota", "LimitRange", "Service"),
    "apis__admissionregistration.k8s.io__v1": (
        "ValidatingAdmissionPolicy",
        "ValidatingAdmissionPolicyBinding",
    ),
    "apis__apps__v1": ("Deployment",),
    "apis__autoscaling__v2": ("HorizontalPodAutoscaler",),
    "apis__policy__v1": ("PodDisruptionBudget",),
    "apis__batch__v1": ("Job", "CronJob"),
    "apis__networking.k8s.io__v1": ("NetworkPolicy",),
    "apis__rbac.authorization.k8s.io__v1": ("Role", "RoleBinding"),
}
CUSTOM = {
    "sigs.k8s.io/kueue@v0.19.2": (
        "config/components/crd/bases/kueue.x-k8s.io_{}.yaml",
        "v1beta2",
        ("resourceflavors", "clusterqueues", "localqueues", "topologies", "workloadpriorityclasses"),
    ),
    "github.com/kubeflow/trainer/v2@v2.3.0": (
        "manifests/base/crds/trainer.kubeflow.org_{}.yaml",
        "v1alpha1",
        ("trainingruntimes",),
    ),
    "github.com/prometheus-operator/prometheus-operator@v0.85.0": (
        "example/prometheus-operator-crd/monitoring.coreos.com_{}.yaml",
        "v1",
        ("podmonitors", "prometheusrules"),
    ),
    "github.com/GoogleCloudPlatform/gke-networking-api@v0.2.11": (
        "config/crds/networking.gke.io_{}.yaml",
        "v1",
        ("networks", "gkenetworkparamsets"),
    ),
}
_TEXTS: Schema = {"type": "object", "additionalProperties": {"type": "string"}}
_LABELS: Schema = {"from": {"type": "string"}, "to": {"type": "string"}}
_RULE: Schema = {
    "alert": {"type": "string"},
    "expr": {"type": "string"},
    "for": {"type": "string"},
    "labels": _TEXTS,
    "annotations": _TEXTS,
}
MANAGED: dict[str, Schema] = {
    "ClusterRules": {
        "groups": [{"name": {"type": "string"}, "interval": {"type": "string"}, "rules": [_RULE]}],
    },
    "PodMonitoring": {
        "selector": {"$ref": "#/$defs/io.k8s.apimachinery.pkg.apis.meta.v1.LabelSelector"},
        "endpoints": [{"port": {"type": ["integer", "string"]}, "interval": {"type": "string"}}],
        "targetLabels": {"metadata": {"type": "array", "items": {"enum": ["pod", "container", "node"]}}, "fromPod": [_LABELS]},
    },
}  # fmt: skip
"""The fields in use of the specs of Google's managed Prometheus, as its Go types have them (prometheus-engine, apis/monitoring/v1): its
module is not on the proxy."""
PROSE = ("description", "example", "default", "externalDocs", "title")


def named(api: str, kind: str) -> str:
    return f"{api.replace('/', '_')}_{kind}.json"


def fetch(module: str) -> Path:
    with tempfile.TemporaryDirectory() as empty:
        done = subprocess.run(
            ["go", "mod", "download", "-json", module], cwd=empty, check=True, capture_output=True
        )
    return Path(json.loads(done.stdout)["Dir"])


def strict(schema: Any) -> Any:
    """Without prose and extensions; objects with known fields have no others."""
    if isinstance(schema, list):
        return [strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    known = schema.get("properties")
    # The names of fields are no keywords, even one that is called `default`.
    kept = {
        word: {name: strict(part) for name, part in value.items()} if word == "properties" else strict(value)
        for word, value in schema.items()
        if word not in PROSE and not word.startswith("x-")
    }
    if (
        known
        and "additionalProperties" not in schema
        and not schema.get("x-kubernetes-preserve-unknown-fields")
    ):
        kept["additionalProperties"] = False
    return kept


def references(schema: Any) -> Iterator[str]:
    if isinstance(schema, dict):
        if isinstance(schema.get("$ref"), str):
            yield schema["$ref"].rpartition("/")[2]
        for part in schema.values():
            yield from references(part)
    if isinstance(schema, list):
        for part in schema:
            yield from references(part)


def closed(name: str, parts: dict[str, Schema]) -> Schema:
    """One schema with all that it refers to."""
    needed: dict[str, Schema] = {}
    todo = [name]
    while todo:
        part = todo.pop()
        if part not in needed:
            needed[part] = strict(parts[part])
            todo += references(needed[part])
    text = json.dumps({"$ref": f"#/$defs/{name}", "$defs": needed}, sort_keys=True)
    return json.loads(text.replace("#/components/schemas/", "#/$defs/"))


def parts_of(api: str) -> dict[str, Schema]:
    path = fetch(KUBERNETES) / "api/openapi-spec/v3" / f"{api}_openapi.json"
    return json.loads(path.read_text())["components"]["schemas"]


def built_in() -> Iterator[tuple[str, Schema]]:
    for api, kinds in BUILT_IN.items():
        parts = parts_of(api)
        for name, part in parts.items():
            for meant in part.get("x-kubernetes-group-version-kind", []):
                if meant["kind"] in kinds and name.endswith(f".{meant['kind']}"):
                    group = f"{meant['group']}/" if meant["group"] else ""
                    yield named(group + meant["version"], meant["kind"]), closed(name, parts)


def custom() -> Iterator[tuple[str, Schema]]:
    metadata = closed("io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta", parts_of("api__v1"))
    for module, (pattern, version, plurals) in CUSTOM.items():
        folder = fetch(module)
        for plural in plurals:
            spec = yaml.safe_load((folder / pattern.format(plural)).read_text())["spec"]
            served = {each["name"]: each["schema"]["openAPIV3Schema"] for each in spec["versions"]}
            schema = strict(served[version]) | {"$defs": metadata["$defs"]}
            schema["properties"]["metadata"] = {"$ref": metadata["$ref"]}
            yield named(f"{spec['group']}/{version}", spec["names"]["kind"]), schema


def with_known_fields(fields: Any) -> Schema:
    """Fields -> the schema of an object, and of its parts, that has no others. A list has such objects as items."""
    if isinstance(fields, list):
        return {"type": "array", "minItems": 1, "items": with_known_fields(fields[0])}
    if "$ref" in fields or isinstance(fields.get("type"), str | list):
        return fields
    parts = {name: with_known_fields(part) for name, part in fields.items()}
    return {"type": "object", "properties": parts, "additionalProperties": False}


def managed() -> Iterator[tuple[str, Schema]]:
    parts = parts_of("apis__batch__v1")
    metadata = closed("io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta", parts)
    selector = closed("io.k8s.apimachinery.pkg.apis.meta.v1.LabelSelector", parts)
    for kind, spec in MANAGED.items():
        fields = {name: {"type": "string"} for name in ("apiVersion", "kind")}
        known = with_known_fields({"spec": spec}) | {"required": ["apiVersion", "kind", "metadata", "spec"]}
        known["properties"] |= fields | {"metadata": {"$ref": metadata["$ref"]}}
        known["properties"]["spec"]["required"] = [name for name in spec if name != "targetLabels"]
        yield (
            named("monitoring.googleapis.com/v1", kind),
            known | {"$defs": metadata["$defs"] | selector["$defs"]},
        )


def main() -> None:
    HERE.mkdir(exist_ok=True)
    for old in HERE.glob("*.json"):
        old.unlink()
    for name, schema in [*built_in(), *custom(), *managed()]:
        (HERE / name).write_text(json.dumps(schema, sort_keys=True, separators=(",", ":")) + "\n")
        print(HERE / name)


if __name__ == "__main__":
    main()
