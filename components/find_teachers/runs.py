"""The runs of a pipeline on KFP: start a run, find it by its name, ask for its state, stop it; and whose fault a failure is."""

from __future__ import annotations

import errno
import json
import re
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from functools import cached_property
from typing import Any, Literal, NamedTuple, Protocol

from dmd2.errors import Refused, brief, near_miss
from dmd2.io.local import json_digest

EXPERIMENT = "retrain"
"""Experiment of the runs in the UI."""
PAGE = 100
"""Runs that are listed by one request."""
TIMEOUT_S = 60
"""Seconds to wait for an answer of the API."""
STATES: dict[str, RunHealth] = {
    "SUCCEEDED": "succeeded", "FAILED": "failed", "SKIPPED": "failed", "CANCELED": "cancelled",
}  # fmt: skip
"""The states of a run that has ended."""
RunHealth = Literal["alive", "succeeded", "failed", "cancelled", "gone"]
Cause = Literal["infrastructure", "teacher", "unknown"]
CAUSES: dict[Cause, str] = {
    "teacher": r"exit (code|status) \(?(64|76)\b|OOMKilled|diverged",
    "infrastructure": r"exit (code|status) \(?(74|75|79|143)\b|pod (was )?deleted|preempt|evict|disrupt|waited for|"
    r"node .*(lost|shut|drain|unreachable|not ready|low on resource)|imminent node|no space left|"
    r"ErrImagePull|ImagePullBackOff|unschedulable|exceeded quota|does not answer",
}
"""cause of a failure -> what messages of it contain; the first that fits decides."""


def cause_of(message: str) -> Cause:
    """Whether the infrastructure or the teacher made a run fail, from what is said about it."""
    fitting = (cause for cause, words in CAUSES.items() if re.search(words, message, re.IGNORECASE))
    return next(fitting, "unknown")


class RunState(NamedTuple):
    health: RunHealth
    reason: str = ""
    waiting: timedelta = timedelta()
    """How long the run, or a step of it, has been waiting for its machine."""
    age: timedelta = timedelta()
    """Time since the run was created."""


class PipelineRuns(Protocol):
    @property
    def image(self) -> str:
        """Digest of the container images of the pipeline."""

    def start(self, name: str, settings: Mapping[str, Any]) -> str:
        """Start a run -> its id. Raises Refused if it was not started, OSError if it may have been."""

    def find(self, name: str) -> str:
        """The id of the oldest run of this name; empty if there is none."""

    def alive(self) -> dict[str, str]:
        """id -> claim of the runs that have neither ended nor been stopped."""

    def state(self, run: str) -> RunState:
        """Whether a run is alive or how it ended."""

    def stop(self, run: str) -> None:
        """Request the termination of a run."""

    def now(self) -> datetime:
        """The time of the platform."""


