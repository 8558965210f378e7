"""A server of Kubeflow Pipelines for the tests: it keeps what it is told, and accepts only what the contract allows.

Requests that offend the contract are answered with 400 and remembered, and so are answers of its own that would. It
runs nothing: tests say how a run goes on.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.parser import BytesParser
from email.policy import HTTP
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import kfp_server_api
import yaml
from google.protobuf.json_format import ParseDict, ParseError
from kfp.pipeline_spec import pipeline_spec_pb2
from kubernetes import client as kubernetes

from tests.bucket import QuietHandler, serve
from tests.pipelines.contract import Operation, offences, operations

Record = dict[str, Any]
NUMBERS = {"NUMBER_INTEGER": (int, float), "NUMBER_DOUBLE": (int, float)}
TYPES: dict[str, Any] = NUMBERS | {"STRING": str, "STRUCT": dict, "BOOLEAN": bool, "LIST": list}
SERVICES = [getattr(kfp_server_api, name) for name in dir(kfp_server_api) if name.endswith("ServiceApi")]
OPERATIONS = kfp_server_api.V2beta1PredicateOperation.allowable_values
PODS = ("list_namespaced_pod", "read_namespaced_pod_log")


class Answer(Exception):
    """Something else than 200."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass
class Server:
    url: str = ""
    pipelines: dict[str, Record] = field(default_factory=dict)
    versions: dict[str, Record] = field(default_factory=dict)
    experiments: dict[str, Record] = field(default_factory=dict)
    runs: dict[str, Record] = field(default_factory=dict)
    recurring: dict[str, Record] = field(default_factory=dict)
    pods: list[tuple[Record, str]] = field(default_factory=list)
    """(pod, its log)."""
    offences: list[str] = field(default_factory=list)
    seen: list[str] = field(default_factory=list)
    """Names of the operations that were asked for."""
    tokens: set[str | None] = field(default_factory=set)
    failing: int = 0
    """So many of the next requests are answered with 503."""
    looks: list[Callable[[Record], None]] = field(default_factory=list)
    """What happens to a run each time somebody looks at it, one after the other."""

    @contextmanager
    def serving(self) -> Iterator[Server]:
        with serve(type("Bound", (Handler,), {"server_of_test": self})) as self.url:
            yield self

    # Each answers the operation of its name: (path and query, body) -> the answer.

    def healthz_service_get_healthz(self, asked: Record, body: Any) -> Record:
        return {"multi_user": False}

    def experiment_service_list_experiments(self, asked: Record, body: Any) -> Record:
        return page(self.experiments, "experiments", asked)

    def experiment_service_create_experiment(self, asked: Record, body: Any) -> Record:
        return self._new(self.experiments, "experiment", body)

    def pipeline_service_list_pipelines(self, asked: Record, body: Any) -> Record:
        return page(self.pipelines, "pipelines", asked)

    def pipeline_service_create_pipeline(self, asked: Record, body: Any) -> Record:
        return self._new(self.pipelines, "pipeline", body)

    def pipeline_service_list_pipeline_versions(self, asked: Record, body: Any) -> Record:
        there(self.pipelines, asked["pipeline_id"])
        own = {k: v for k, v in self.versions.items() if v["pipeline_id"] == asked["pipeline_id"]}
        return page(own, "pipeline_versions", asked)

    def upload_pipeline_version(self, asked: Record, body: bytes) -> Record:
        there(self.pipelines, asked["pipelineid"])
        spec = parsed(body)
        version = {"pipeline_id": asked["pipelineid"], "display_name": asked["name"], "pipeline_spec": spec}
        return self._new(self.versions, "pipeline_version", version)

    def run_service_create_run(self, asked: Record, body: Any) -> Record:
        self._check(body)
        return self._new(self.runs, "run", body | {"state": "PENDING"}, unique=False)

    def run_service_get_run(self, asked: Record, body: Any) -> Record:
        run = there(self.runs, asked["run_id"])
        if self.looks:
            self.looks.pop(0)(run)
        return run

    def run_service_list_runs(self, asked: Record, body: Any) -> Record:
        return page(self.runs, "runs", asked)

    def run_service_terminate_run(self, asked: Record, body: Any) -> Record:
        run = there(self.runs, asked["run_id"])
        if run["state"] not in ("PENDING", "RUNNING", "PAUSED"):
            raise Answer(400, f"Failed to terminate the run: it is {run['state']}")
        run["state"] = "CANCELING"
        return {}

    def recurring_run_service_create_recurring_run(self, asked: Record, body: Any) -> Record:
        self._check(body)
        if not re.fullmatch(r"(\S+ ){5}\S+", body["trigger"]["cron_schedule"]["cron"]):
            raise Answer(400, "Schedule cron is not a valid cron expression of six fields")
        body = body | {"max_concurrency": str(body["max_concurrency"]), "status": f"{body['mode']}D"}
        return self._new(self.recurring, "recurring_run", body, unique=False)

    def recurring_run_service_list_recurring_runs(self, asked: Record, body: Any) -> Record:
        return page(self.recurring, "recurringRuns", asked)

    def recurring_run_service_delete_recurring_run(self, asked: Record, body: Any) -> Record:
        there(self.recurring, asked["recurring_run_id"])
        del self.recurring[asked["recurring_run_id"]]
        return {}

    def list_namespaced_pod(self, asked: Record, body: Any) -> Record:
        key, _, value = asked["labelSelector"].partition("=")
        labelled = [pod for pod, _ in self.pods if pod["metadata"]["labels"].get(key) == value]
        return {"kind": "PodList", "apiVersion": "v1", "metadata": {}, "items": labelled}

    def read_namespaced_pod_log(self, asked: Record, body: Any) -> str:
        (log,) = [log for pod, log in self.pods if pod["metadata"]["name"] == asked["name"]]
        return "\n".join(log.splitlines()[-int(asked["tailLines"]) :])

    def _new(self, kept: dict[str, Record], kind: str, body: Record, unique: bool = True) -> Record:
        if unique and any(one["display_name"] == body["display_name"] for one in kept.values()):
            raise Answer(409, f"The {kind} {body['display_name']} already exists")
        known = str(uuid.uuid4())
        kept[known] = body | {f"{kind}_id": known, "created_at": datetime.now(UTC).isoformat()}
        return kept[known]

    def _check(self, body: Record) -> None:
        """A run of a version that is there, with parameters that it has."""
        there(self.experiments, body["experiment_id"])
        version = there(self.versions, body["pipeline_version_reference"]["pipeline_version_id"])
        known = version["pipeline_spec"]["pipeline_spec"]["root"]["inputDefinitions"]["parameters"]
        given = body["runtime_config"].get("parameters", {})
        for name, value in given.items():
            if name not in known:
                raise Answer(400, f"parameter {name} is not an input of the pipeline")
            if not isinstance(value, TYPES[known[name]["parameterType"]]):
                raise Answer(400, f"parameter {name} is {value!r}, no {known[name]['parameterType']}")
            if value not in known[name].get("literals", [value]):
                raise Answer(400, f"parameter {name} is {value!r}, none of its literals")
        for name, spec in known.items():
            if name not in given and "defaultValue" not in spec and not spec.get("isOptional"):
                raise Answer(400, f"parameter {name} is required")


