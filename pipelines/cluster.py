"""Runs on a cluster, through the API of Kubeflow Pipelines: upload, submit, schedule, status, logs, cancel.

A pipeline version is named by the digest of its content, so uploading it again changes nothing. A schedule is identified by
its name and replaced when it differs, because the API has no update. KF_PIPELINES_TOKEN may hold a bearer token.
"""

from __future__ import annotations

import io
import json
import logging
import os
import re
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any

import tyro
from kfp import compiler
from kfp.client import Client
from kfp.dsl.base_component import BaseComponent
from kfp_server_api import (
    ApiException,
    V2beta1Pipeline,
    V2beta1PipelineTaskDetail,
    V2beta1RecurringRun,
    V2beta1Run,
)
from urllib3.exceptions import HTTPError

from dmd2.errors import Refused, brief
from pipelines.pods import COST_CENTRE, NOBODY, PRIORITY, RETRAIN, RUN

STATUS = {"SUCCEEDED": 0, "SKIPPED": 0, "FAILED": 1, "CANCELED": 130}
"""Final state of a run -> exit status."""
POLL_S = 10.0
"""Seconds between two requests for the state of a run."""
PATIENCE = 30
"""Number of failed requests in a row after which waiting is given up."""
PAGE = 100
IMAGE = re.compile(r"^ +image: (\S+)$", re.MULTILINE)
"""An image in a compiled pipeline."""
ONE_USER = "kubeflow"
"""The namespace argument of kfp.Client on a server without user namespaces."""


class Unavailable(Refused):
    """The server does not answer, or answers with an error of its own."""

    status = 69


@dataclass(frozen=True)
class KfpServer:
    """A KFP server, and the namespace of its runs."""

    host: str = os.environ.get("KF_PIPELINES_ENDPOINT", "")
    """Address of the KFP UI, whose server also serves the API; default: KF_PIPELINES_ENDPOINT."""
    namespace: str = "dmd2"
    """Namespace of the pods of the runs."""
    profile: str = ""
    """Namespace of the user, on a server with several users."""
    experiment: str = "dmd2"
    """KFP experiment of the runs."""

    @property
    def client(self) -> Client:
        """A client of the server; raises Refused without an address, Unavailable without an answer."""
        if not self.host:
            raise Refused(
                "the host is empty; give the address of the pipelines' UI, as http://localhost:8080 after "
                f"`kubectl -n {self.namespace} port-forward svc/ml-pipeline-ui 8080:80`, by --host, HOST= or KF_PIPELINES_ENDPOINT"
            )
        with warnings.catch_warnings(), _server_errors(self):
            warnings.simplefilter("ignore", FutureWarning)
            token = os.environ.get("KF_PIPELINES_TOKEN")
            logging.disable()  # it logs each failed attempt with a stack trace
            try:
                return Client(host=self.host, namespace=self.profile or ONE_USER, existing_token=token)
            finally:
                logging.disable(logging.NOTSET)

    def run(self, run_id: str) -> str:
        """Address of a run in the UI."""
        return f"{self.host.rstrip('/')}/#/runs/details/{run_id}"


@dataclass(frozen=True)
class Cluster(KfpServer):
    """A KFP server where runs are started."""

    account: str = ""
    """Kubernetes service account of the runs; empty = the default of KFP."""
    unpinned: bool = False
    """Upload pipelines whose images have no digest, though a tag may name another image tomorrow."""


ServerFlags = Annotated[KfpServer, tyro.conf.arg(name="")]
ClusterFlags = Annotated[Cluster, tyro.conf.arg(name="")]


