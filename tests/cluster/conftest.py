"""A cluster for the tests of this folder: the test bed with played nodes and the overlay `dev`, or another one.

With KUBECONFIG, DMD2_TEST_IMAGE (an image of dmd2 by digest) and DMD2_TEST_BUCKET (a folder on a bucket) all set, it is that cluster,
where Trainer, Kueue and an overlay without GPUs are installed. What only the bed can do is skipped there.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from components.distill.trainjob import RUNTIME, newest_checkpoint
from dmd2.io import artifact
from dmd2.io.storage import open_store, upload_files
from manifests.__main__ import render
from tests import conftest
from tests.bucket import HOST
from tests.cluster import step
from tests.cluster.bed import STATUS, TIED, TRAINER, Bed, missing, run_kubectl
from tests.cluster.kubelet import NODES

ROOT = Path(__file__).parents[2]
NAMESPACE, IMAGE = "dmd2", "dmd2.invalid/dmd2:unset"
ELSEWHERE = ("KUBECONFIG", "DMD2_TEST_IMAGE", "DMD2_TEST_BUCKET")
"""Environment variables that name another cluster."""
STEP = Path(str(step.__file__)).read_text()
TOOLS = ("ip", "nsenter", "setpriv", "unshare", "openssl")
LIMIT_S = 900.0
"""Seconds after which something that should happen has not."""
Json = dict[str, Any]
LONG = " ".join((*conftest.MICRO, "distill.steps=40", "distill.save_every=10", "engine.shards=1"))
WORKFLOWS = {
    "apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition", "metadata": {"name": "workflows.argoproj.io"},
    "spec": {
        "group": "argoproj.io", "scope": "Namespaced", "names": {"kind": "Workflow", "plural": "workflows", "singular": "workflow"},
        "versions": [{
            "name": "v1alpha1", "served": True, "storage": True,
            "schema": {"openAPIV3Schema": {"type": "object", "x-kubernetes-preserve-unknown-fields": True}},
        }],
    },
}  # fmt: skip
"""Argo's kind, of which a run of KFP is one; Argo itself is not here."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.cluster)


def wait_for(what: Callable[[], Any], limit: float = LIMIT_S) -> Any:
    """Ask until there is an answer."""
    end = time.monotonic() + limit
    while not (found := what()):
        assert time.monotonic() < end, f"it did not happen within {limit:g} s"
        time.sleep(0.3)
    return found


@dataclass
class Cluster:
    """A cluster, as its administrator sees it."""

    kubeconfig: Path
    image: str
    own_bed: Bed | None = None

    @property
    def bed(self) -> Bed:
        if not self.own_bed:
            pytest.skip("only the test bed can do this")
        return self.own_bed

    def kubectl(self, *words: str, given: Any = None) -> str:
        given = "" if given is None else json.dumps(given)
        return run_kubectl(self.kubeconfig, "-n", NAMESPACE, *words, given=given)

    def create(self, *objects: Json) -> None:
        for one in objects:
            self.kubectl("create", "--validate=strict", "-f", "-", given=one)

    def get(self, kind: str, name: str) -> Json:
        """The object; empty if there is none."""
        with suppress(subprocess.CalledProcessError):
            found: Json = json.loads(self.kubectl("get", kind, name, "-o", "json"))
            return found
        return {}

    def all(self, kind: str, selector: str = "") -> list[Json]:
        found: list[Json] = json.loads(self.kubectl("get", kind, "-l", selector, "-o", "json"))["items"]
        return found

    def pods_of(self, job: str) -> list[Json]:
        return self.all("pods", f"jobset.sigs.k8s.io/jobset-name={job}")

    def patch(self, kind: str, name: str, change: Json) -> None:
        self.kubectl("patch", kind, name, "--type", "merge", "--patch", json.dumps(change))

    def log(self, pod: str) -> str:
        """The log of its first container."""
        return self.kubectl("logs", pod, "--tail=-1")

    def evict(self, pod: str) -> None:
        """By the Eviction API, as a drained node does it."""
        path = f"/api/v1/namespaces/{NAMESPACE}/pods/{pod}/eviction"
        meta = {"name": pod, "namespace": NAMESPACE}
        self.kubectl(
            "create",
            "--raw",
            path,
            "-f",
            "-",
            given={"apiVersion": "policy/v1", "kind": "Eviction", "metadata": meta},
        )

    def exit_status(self, pod: str) -> int | None:
        statuses = self.get("pod", pod).get("status", {}).get("containerStatuses", [])
        state = statuses[0]["state"].get("terminated") if statuses else None
        return int(state["exitCode"]) if state else None