def there(kept: dict[str, Record], known: str) -> Record:
    if known not in kept:
        raise Answer(404, f"{known} not found")
    return kept[known]


def page(kept: dict[str, Record], name: str, asked: Record) -> Record:
    """Those that pass the filter, so many at a time; an empty list is left out, as the server does."""
    found = list(kept.values())
    if text := asked.get("filter"):
        for predicate in filtered(text):
            found = [one for one in found if str(one[predicate["key"]]) == predicate["string_value"]]
    if experiment := asked.get("experiment_id"):
        found = [one for one in found if one["experiment_id"] == experiment]
    if asked.get("sort_by", "").endswith(" desc"):
        found.reverse()
    start, size = int(asked.get("page_token") or 0), int(asked.get("page_size") or 20)
    rest = {"next_page_token": str(start + size)} if len(found) > start + size else {}
    part = found[start : start + size]
    return ({name: part} if part else {}) | rest


def filtered(text: str) -> list[Record]:
    """The predicates of a filter, whose fields may be written as stringValue or string_value."""
    plain = json.loads(re.sub(r'"([a-z]+)([A-Z])(\w*)":', lambda m: f'"{m[1]}_{m[2].lower()}{m[3]}":', text))
    for predicate in plain[
        "predicates"
    ]:  # a number stands for the word at its place, as everywhere in protobuf
        if isinstance(predicate["operation"], int):
            predicate["operation"] = OPERATIONS[predicate["operation"]]
    if wrong := offences(plain, "V2beta1Filter", kfp_server_api.models, "filter"):
        raise Answer(400, "; ".join(wrong))
    if any(predicate["operation"] != "EQUALS" for predicate in plain["predicates"]):
        raise Answer(400, "this server of the tests knows no other operation than EQUALS")
    return list(plain["predicates"])