@dataclass(frozen=True)
class CompiledPipeline:
    """A compiled pipeline."""

    name: str
    text: str

    @property
    def version(self) -> str:
        return sha256(self.text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class UploadedVersion:
    """A version of a pipeline on the server."""

    pipeline: str
    """Id of the pipeline on the server."""
    version: str
    """Id of its version."""


def compile_pipeline(pipeline: BaseComponent) -> CompiledPipeline:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pipeline.yaml"
        compiler.Compiler().compile(pipeline, str(path))
        return CompiledPipeline(pipeline.name, path.read_text())


def for_retraining(package: CompiledPipeline) -> CompiledPipeline:
    """The same pipeline under a name of its own, whose pods give way to those of runs that a person has started. A label
    cannot be a parameter of a run."""
    name, text = f"{package.name}-retrain", package.text
    assert text.count(f"  name: {package.name}\n") == 1
    text = text.replace(f"  name: {package.name}\n", f"  name: {name}\n")
    return CompiledPipeline(name, text.replace(f"{PRIORITY}: {RUN}", f"{PRIORITY}: {RETRAIN}"))


def for_cost_centre(package: CompiledPipeline, name: str) -> CompiledPipeline:
    """The same pipeline, whose pods say who pays: a label cannot be a parameter of a run, so it is a version of its own."""
    if not name:
        return package
    if not re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?", name):
        raise Refused(
            f"the cost centre is {name!r}; give a label of Kubernetes: at most 63 letters, digits, '-', '_' and '.'"
        )
    text = package.text.replace(f"{COST_CENTRE}: {NOBODY}\n", f"{COST_CENTRE}: {json.dumps(name)}\n")
    return CompiledPipeline(package.name, text)


def upload(cluster: Cluster, package: CompiledPipeline) -> UploadedVersion:
    """Upload the pipeline and this version of it if they are not on the server yet; refused if its images are not pinned."""
    tags = sorted({image for image in IMAGE.findall(package.text) if "@sha256:" not in image})
    if tags and not cluster.unpinned:
        raise Refused(
            f"pipeline {package.name} would run {tags[0]}, a tag that may name another image tomorrow; push the images by `make images-push`, "
            "which writes their digests, or allow tags by --unpinned (UNPINNED=1)"
        )
    client = cluster.client
    with _server_errors(cluster):
        pipeline = client.get_pipeline_id(package.name) or _create_pipeline(client, package.name)
        known = client.list_pipeline_versions(pipeline, page_size=PAGE, filter=_name_filter(package.version))
        if known.pipeline_versions:
            return UploadedVersion(pipeline, known.pipeline_versions[0].pipeline_version_id)
        with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
            path = Path(folder) / "pipeline.yaml"
            path.write_text(package.text)
            made = client.upload_pipeline_version(str(path), package.version, pipeline_id=pipeline)
    return UploadedVersion(pipeline, made.pipeline_version_id)


def _create_pipeline(client: Client, name: str) -> str:
    """Create a pipeline without versions: the client's `upload_pipeline` would name the first version after the pipeline."""
    made = client.pipelines.pipeline_service_create_pipeline(V2beta1Pipeline(display_name=name, name=name))
    return str(made.pipeline_id)


def submit(cluster: Cluster, package: CompiledPipeline, name: str, parameters: dict[str, Any]) -> str:
    """Start a run of this version -> its id."""
    uploaded, client = upload(cluster, package), cluster.client
    with _server_errors(cluster), redirect_stdout(io.StringIO()):
        run = client.run_pipeline(
            _experiment(client, cluster), name, params=parameters,
            pipeline_id=uploaded.pipeline, version_id=uploaded.version, service_account=cluster.account or None,
        )  # fmt: skip
    return str(run.run_id)


def schedule(
    cluster: Cluster, package: CompiledPipeline, name: str, cron: str, parameters: dict[str, Any]
) -> str:
    """Create this recurring run unless it exists, and delete others of the same name -> its id.

    It starts one run at a time, and missed runs are not made up for.
    """
    uploaded, client = upload(cluster, package), cluster.client
    with _server_errors(cluster), redirect_stdout(io.StringIO()):
        experiment = _experiment(client, cluster)
        there = _schedules(client, experiment, name)
        right = [one for one in there if _same(one, cluster, uploaded, cron, parameters)]
        kept = str(right[0].recurring_run_id) if right else ""
        if not kept:
            made = client.create_recurring_run(
                experiment, name, cron_expression=cron, max_concurrency=1, no_catchup=True, params=parameters,
                pipeline_id=uploaded.pipeline, version_id=uploaded.version,
                service_account=cluster.account or None,
            )  # fmt: skip
            kept = str(made.recurring_run_id)
        for one in there:  # after the new one exists, so that there is always one
            if one.recurring_run_id != kept:
                client.delete_recurring_run(one.recurring_run_id)
    return kept


def unschedule(cluster: KfpServer, name: str) -> int:
    """Delete the recurring runs of this name -> how many there were."""
    client = cluster.client
    with _server_errors(cluster), redirect_stdout(io.StringIO()):
        there = _schedules(client, _experiment(client, cluster), name)
        for one in there:
            client.delete_recurring_run(one.recurring_run_id)
    return len(there)


def _same(
    one: V2beta1RecurringRun,
    cluster: Cluster,
    uploaded: UploadedVersion,
    cron: str,
    parameters: dict[str, Any],
) -> bool:
    version, trigger = one.pipeline_version_reference, one.trigger
    return bool(
        version
        and version.pipeline_version_id == uploaded.version
        and trigger.cron_schedule
        and trigger.cron_schedule.cron == cron
        and one.runtime_config.parameters == parameters
        and str(one.max_concurrency) == "1"
        and one.no_catchup
        and cluster.account in ("", one.service_account)
        and one.status == "ENABLED"
    )


def _schedules(client: Client, experiment: str, name: str) -> list[V2beta1RecurringRun]:
    return list(
        _pages(
            lambda token: client.list_recurring_runs(
                token, PAGE, experiment_id=experiment, filter=_name_filter(name)
            ),
            "recurring_runs",
        )
    )


def recent(cluster: KfpServer, count: int = 10) -> list[V2beta1Run]:
    """The last runs, newest first."""
    client = cluster.client
    with _server_errors(cluster), redirect_stdout(io.StringIO()):
        experiment = _experiment(client, cluster)
        return client.list_runs("", count, "created_at desc", experiment_id=experiment).runs or []


def run(cluster: KfpServer, run_id: str) -> V2beta1Run:
    client = cluster.client
    with _server_errors(cluster):
        return client.get_run(run_id)


def tasks(found: V2beta1Run) -> list[V2beta1PipelineTaskDetail]:
    """The tasks of a run without KFP's own driver and executor tasks, in the order of their start."""
    details = (found.run_details and found.run_details.task_details) or []
    inner = ("-driver", "root", "executor")
    steps = [t for t in details if t.start_time and not (t.display_name or "").endswith(inner)]
    return sorted(steps, key=lambda task: task.start_time)


def wait(cluster: KfpServer, run_id: str, report: Callable[[str], None]) -> str:
    """Wait for the end of a run and report each change of state of the run and its tasks -> the final state.

    The client's own wait does not know cancelled runs.
    """
    states: dict[str, str] = {}
    for found in _poll(cluster, run_id):
        steps = {str(task.display_name): task.state for task in tasks(found)}
        for name, state in {"run": found.state, **steps}.items():
            if state and states.get(name) != state:
                states[name] = state
                report(f"{name}: {state.lower()}")
    return str(found.state)


def _poll(cluster: KfpServer, run_id: str) -> Iterator[V2beta1Run]:
    """Request the run repeatedly until it has ended; up to PATIENCE failed requests in a row are tolerated."""
    client, failures = cluster.client, 0
    while True:
        try:
            with _server_errors(cluster):
                found, failures = client.get_run(run_id), 0
            yield found
            if found.state in STATUS:
                return
        except Unavailable:
            failures += 1
            if failures == PATIENCE:
                raise
        time.sleep(POLL_S)


def cancel(cluster: KfpServer, run_id: str) -> None:
    """Terminate a run. KFP deletes its pods at once and does not run its exit handler."""
    client = cluster.client
    with _server_errors(cluster):
        client.terminate_run(run_id)


def logs(cluster: KfpServer, run_id: str, task: str, lines: int) -> Iterator[tuple[str, str]]:
    """(task, its log) of each pod of a run that still exists, from the Kubernetes API."""
    import kubernetes

    try:
        named = os.environ.get("KUBECONFIG")
        kubernetes.config.load_config(**({"config_file": named} if named else {}))
    except kubernetes.config.ConfigException as error:
        raise Refused(f"no access to Kubernetes ({brief(error)}); the logs are also in the UI") from None
    core = kubernetes.client.CoreV1Api()
    with _server_errors(cluster):
        pods = core.list_namespaced_pod(cluster.namespace, label_selector=f"pipeline/runid={run_id}").items
        for pod in sorted(pods, key=lambda pod: pod.metadata.creation_timestamp):
            step = (pod.metadata.annotations or {}).get("workflows.argoproj.io/node-name", pod.metadata.name)
            if task in step and pod.status.phase != "Pending":
                yield (
                    step,
                    core.read_namespaced_pod_log(
                        pod.metadata.name, cluster.namespace, container="main", tail_lines=lines
                    ),
                )


def _experiment(client: Client, cluster: KfpServer) -> str:
    return str(client.create_experiment(cluster.experiment).experiment_id)


def _name_filter(name: str) -> str:
    predicate = {"operation": "EQUALS", "key": "display_name", "stringValue": name}
    return json.dumps({"predicates": [predicate]})


def _pages(list_from: Callable[[str], Any], what: str) -> Iterator[Any]:
    token = ""
    while True:
        page = list_from(token)
        yield from getattr(page, what) or []
        token = page.next_page_token
        if not token:
            return


@contextmanager
def _server_errors(cluster: KfpServer) -> Iterator[None]:
    """Convert errors of the clients into Refused or Unavailable with one sentence."""
    from kubernetes.client import ApiException as KubernetesException

    where = cluster.host or "the cluster"
    try:
        yield
    except (ApiException, KubernetesException) as error:
        kind = Refused if 400 <= (error.status or 0) < 500 else Unavailable
        raise kind(f"{where} says {error.status} ({_message(error)})") from None
    except (HTTPError, TimeoutError) as error:
        reason = brief(getattr(error, "reason", error))  # without what urllib3 says of its retries
        raise Unavailable(f"{where} does not answer ({reason}); is it the address of the UI?") from None


def _message(error: Any) -> str:
    """The message in the JSON of the answer, or else its text."""
    try:
        return brief(Exception(json.loads(error.body)["message"]))
    except (ValueError, KeyError, TypeError):
        return brief(Exception(error.body or error.reason))