@pytest.fixture(scope="session")
def cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """The cluster that the environment names, or the test bed."""
    kubeconfig, image, _ = (os.environ.get(name, "") for name in ELSEWHERE)
    if all(os.environ.get(name) for name in ELSEWHERE):
        yield Cluster(Path(kubeconfig), image)
    else:
        yield from bed_with_nodes(
            request.getfixturevalue("tmp_path_factory"), request.getfixturevalue("object_store")
        )


def bed_with_nodes(tmp_path_factory: pytest.TempPathFactory, object_store: str) -> Iterator[Cluster]:
    """The test bed with two nodes and the overlay `dev`. It ends with this process, also if that is killed."""
    if os.getuid():
        pytest.skip("the test bed plays nodes, which takes root")
    if absent := [name for name in TOOLS if not shutil.which(name)]:
        pytest.skip(f"the test bed takes {', '.join(absent)}, which are not installed")
    if names := missing():
        pytest.skip(
            f"{', '.join(names)} are not built: run `python -m tests.cluster.bed build`, which takes Go and half an hour"
        )
    bed = Bed(tmp_path_factory.mktemp("cluster") / "bed", is_tied=True)
    try:
        bed.up()
        with nodes_of_this_machine(bed, object_store):
            found = Cluster(bed.kubeconfig, IMAGE, bed)
            for text in (render("dev"), json.dumps(WORKFLOWS)):
                bed.kubectl("apply", "--server-side", "--validate=strict", "-f", "-", given=text)
            counted = "count/trainjobs.trainer.kubeflow.org"
            wait_for(lambda: counted in found.get("resourcequota", "dmd2").get("status", {}).get("used", {}))
            yield found
    finally:
        bed.down()


def nodes_of_this_machine(bed: Bed, object_store: str) -> AbstractContextManager[subprocess.Popen[bytes]]:
    """Two nodes whose pods see this checkout, its Python and the object store."""
    env = {
        "PATH": f"{sys.prefix}/bin:{os.defpath}", "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", "HOME": "/tmp", "USER": "dmd2",
        "XDG_CACHE_HOME": "/tmp/cache", "DMD2_CACHE": "/tmp/cache/dmd2", "MPLCONFIGDIR": "/tmp/cache/matplotlib",
        "OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "1000", HOST: object_store,
    }  # fmt: skip
    seen = {Path(one).resolve() for one in (sys.prefix, sys.base_prefix, ROOT)}
    keep = [str(one) for one in sorted(seen) if not seen & {*one.parents}]
    images = {"dmd2.invalid/*": {"user": 65532, "env": env, "workdir": "/tmp", "keep": keep}}
    ports = [object_store.rpartition(":")[2], str(bed.ports[STATUS])]
    return kubelet(bed, bed.folder / "nodes", images, NODES, "--ports", *ports, "--services", TRAINER)


@contextmanager
def kubelet(
    bed: Bed, folder: Path, images: Json, nodes: list[Json], *words: str
) -> Iterator[subprocess.Popen[bytes]]:
    """A process that plays nodes, with its files in a folder of its own. It ends with this one."""
    folder.mkdir()
    (folder / "kubeconfig").write_text(bed.kubeconfig.read_text())
    for name, content in {"images": images, "nodes": nodes}.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    files = ["--kubeconfig", "kubeconfig", "--images", "images.json", "--nodes", "nodes.json"]
    command = [*TIED, sys.executable, "-m", "tests.cluster.kubelet", *files, *words]
    with open(folder / "kubelet.log", "ab") as log:
        process = subprocess.Popen(
            command, cwd=folder, env=bed.env | {"PYTHONPATH": str(ROOT)}, stdout=log, stderr=log
        )
    try:
        yield process
    finally:
        process.terminate()
        process.wait()