@dataclass
class UploadedPipeline:
    """The newest version of a pipeline on the KFP server."""

    name: str
    service_account: str = ""
    """Kubernetes service account of the runs; empty = the default of KFP."""
    api: str = ""
    """Address of the KFP API; empty = the one that the client finds."""

    def check(self, settings: Mapping[str, Any]) -> None:
        """Raise Refused for settings that are no parameters of the pipeline, before anything is claimed."""
        known = self._spec["root"].get("inputDefinitions", {}).get("parameters", {})
        for name, value in settings.items():
            if name not in known:
                raise Refused(f"pipeline {self.name!r} has no parameter {name!r}; {near_miss(name, known)}")
            if (choices := known[name].get("literals")) and value not in choices:
                raise Refused(f"{name} is {value!r}; {near_miss(str(value), choices)}")

    @cached_property
    def image(self) -> str:
        executors = self._spec.get("deploymentSpec", {}).get("executors", {})
        return json_digest(sorted({e["container"]["image"] for e in executors.values() if "container" in e}))

    def start(self, name: str, settings: Mapping[str, Any]) -> str:
        with _api_errors(f"run {name!r}"):
            run = self._client.run_pipeline(
                self._experiment, name, params=dict(settings), pipeline_id=self._version.pipeline_id,
                version_id=self._version.pipeline_version_id, service_account=self.service_account or None,
            )  # fmt: skip
            return str(run.run_id)

    def find(self, name: str) -> str:
        predicate = {"operation": "EQUALS", "key": "display_name", "stringValue": name}
        with _api_errors(f"runs called {name!r}"):
            found = self._client.list_runs(
                experiment_id=self._experiment,
                sort_by="created_at",
                filter=json.dumps({"predicates": [predicate]}),
            )
        return str(found.runs[0].run_id) if found.runs else ""

    def alive(self) -> dict[str, str]:
        over = [*STATES, "CANCELING"]
        predicates = [{"operation": "NOT_EQUALS", "key": "state", "stringValue": state} for state in over]
        found, token = dict[str, str](), ""
        while True:
            with _api_errors("runs that have not ended"):
                page = self._client.list_runs(
                    token, PAGE, "created_at", self._experiment, filter=json.dumps({"predicates": predicates})
                )
            for run in page.runs or ():
                parameters = (run.runtime_config and run.runtime_config.parameters) or {}
                found[str(run.run_id)] = str(parameters.get("claim", ""))
            if not (token := page.next_page_token):
                return found

    def state(self, run: str) -> RunState:
        try:
            with _api_errors(f"run {run}"):
                found = self._client.get_run(run)
        except FileNotFoundError:
            return RunState("gone", "the platform does not know the run any more: it was deleted")
        tasks = (found.run_details and found.run_details.task_details) or []
        if (health := STATES.get(found.state, "alive")) != "alive":
            errors = [one.error.message for one in (found, *tasks) if one.error and one.error.message]
            message = f": {brief(Exception('; '.join(dict.fromkeys(errors))))}" if errors else ""
            return RunState(health, f"the run ended as {found.state}{message}")
        now = self.now()
        since = [task.start_time or task.create_time for task in tasks if task.state == "PENDING"]
        since += [found.created_at] if found.state == "PENDING" else []
        waiting = now - min(filter(None, since), default=now)
        return RunState("alive", "", waiting, now - found.created_at)

    def stop(self, run: str) -> None:
        with _api_errors(f"run {run}"):
            self._client.terminate_run(run)

    def now(self) -> datetime:
        """The time of the platform, by the header `Date` of its first answer and the time since then."""
        date, then = self._date
        return date + timedelta(seconds=time.monotonic() - then)

    @cached_property
    def _date(self) -> tuple[datetime, float]:
        with _api_errors("the time of the platform"):
            _, _, headers = self._client._healthz_api.healthz_service_get_healthz_with_http_info()
        if not headers.get("Date"):
            raise OSError(errno.EIO, "the answer has no header Date", "the time of the platform")
        return parsedate_to_datetime(headers["Date"]).astimezone(UTC), time.monotonic()

    @cached_property
    def _client(self) -> Any:
        from kfp import Client

        with warnings.catch_warnings(), _api_errors("the API of Kubeflow Pipelines"):
            warnings.simplefilter("ignore", FutureWarning)  # about supported server versions
            client = Client(self.api or None)
        rest = client._healthz_api.api_client.rest_client
        request = rest.request

        def limited(*arguments: Any, **options: Any) -> Any:
            return request(*arguments, **options | {"_request_timeout": TIMEOUT_S})

        rest.request = limited  # without it, one answer that never comes would stop the watcher
        return client

    @cached_property
    def _experiment(self) -> str:
        for _ in range(2):
            try:
                with _api_errors(f"experiment {EXPERIMENT!r}"):
                    return str(
                        self._client.create_experiment(EXPERIMENT).experiment_id
                    )  # or the existing one
            except FileExistsError:  # another watcher was faster
                continue
        raise OSError(errno.EIO, "KFP neither creates nor finds it", f"experiment {EXPERIMENT!r}")

    @cached_property
    def _version(self) -> Any:
        with _api_errors(f"pipeline {self.name!r}"):
            found = self._client.get_pipeline_id(self.name)
            if not found:
                raise Refused(f"pipeline {self.name!r} is not there; upload it first")
            versions = self._client.list_pipeline_versions(found, page_size=1, sort_by="created_at desc")
        if not versions.pipeline_versions:
            raise Refused(f"pipeline {self.name!r} has no version; upload it again")
        return versions.pipeline_versions[0]

    @property
    def _spec(self) -> dict[str, Any]:
        """The compiled pipeline; it is nested one level deeper if it has Kubernetes settings."""
        spec: dict[str, Any] = self._version.pipeline_spec
        return spec.get("pipeline_spec", spec)


@contextmanager
def _api_errors(what: str) -> Iterator[None]:
    """Convert the client's exceptions into errors with a sentence and an exit status."""
    from kfp_server_api import ApiException
    from urllib3.exceptions import HTTPError

    try:
        yield
    except ApiException as error:
        message = brief(Exception(_message(error)))
        if error.status == 404:
            raise FileNotFoundError(errno.ENOENT, f"not known to the platform ({message})", what) from None
        if error.status == 409:
            raise FileExistsError(errno.EEXIST, f"there already ({message})", what) from None
        if error.status in (401, 403):
            raise PermissionError(errno.EACCES, f"not allowed by the platform ({message})", what) from None
        if error.status == 400:
            raise Refused(f"the platform refuses {what}: {message}") from None
        raise OSError(errno.EIO, f"the platform does not answer as it should ({message})", what) from None
    except HTTPError as error:
        raise OSError(errno.EIO, f"the platform does not answer ({brief(error)})", what) from None


def _message(error: Any) -> str:
    """The message in the JSON of the answer, or else its status."""
    try:
        return str(json.loads(error.body)["message"])
    except (TypeError, ValueError, KeyError):
        return f"{error.status} {error.reason}"
