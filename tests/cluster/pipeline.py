"""A run of a compiled pipeline without KFP's backend: the graph of the IR is walked here, and each step is a pod of the cluster.

Made as KFP 2.17 and Argo make them: the inputs, conditions, loops and exit handler of a step; its pod with the settings of the
platform document, the volumes of KFP's launcher and Argo's container beside it; KFP's own executor in it (`executor.py`).
Not made: drivers, retries and the cache. Tasks of a graph run one after another, iterations of a loop side by side.
"""

from __future__ import annotations

import json
import re
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

import yaml

from dmd2.io.storage import open_store
from tests.cluster import executor
from tests.cluster.conftest import NAMESPACE, SECURE, Cluster, Json, owner_of, wait_for, workflow

EXECUTOR = Path(str(executor.__file__)).read_text()
OUTPUTS = "/tmp/kfp_outputs"
NODES = "$nodes"
"""Name of the labels of a step's nodes among its inputs."""
INPUT = re.compile(r"\{\{\$\.inputs\.parameters\['([^']+)'\]\}\}")
RUN_ID, EXECUTOR_INPUT = "{{$.pipeline_job_uuid}}", "{{$}}"


class StepFailed(Exception):
    """A step ended with another exit status than 0."""

    def __init__(self, step: str, status: int, log: str) -> None:
        super().__init__(f"{step} ended with exit status {status}:\n{log}")
        self.step, self.status, self.log = step, status, log