@dataclass
class Run:
    """A run of KFP with the step `distill`, whose pod is made by hand as Argo would make it."""

    cluster: Cluster
    root: str
    name: str
    parameters: Json
    priority: str = "dmd2-run"
    starts: int = 0

    def start(self) -> str:
        """Make the pod of the step, for the first time or again -> its name."""
        owner = self.cluster.get("workflow", self.name)
        if not owner:
            self.cluster.create(workflow(self.name))
            owner = self.cluster.get("workflow", self.name)
        self.starts += 1
        pod = f"{self.name}-step-{self.starts}"
        self.cluster.create(step_pod(pod, owner, self.cluster.image, self.priority, self.parameters))
        return pod

    def wait(self, pod: str) -> int:
        """The exit status of the step."""
        return int(wait_for(lambda: (status := self.cluster.exit_status(pod)) is not None and str(status)))

    @property
    def job(self) -> str:
        """The name of its TrainJob."""
        found = wait_for(lambda: self.cluster.all("trainjobs", f"dmd2/run={self.name}"))
        return str(found[0]["metadata"]["name"])

    def record(self) -> Json:
        """What the launcher has kept of its job."""
        store = open_store(self.root)
        (name,) = [one.name for one in store.list_objects("jobs/")]
        found: Json = json.loads(store.read(name))
        return found

    def running_pods(self, attempt: int = 0) -> list[Json]:
        """The pods of the training when all of them run, after some restarts; rank 0 first."""
        job = self.job

        def running() -> list[Json]:
            found = [
                pod
                for pod in self.cluster.pods_of(job)
                if pod["status"].get("phase") == "Running"
                and pod["metadata"]["labels"]["jobset.sigs.k8s.io/restart-attempt"] == str(attempt)
            ]
            return found if len(found) == self.parameters["nodes"] else []

        return sorted(wait_for(running), key=lambda pod: str(pod["metadata"]["name"]))

    def training_pods(self) -> list[Json]:
        """The same, once there is a checkpoint."""
        found = self.running_pods()
        wait_for(lambda: newest_checkpoint(f"{self.root}/run"))
        return found

    def wait_for_line(self, pod: str, text: str) -> None:
        """Until a pod of the run has logged this."""

        def logged() -> bool:
            ended, log = self.cluster.exit_status(pod) is not None, ""
            with suppress(subprocess.CalledProcessError):
                log = self.cluster.log(pod)
            assert text in log or not ended, f"{pod} has ended without it:\n{log}"
            return text in log

        wait_for(logged, 120)


def workflow(name: str) -> Json:
    """A run of KFP that only exists: where Argo is, it waits."""
    templates = [{"name": "wait", "suspend": {}}]
    return {
        "apiVersion": "argoproj.io/v1alpha1", "kind": "Workflow", "metadata": {"name": name},
        "spec": {"entrypoint": "wait", "suspend": True, "templates": templates},
    }  # fmt: skip


def owner_of(workflow: Json) -> Json:
    """The owner reference of what belongs to a run."""
    meta = workflow["metadata"]
    kind = {"apiVersion": "argoproj.io/v1alpha1", "kind": "Workflow"}
    return kind | {"name": meta["name"], "uid": meta["uid"], "controller": True}


SECURE = {
    "runAsUser": 65532, "runAsGroup": 65532, "runAsNonRoot": True, "allowPrivilegeEscalation": False,
    "capabilities": {"drop": ["ALL"]}, "seccompProfile": {"type": "RuntimeDefault"},
}  # fmt: skip
"""The security context of a container, as the strictest standard wants it."""


def step_pod(name: str, workflow: Json, image: str, priority: str, parameters: Json) -> Json:
    """The pod of the step as Argo makes it, without the containers of KFP and Argo beside it."""
    main = {
        "name": "main", "image": image, "command": ["python", "-c", STEP, json.dumps(parameters)], "securityContext": SECURE,
        "resources": {"requests": {"cpu": "500m", "memory": "1Gi"}, "limits": {"cpu": "1", "memory": "2Gi"}},
        "volumeMounts": [{"name": "scratch", "mountPath": "/tmp"}],
    }  # fmt: skip
    owner = owner_of(workflow)
    labels = {"workflows.argoproj.io/workflow": owner["name"], "kueue.x-k8s.io/priority-class": priority}
    return {
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": name, "namespace": NAMESPACE, "labels": labels, "ownerReferences": [owner]},
        "spec": {
            "serviceAccountName": "launcher", "restartPolicy": "Never", "containers": [main],
            "volumes": [{"name": "scratch", "emptyDir": {}}],
        },
    }  # fmt: skip