def parsed(upload: bytes) -> Record:
    """What was uploaded, as the server keeps it; refused if it is no pipeline."""
    try:
        spec, *platform = yaml.safe_load_all(upload)
        ParseDict(spec, pipeline_spec_pb2.PipelineSpec())
        for one in platform:
            ParseDict(one, pipeline_spec_pb2.PlatformSpec())
    except (yaml.YAMLError, ParseError) as error:
        raise Answer(400, f"Failed to parse the pipeline: {error}") from None
    return {"pipeline_spec": spec} | ({"platform_spec": platform[0]} if platform else {})


class Handler(QuietHandler):
    """Finds the operation, holds the request and the answer against the contract, and asks the server in between."""

    server_of_test: Server
    known = sorted(
        operations([*SERVICES, kubernetes.CoreV1Api]), key=lambda one: one.path.groups
    )  # plain addresses before those with a name in them

    def handle_all(self) -> None:
        server, url = self.server_of_test, urlsplit(self.path)
        body = self.body()
        server.tokens.add(self.headers.get("Authorization"))
        if server.failing:
            server.failing -= 1
            return self.send(503, b"no healthy upstream", Content_Type="text/plain")
        try:
            operation, named = self._operation(url.path)
            server.seen.append(operation.name)
            asked = self._asked(operation, named, url.query)
            answer = getattr(server, operation.name)(asked, self._body(operation, body))
        except Answer as other:
            if other.status == 400:
                server.offences.append(str(other))
            return self.send_json({"code": 3, "message": str(other)}, other.status)
        if isinstance(answer, str):
            return self.send(200, answer.encode(), Content_Type="text/plain")
        models = kubernetes.models if operation.name in PODS else kfp_server_api.models
        server.offences += offences(answer, operation.answer, models, operation.name)
        return self.send_json(answer)

    do_GET = do_POST = do_DELETE = do_PATCH = do_PUT = handle_all  # noqa: N815 - as the base class calls them

    def _operation(self, path: str) -> tuple[Operation, Record]:
        for one in self.known:
            if one.method == self.command and (match := one.path.fullmatch(path)):
                return one, match.groupdict()
        raise Answer(404, f"Not Found: {self.command} {path}")

    def _asked(self, operation: Operation, named: Record, query: str) -> Record:
        pairs = dict(parse_qsl(query, strict_parsing=True, keep_blank_values=True) if query else [])
        if unknown := pairs.keys() - operation.query:
            raise Answer(400, f"{operation.name} has no {min(unknown)} in its query")
        return named | pairs

    def _body(self, operation: Operation, body: bytes) -> Any:
        if operation.file:
            return self._file(operation.file, body)
        if not operation.body:
            return None
        if self.headers["Content-Type"] != "application/json":
            raise Answer(400, f"{operation.name} takes JSON")
        value = json.loads(body)
        if wrong := offences(value, operation.body, kfp_server_api.models, operation.name):
            raise Answer(400, "; ".join(wrong))
        return value

    def _file(self, name: str, body: bytes) -> bytes:
        head = f"Content-Type: {self.headers['Content-Type']}\r\n\r\n".encode()
        parts = BytesParser(policy=HTTP).parsebytes(head + body).iter_parts()
        for part in parts:
            if part.get_param("name", header="content-disposition") == name:
                return bytes(part.get_payload(decode=True))
        raise Answer(400, f"no {name} in the form")