@dataclass
class PipelineRun:
    """A run of the pipeline, for a file that `python -m pipelines compile` writes."""

    cluster: Cluster
    compiled: Path
    folder: str
    """On a bucket: the pipeline root."""
    account: str = "launcher"
    run_id: str = field(default_factory=lambda: str(uuid.uuid4()))
    steps: list[str] = field(default_factory=list)
    """Those that succeeded, in the order of their ends."""

    def __post_init__(self) -> None:
        self.ir, self.platform = (as_go(one) for one in yaml.safe_load_all(self.compiled.read_text()))
        self.name = f"{self.ir['pipelineInfo']['name']}-{self.run_id[:8]}"

    @property
    def root(self) -> str:
        """Folder of the artifacts."""
        return f"{self.folder}/{self.ir['pipelineInfo']['name']}/{self.run_id}"

    def run(self, **arguments: Any) -> None:
        """Walk the whole graph; StepFailed, after the exit handler, if a step fails."""
        self.cluster.create(workflow(self.name))
        self.owner = owner_of(self.cluster.get("workflow", self.name))
        known = self.ir["root"]["inputDefinitions"]["parameters"]
        assert arguments.keys() <= known.keys()
        defaults = {name: one["defaultValue"] for name, one in known.items() if "defaultValue" in one}
        self._graph(self.ir["root"]["dag"], defaults | arguments)

    def _graph(self, graph: Json, given: Json) -> None:
        tasks, done = graph["tasks"], dict[str, Json]()
        failure: StepFailed | None = None
        for name in TopologicalSorter(
            {k: v.get("dependentTasks", []) for k, v in tasks.items()}
        ).static_order():
            policy = tasks[name].get("triggerPolicy", {})
            if failure and policy.get("strategy") != "ALL_UPSTREAM_TASKS_COMPLETED":
                continue
            inputs = self._inputs(self._sources(tasks[name]), given, done, failure)
            if not holds(policy.get("condition", ""), inputs):
                continue
            try:
                done[name] = self._task(tasks[name], inputs)
            except StepFailed as error:
                failure = failure or error
        if failure:
            raise failure

    def _task(self, task: Json, inputs: Json) -> Json:
        """The outputs of a task; none of a loop or a graph, because no graph of ours has any."""
        component = self.ir["components"][task["componentRef"]["name"]]
        if loop := task.get("parameterIterator"):
            items = inputs[loop["items"]["inputParameter"]]
            with ThreadPoolExecutor(len(items) or 1) as pool:
                each = [inputs | {loop["itemInput"]: item} for item in items]
                list(pool.map(lambda one: self._graph(component["dag"], one), each))
            return {}
        if "dag" in component:
            assert "outputs" not in component["dag"]
            self._graph(component["dag"], inputs)
            return {}
        return self._step(task, component, inputs)

    def _settings(self, task: Json) -> Json:
        """What the platform document says of the pod of a task; nothing for a graph."""
        label = self.ir["components"][task["componentRef"]["name"]].get("executorLabel", "")
        found: Json = self.platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"].get(label, {})
        return found

    def _sources(self, task: Json) -> Json:
        """{name: where it comes from} of parameters and artifacts of a task, and of the labels of its nodes."""
        inputs, selector = task.get("inputs", {}), self._settings(task).get("nodeSelector", {})
        nodes = {NODES: selector["nodeSelectorJson"]} if selector else {}
        return inputs.get("parameters", {}) | inputs.get("artifacts", {}) | nodes

    def _inputs(self, sources: Json, given: Json, done: dict[str, Json], failure: StepFailed | None) -> Json:
        """The values, by name; constants last, for they may name other parameters."""
        found, constants = dict[str, Any](), dict[str, Any]()
        for name, source in sources.items():
            match source:
                case {"componentInputParameter": key} | {"componentInputArtifact": key}:
                    found[name] = given[key]
                case {"taskOutputParameter": {"producerTask": task, "outputParameterKey": key}}:
                    found[name] = done[task][key]
                case {"taskOutputArtifact": {"producerTask": task, "outputArtifactKey": key}}:
                    found[name] = done[task][key]
                case {"taskFinalStatus": {"producerTask": task}}:
                    state = {"state": "FAILED" if failure else "SUCCEEDED", "pipelineTaskName": task}
                    error = {"message": f"{failure.step} failed", "code": 9} if failure else {}
                    found[name] = state | {"pipelineJobResourceName": self.name, "error": error}
                case {"runtimeValue": {"constant": value}}:
                    constants[name] = value
                case _:
                    raise ValueError(f"{name} comes from {source}, which is not played")
        return found | {name: self._filled(value, found) for name, value in constants.items()}

    def _filled(self, value: Any, inputs: Json) -> Any:
        """A constant with its placeholders replaced."""
        if not isinstance(value, str):
            return value
        return INPUT.sub(lambda one: str(inputs[one[1]]), value.replace(RUN_ID, self.run_id))

    def _step(self, task: Json, component: Json, inputs: Json) -> Json:
        """Run a step in its pod -> its outputs."""
        name = task["taskInfo"]["name"]
        executor_input = self._executor_input(name, component, inputs)
        pod = f"{self.name}-{name}-{uuid.uuid4().hex[:6]}"
        self.cluster.create(
            self._pod(pod, component["executorLabel"], self._settings(task), inputs, executor_input)
        )
        ended = wait_for(lambda: [] if (status := self.cluster.exit_status(pod)) is None else [status])
        log = self.cluster.log(pod)
        if ended[0]:
            raise StepFailed(name, ended[0], log)
        self.steps.append(name)
        said = as_go(json.loads(open_store(executor_input["outputs"]["folder"]).read(executor.OUTPUT)))
        artifacts = executor_input["outputs"]["artifacts"] | said.get("artifacts", {})
        types = {k: v["artifacts"][0]["type"] for k, v in executor_input["outputs"]["artifacts"].items()}
        return said.get("parameterValues", {}) | {
            k: v["artifacts"][0] | {"type": types[k]} for k, v in artifacts.items()
        }

    def _executor_input(self, name: str, component: Json, inputs: Json) -> Json:
        declared, made = component["inputDefinitions"], component.get("outputDefinitions", {})
        folder = f"{self.root}/{name}/{uuid.uuid4()}"
        artifacts = {
            key: {
                "artifacts": [
                    {"name": key, "type": one["artifactType"], "uri": f"{folder}/{key}", "metadata": {}}
                ]
            }
            for key, one in made.get("artifacts", {}).items()
        }
        return {
            "inputs": {
                "parameterValues": {key: inputs[key] for key in declared.get("parameters", {})},
                "artifacts": {key: {"artifacts": [inputs[key]]} for key in declared.get("artifacts", {})},
            },
            "outputs": {
                "parameters": {key: {"outputFile": f"{OUTPUTS}/{key}"} for key in made.get("parameters", {})},
                "artifacts": artifacts, "outputFile": f"{OUTPUTS}/output_metadata.json", "folder": folder,
            },
        }  # fmt: skip

    def _pod(self, name: str, label: str, settings: Json, inputs: Json, executor_input: Json) -> Json:
        """The pod of a step. The image is that of the cluster under test."""
        container = self.ir["deploymentSpec"]["executors"][label]["container"]
        words = [
            json.dumps(executor_input) if word == EXECUTOR_INPUT else word
            for word in (*container["command"], *container["args"])
        ]
        volumes, mounts = _volumes(settings)
        main = {
            "name": "main", "image": self.cluster.image, "command": ["python", "-c", EXECUTOR, json.dumps(executor_input), *words],
            "env": [*container["env"], *_secrets(settings)], "resources": self._resources(container["resources"], inputs), "volumeMounts": mounts,
            "securityContext": SECURE | {key: int(settings["securityContext"][key]) for key in ("runAsUser", "runAsGroup")},
        }  # fmt: skip
        wait = {"name": "wait", "image": self.cluster.image, "command": ["true"], "securityContext": SECURE}
        labels = settings["podMetadata"]["labels"] | {
            "workflows.argoproj.io/workflow": self.name,
            "pipeline/runid": self.run_id,
        }
        return {
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {"name": name, "namespace": NAMESPACE, "labels": labels, "ownerReferences": [self.owner]},
            "spec": {
                "serviceAccountName": self.account, "restartPolicy": "Never", "containers": [main, wait], "volumes": volumes,
                "nodeSelector": inputs.get(NODES, {}), "tolerations": settings.get("tolerations", []),
            },
        }  # fmt: skip

    def _resources(self, given: Json, inputs: Json) -> Json:
        """Accelerators of which there are none are not asked for."""
        cpu, memory = (
            [self._filled(given[f"resource{kind}{which}"], inputs) for which in ("Request", "Limit")]
            for kind in ("Cpu", "Memory")
        )
        limits = {"cpu": cpu[1], "memory": memory[1]}
        if accelerator := given.get("accelerator"):
            count = self._filled(accelerator["resourceCount"], inputs)
            limits |= {accelerator["resourceType"]: count} if count != "0" else {}
        return {"requests": {"cpu": cpu[0], "memory": memory[0]}, "limits": limits}