@pytest.fixture
def place(cluster: Cluster, request: pytest.FixtureRequest) -> str:
    """An empty folder on a bucket that pods can reach."""
    if cluster.own_bed:
        return str(request.getfixturevalue("bucket"))
    return f"{os.environ[ELSEWHERE[2]].rstrip('/')}/test-{uuid.uuid4().hex[:12]}"


@pytest.fixture
def new_run(cluster: Cluster, place: str) -> Callable[..., Run]:
    """A run whose nodes run a script, or train on what is at `data`, with a folder of its own."""

    def make(**given: Any) -> Run:
        name = f"run-{uuid.uuid4().hex[:8]}"
        root = f"{place}/{name}"
        priority = given.pop("priority", "dmd2-run")
        own = {"run_id": name, "root": root, "data": place, "nodes": 2, "queue": ""}
        return Run(cluster, root, name, own | given, priority)

    return make


@pytest.fixture
def new_training(new_run: Callable[..., Run], place: str, made: Path) -> Callable[..., Run]:
    """A run that trains, beside shards and a teacher."""
    for folder in ("shards", "teacher"):
        files = [
            str(path.relative_to(made / folder)) for path in (made / folder).rglob("*") if path.is_file()
        ]
        upload_files(made / folder, files, open_store(f"{place}/{folder}"))
    return lambda overrides, **given: new_run(overrides=overrides, **given)


@pytest.fixture(scope="session")
def weights(made: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Digests of the weights of the same training in two processes of this machine."""
    out = tmp_path_factory.mktemp("local") / "run"
    words = [
        "distill",
        "edm-digits",
        "--data",
        str(made / "shards"),
        "--teacher",
        str(made / "teacher"),
        "--out",
        str(out),
    ]
    for change in LONG.split():
        name, _, value = change.partition("=")
        words += [f"--{name}", value]
    subprocess.run([sys.executable, "-m", "components.distill.launch", "2", *words], check=True)
    return student(str(out))


def student(run: str) -> dict[str, str]:
    files = artifact.read_manifest(run, "run").files
    return {
        one.path: one.sha256
        for one in files
        if one.path.endswith(".safetensors") and "checkpoints/" not in one.path
    }


def wait_until_gone(cluster: Cluster, job: str) -> None:
    """Until there is nothing left of a training."""
    wait_for(
        lambda: not (cluster.get("trainjob", job) or cluster.get("jobset", job) or cluster.pods_of(job)), 120
    )


def scripted(name: str, image: str, one: str, other: str) -> Json:
    """A TrainJob of two nodes that only end: node 1 does the one thing, node 0 the other."""
    script = f'if [ "$PET_NODE_RANK" = 1 ]; then {one}; else {other}; fi'
    return {
        "apiVersion": "trainer.kubeflow.org/v1alpha1", "kind": "TrainJob", "metadata": {"name": name, "namespace": NAMESPACE},
        "spec": {
            "runtimeRef": {"apiGroup": "trainer.kubeflow.org", "kind": "TrainingRuntime", "name": RUNTIME},
            "trainer": {"image": image, "numNodes": 2, "numProcPerNode": 1, "command": ["sh", "-c", script]},
        },
    }  # fmt: skip


def asked_by(log: Path, account: str, begun: int) -> set[tuple[str, str, str]]:
    """The rights that an account has used, by the API server's own record from some byte on; none may have been refused."""
    with open(log) as file:
        file.seek(begun)
        events = [json.loads(line) for line in file]
    asked = [event for event in events if event["user"]["username"].endswith(f":{account}")]
    assert not [one for one in asked if one["annotations"]["authorization.k8s.io/decision"] != "allow"]
    return {right(event["verb"], event["objectRef"]) for event in asked}


def right(verb: str, on: Json) -> tuple[str, str, str]:
    """(verb, group, resource), with the name of a runtime, because only one is allowed."""
    resource = "/".join(filter(None, (on["resource"], on.get("subresource"))))
    name = on.get("name", "") if resource == "trainingruntimes" else ""
    return verb, on.get("apiGroup", ""), f"{resource} {name}".rstrip()


def granted(role: Json) -> set[tuple[str, str, str]]:
    return {
        (verb, group, f"{resource} {name}".rstrip())
        for rule in role["rules"]
        for verb in rule["verbs"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for name in rule.get("resourceNames", [""])
    }
