"""The Kubernetes API as the launcher uses it: its own pod, requests that outlive a busy server, watches that lose nothing."""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from queue import Queue
from typing import Any, NamedTuple

from kubernetes import client, config
from kubernetes.client import ApiException
from kubernetes.watch import Watch
from kubernetes.watch.watch import iter_resp_lines
from urllib3.exceptions import HTTPError

from components.distill.launch import IN_A_POD
from dmd2.errors import Refused, brief

logger = logging.getLogger("components.distill.kube")

Json = dict[str, Any]
Call = Callable[..., Any]
TIMEOUT = (5.0, 30.0)
"""Seconds to connect, and to wait for an answer."""
WATCH_S = 60
"""Seconds after which a watch is begun anew, so that a connection that died silently costs no more."""
LOG_S = 300.0
"""Seconds without a line after which a log is asked for anew, for the same reason."""
PAUSE_S = 1.0
PATIENCE_S = 600.0
"""Seconds for which a server that does not answer is asked again."""


class Seen(NamedTuple):
    """What a watch tells: all objects of a kind (LISTED), one that was ADDED, MODIFIED or DELETED, or that it is REFUSED."""

    kind: str
    event: str
    objects: list[Json]


@dataclass(frozen=True)
class Pod:
    """The pod in which the launcher runs."""

    name: str
    namespace: str
    image: str
    labels: dict[str, str]
    workflow: Json | None
    """The owner of the pod, if it is a Workflow: what is made for the run belongs to it too."""


class Kube:
    """A namespace of the API server, with the rights of this pod's account."""

    def __init__(self, namespace: str) -> None:
        self.namespace = namespace
        self.api = client.ApiClient()
        self.core = client.CoreV1Api(self.api)
        self.custom = client.CustomObjectsApi(self.api)

    def this_pod(self) -> Pod:
        found = self.plain(
            patiently(partial(self.core.read_namespaced_pod, os.environ["HOSTNAME"], self.namespace))
        )
        meta, containers = found["metadata"], {one["name"]: one for one in found["spec"]["containers"]}
        owners = [one for one in meta.get("ownerReferences", []) if one["kind"] == "Workflow"]
        main = containers.get("main", found["spec"]["containers"][0])
        return Pod(
            meta["name"], self.namespace, main["image"], meta.get("labels", {}), owners[0] if owners else None
        )

    def plain(self, answer: Any) -> Any:
        """An answer as the JSON it was."""
        return self.api.sanitize_for_serialization(answer)

    def listing(self, group: str, version: str, plural: str, **selectors: str) -> Call:
        """The call that lists, or watches, objects of a kind that is not Kubernetes' own."""
        return partial(
            self.custom.list_namespaced_custom_object, group, version, self.namespace, plural, **selectors
        )

    def watch(self, kind: str, call: Call, into: Queue[Seen]) -> None:
        """Put what is there into the queue, then what happens, as long as this process lives."""
        threading.Thread(
            target=self._watch, args=(kind, call, into), daemon=True, name=f"watch {kind}"
        ).start()

    def _watch(self, kind: str, call: Call, into: Queue[Seen]) -> None:
        while True:
            try:
                found = self.plain(call(_request_timeout=TIMEOUT))
                into.put(Seen(kind, "LISTED", found["items"]))
                version = found["metadata"]["resourceVersion"]
                limits = {"timeout_seconds": WATCH_S, "_request_timeout": (TIMEOUT[0], WATCH_S + TIMEOUT[1])}
                for event in Watch().stream(call, resource_version=version, **limits):
                    into.put(Seen(kind, event["type"], [event["raw_object"]]))
            except ApiException as error:  # 410: the version is too old, and everything is listed again
                if error.status in (401, 403, 404):
                    into.put(Seen(kind, "REFUSED", [{"message": message_of(error)}]))
            except (HTTPError, OSError, ValueError) as error:
                logger.debug("the watch of %s broke (%s)", kind, brief(error))
            time.sleep(PAUSE_S)

    def log_lines(self, pod: str, container: str) -> Iterator[tuple[str, str]]:
        """(time, line) of a container's log, followed to its end, or until the connection breaks or is silent for LOG_S."""
        answer = self.core.read_namespaced_pod_log(
            pod, self.namespace, container=container, follow=True, timestamps=True, _preload_content=False,
            _request_timeout=(TIMEOUT[0], LOG_S),
        )  # fmt: skip
        for line in iter_resp_lines(answer):
            at, _, text = line.partition(" ")
            yield at, text


def connect() -> Kube:
    """The API server of the cluster in which this pod runs."""
    config.load_incluster_config()
    return Kube(IN_A_POD.with_name("namespace").read_text().strip())


def patiently(call: Call) -> Any:
    """The answer, asked for again while the server is away or busy; ApiException for what it refuses."""
    end = time.monotonic() + PATIENCE_S
    while True:
        try:
            return call(_request_timeout=TIMEOUT)
        except ApiException as error:
            if error.status and error.status != 429 and error.status < 500:
                raise
            last: Exception = error
        except (HTTPError, OSError) as error:
            last = error
        if time.monotonic() > end:
            raise Refused(
                f"the Kubernetes API has not answered for {PATIENCE_S:g} s ({brief(last)}); run again when it does"
            )
        time.sleep(PAUSE_S)


def message_of(error: ApiException) -> str:
    """The server's own message."""
    try:
        return " ".join(str(json.loads(error.body)["message"]).split())
    except (ValueError, KeyError, TypeError):
        return str(error.reason)