def _secrets(settings: Json) -> list[Json]:
    """Environment variables from Secrets."""
    return [
        {"name": key["envVar"], "valueFrom": {"secretKeyRef": {"name": one["secretName"], "key": key["secretKey"], "optional": one["optional"]}}}
        for one in settings.get("secretAsEnv", [])
        for key in one["keyToEnv"]
    ]  # fmt: skip


def _volumes(settings: Json) -> tuple[list[Json], list[Json]]:
    """Volumes of a pod and where they are: those of the platform document, and the one that KFP adds for artifacts."""
    volumes, mounts = [{"name": "gcs", "emptyDir": {}}], [{"name": "gcs", "mountPath": "/gcs"}]
    for one in settings["emptyDirMounts"]:
        source = {"sizeLimit": one["sizeLimit"]} | ({"medium": one["medium"]} if "medium" in one else {})
        volumes.append({"name": one["volumeName"], "emptyDir": source})
        mounts.append({"name": one["volumeName"], "mountPath": one["mountPath"]})
    for one in settings.get("secretAsVolume", []):
        source = {"secretName": one["secretName"], "optional": one["optional"]}
        volumes.append({"name": one["secretName"], "secret": source})
        mounts.append({"name": one["secretName"], "mountPath": one["mountPath"]})
    return volumes, mounts


def holds(condition: str, inputs: Json) -> bool:
    """Whether a condition of the IR, in CEL, holds: comparisons of parameters, with `!`, `&&` and `||`."""
    words = re.sub(r"!(?!=)", " not ", condition).replace("&&", " and ").replace("||", " or ")
    return not words or bool(eval(words.strip(), {"inputs": _Inputs(inputs)}))


@dataclass
class _Inputs:
    parameter_values: Json


def as_go(value: Any) -> Any:
    """Numbers as a program in Go passes them on: 1 for 1.0."""

    def number(text: str) -> float:
        return int(float(text)) if float(text).is_integer() else float(text)

    return json.loads(json.dumps(value), parse_float=number)
