"""A training on several machines, as a TrainJob of Kubeflow Trainer that outlives the pod which started it.

The name follows from the run and its folder: a launcher that starts again finds the job of the one before and follows it
on. It tells why the training waits, prints the log of rank 0, and at the end keeps a record of the job in the folder of
the run and deletes the job. Deleting its JobSet instead would start a failed training anew (kubeflow/trainer#3737).
"""

from __future__ import annotations

import json
import logging
import os
import queue
import re
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from typing import Any

from kubernetes.client import ApiException
from urllib3.exceptions import HTTPError

from components.distill.cause import (
    CONTAINER,
    Json,
    PodEnd,
    cause_of,
    condition_message,
    is_true,
    pod_end,
    reasons_to_wait,
)
from components.distill.kube import Call, Kube, Pod, Seen, message_of, patiently
from components.distill.launch import Training
from dmd2.errors import EXIT_RESTARTABLE, Refused
from dmd2.io.local import json_digest
from dmd2.io.storage import join_uri, open_store

logger = logging.getLogger("components.distill.trainjob")

GROUP, VERSION, TRAINJOBS, RUNTIMES = "trainer.kubeflow.org", "v1alpha1", "trainjobs", "trainingruntimes"
RUNTIME = "dmd2-torch"
"""The TrainingRuntime of manifests/base."""
QUEUE, PRIORITY = "kueue.x-k8s.io/queue-name", "kueue.x-k8s.io/priority-class"
RUN, WORK = "dmd2/run", "dmd2/work"
"""Label with the KFP id of the run; annotation with the digest of what the job computes."""
RECIPE, COST_CENTRE = "dmd2/recipe", "dmd2/cost-centre"
"""Labels by which the cost of a training is divided."""
ROOT = "dmd2/root"
"""Annotation of the TrainingRuntime: the folder on a bucket below which alone the account `trainer` may write."""
MANAGER = "dmd2.invalid/launcher"
RUN_S = 168 * 3600
"""Longest time that a training may run, from its last start; the time in a queue does not count."""
START_S = 3600.0
"""Longest time from admission until all pods run: machines that are started, and images of several GB."""
IDLE_RESTARTS = 5
"""Restarts that Kubernetes does not count, without a newer checkpoint in between, after which a training is stopped."""
POLL_S = 5.0
QUOTA_S = 10.0
"""Seconds between two attempts while the namespace's quota is full."""
CHECKPOINT = re.compile(r"checkpoints/(\d+)/")
ENDED = ("Complete", "Failed")


@dataclass
class TrainJob:
    """A launcher: the training runs in pods of its own, on each node one."""

    training: Training
    kube: Kube
    pod: Pod
    trainjob: Json = field(default_factory=dict)
    """The job as it was last seen."""
    objects: dict[str, dict[str, Json]] = field(default_factory=dict)
    """{kind: {uid: object}}, as the watches tell."""
    ends: dict[str, PodEnd] = field(default_factory=dict)
    """{uid: how the pod ended}, kept when the pods are gone."""
    verdict: str = ""
    """Why this launcher stopped the training itself."""
    stopped_by: int = 0
    """The signal that told this launcher to stop."""
    last_reason: str = ""
    """Why the training waited when that was logged last; empty = it ran."""

    @property
    def name(self) -> str:
        key = f"{self.training.run_id}/{self.training.folder}"
        return f"dmd2-{sha256(key.encode()).hexdigest()[:10]}"

    def send_signal(self, number: int) -> None:
        self.stopped_by = number

    def start(self) -> None:
        """Create the job, or follow the one that an earlier launcher of this run has created."""
        body = self.body()
        while not self.trainjob and not self.stopped_by:
            try:
                self.trainjob = patiently(partial(self._create, body))
                logger.info(
                    "TrainJob %s: %d nodes with %d GPUs",
                    self.name,
                    self.training.size.nodes,
                    self.training.size.gpus,
                )
            except ApiException as error:
                self._not_created(error)

    def _create(self, body: Json, **limits: Any) -> Json:
        where = (GROUP, VERSION, self.kube.namespace, TRAINJOBS)
        made: Json = self.kube.custom.create_namespaced_custom_object(
            *where, body, field_validation="Strict", **limits
        )
        return made

    def _not_created(self, error: ApiException) -> None:
        """Follow the job of this name, wait until there is room for one, or raise Refused."""
        message = message_of(error)
        if error.status == 409:
            self._adopt()
        elif error.status == 403 and "quota" in message:
            self._say(message)
            time.sleep(QUOTA_S)
        else:
            raise Refused(f"the TrainJob of this training is refused ({message}); see manifests/README.md")

    def _adopt(self) -> None:
        found = self._get()
        if found.get("metadata", {}).get("deletionTimestamp"):
            self._say(f"an earlier TrainJob {self.name} is being deleted")
            time.sleep(POLL_S)
        elif found:
            if found["metadata"].get("annotations", {}).get(WORK) != self.digest:
                raise Refused(
                    f"TrainJob {self.name} of this run computes something else; delete it by `kubectl -n {self.kube.namespace} delete "
                    f"trainjob {self.name}`, or start a new run"
                )
            logger.info("TrainJob %s is there already, and is followed on", self.name)
            self.trainjob = found

    def _get(self) -> Json:
        """The job; empty if there is none."""
        where = (GROUP, VERSION, self.kube.namespace, TRAINJOBS, self.name)
        try:
            found: Json = patiently(partial(self.kube.custom.get_namespaced_custom_object, *where))
            return found
        except ApiException as error:
            if error.status == 404:
                return {}
            raise Refused(f"TrainJob {self.name} cannot be read ({message_of(error)})") from None

    @property
    def digest(self) -> str:
        size = self.training.size
        return json_digest([self.training.arguments, size.nodes, size.gpus])[:16]

    def body(self) -> Json:
        """The TrainJob. Image, owner and priority are those of the launcher's own pod."""
        training, size = self.training, self.training.size
        labels = {"app.kubernetes.io/part-of": "dmd2", RUN: training.run_id}
        if size.queue:
            labels[QUEUE] = size.queue
            labels |= {key: value for key, value in self.pod.labels.items() if key == PRIORITY}
        owner = {
            key: value
            for key, value in (self.pod.workflow or {}).items()
            if key in ("apiVersion", "kind", "name", "uid")
        }
        costs = {RUN: training.run_id, RECIPE: training.arguments[1]}
        costs |= {key: value for key, value in self.pod.labels.items() if key == COST_CENTRE}
        labels |= costs
        node = {"metadata": {"labels": costs}, "spec": {"nodeSelector": training.pool}}
        patch = {"spec": {"replicatedJobs": [{"name": CONTAINER, "template": {"spec": {"template": node}}}]}}
        return {
            "apiVersion": f"{GROUP}/{VERSION}", "kind": "TrainJob",
            "metadata": {
                "name": self.name, "labels": labels, "annotations": {WORK: self.digest},
                "ownerReferences": [owner | {"controller": False, "blockOwnerDeletion": False}] if owner else [],
            },
            "spec": {
                "runtimeRef": {"apiGroup": GROUP, "kind": "TrainingRuntime", "name": RUNTIME},
                "activeDeadlineSeconds": RUN_S,
                "trainer": {
                    "image": self.pod.image, "numNodes": size.nodes, "numProcPerNode": size.processes,
                    "command": ["python", "-m", "components.distill.node", str(size.gpus), *training.arguments],
                    "env": [{"name": "DMD2_IMAGE", "value": self.pod.image}, *_metrics_port()],
                },
                "runtimePatches": [{"manager": MANAGER, "trainingRuntimeSpec": {"template": patch}}],
            },
        }  # fmt: skip

    def wait(self) -> None:
        """Follow the job to its end, keep its record, and delete it; or stop following when told to."""
        if self.stopped_by:
            return
        events: queue.Queue[Seen] = queue.Queue()
        self._watch(events)
        log = RankZeroLog(self.kube)
        idle = IdleRestarts(self.training)
        start = Deadline(START_S)
        while not self._over():
            with suppress(queue.Empty):
                self._see(events.get(timeout=POLL_S))
            while not events.empty():
                self._see(events.get())
            log.follow(self.all("pod"))
            waiting = self._waiting()
            self._say(waiting if waiting else "")
            if start.is_over(running=not waiting or is_true(self.trainjob, "Suspended")):
                self.verdict = f"the training has not begun within {START_S:g} s of its admission ({waiting})"
            for jobset in self.all("jobset"):
                if idle.count(jobset) >= IDLE_RESTARTS:
                    self.verdict = f"it was restarted {IDLE_RESTARTS} times without a newer checkpoint, by Kubernetes, which does not count that"
        if self.stopped_by:
            logger.info("TrainJob %s goes on; the next start of this step follows it", self.name)
            return
        log.finish()
        self._record()
        self._delete()

    def _over(self) -> bool:
        return bool(self.verdict or self.stopped_by or any(is_true(self.trainjob, kind) for kind in ENDED))

    def _watch(self, events: queue.Queue[Seen]) -> None:
        kube, name = self.kube, self.name
        mine = {"field_selector": f"metadata.name={name}"}
        calls: dict[str, Call] = {
            "trainjob": kube.listing(GROUP, VERSION, TRAINJOBS, **mine),
            "jobset": kube.listing("jobset.x-k8s.io", "v1alpha2", "jobsets", **mine),
            "pod": partial(kube.core.list_namespaced_pod, kube.namespace, label_selector=f"jobset.sigs.k8s.io/jobset-name={name}"),
            "event": partial(kube.core.list_namespaced_event, kube.namespace, field_selector="type=Warning"),
        }  # fmt: skip
        if self.training.size.queue:
            calls["workload"] = kube.listing("kueue.x-k8s.io", "v1beta2", "workloads")
        for kind, call in calls.items():
            kube.watch(kind, call, events)

    def _see(self, seen: Seen) -> None:
        if seen.event == "REFUSED":
            self._say(f"the cluster does not show {seen.kind}s ({seen.objects[0]['message']})")
            return
        known = {} if seen.event == "LISTED" else self.objects.setdefault(seen.kind, {})
        for one in seen.objects:
            if seen.event == "DELETED":
                known.pop(one["metadata"]["uid"], None)
            elif self._is_mine(seen.kind, one):
                known[one["metadata"]["uid"]] = one
            if seen.kind == "pod" and (end := pod_end(one)):
                self.ends[one["metadata"]["uid"]] = end
        self.objects[seen.kind] = known
        if seen.kind == "trainjob":
            self._see_trainjob(known)

    def _see_trainjob(self, known: dict[str, Json]) -> None:
        uid = self.trainjob["metadata"]["uid"]
        if uid in known:
            self.trainjob = known[uid]
        else:
            self.verdict = f"TrainJob {self.name} was deleted by somebody else"

    def _is_mine(self, kind: str, one: Json) -> bool:
        if kind == "event":
            about = one["involvedObject"].get("name", "")
            return bool(about == self.name or about.startswith(f"{self.name}-"))
        if kind == "workload":
            owners = one["metadata"].get("ownerReferences", [])
            return any(owner["uid"] == self.trainjob["metadata"]["uid"] for owner in owners)
        return True

    def all(self, kind: str) -> list[Json]:
        return list(self.objects.get(kind, {}).values())

    def warnings(self) -> list[Json]:
        """The newest first."""
        return sorted(
            self.all("event"),
            key=lambda one: one.get("lastTimestamp") or one.get("eventTime") or "",
            reverse=True,
        )

    def _waiting(self) -> str:
        """Why not all pods run; empty while they do."""
        running = [
            pod for pod in self.all("pod") if pod.get("status", {}).get("phase") in ("Running", "Succeeded")
        ]
        if len(running) >= self.training.size.nodes and not is_true(self.trainjob, "Suspended"):
            return ""
        return (
            reasons_to_wait(self.trainjob, self.all("workload"), self.all("pod"), self.warnings())
            or "its pods are being made"
        )

    def _say(self, message: str) -> None:
        """Log why the training waits, whenever that changes."""
        if message != self.last_reason:
            logger.info("TrainJob %s %s", self.name, f"waits: {message}" if message else "runs")
            self.last_reason = message

    def exit_status(self) -> int:
        if self.stopped_by:
            return 128 + self.stopped_by
        if self.verdict:
            return EXIT_RESTARTABLE
        if is_true(self.trainjob, "Complete"):
            return 0
        cause = cause_of(self.ends.values())
        return cause.status if cause else 1

    @property
    def sentence(self) -> str:
        """How the training ended."""
        if self.verdict:
            return self.verdict
        if is_true(self.trainjob, "Complete"):
            return "the training is complete"
        cause, message = cause_of(self.ends.values()), condition_message(self.trainjob, "Failed")
        return f"{cause.sentence}; the job: {message}" if cause else f"the job failed: {message}"

    def _record(self) -> None:
        """Keep what is known of the job in the folder of the run, and say why it failed."""
        events = [
            f"{one['involvedObject']['name']}: {one.get('reason')}: {one.get('message')}"
            for one in self.warnings()
        ]
        ends = sorted(self.ends.values(), key=lambda one: (one.attempt, one.rank))
        record = {
            "sentence": self.sentence, "exit_status": self.exit_status(), "trainjob": self.trainjob,
            "jobset": [one.get("status", {}) for one in self.all("jobset")], "ends": [one.model_dump() for one in ends], "events": events,
        }  # fmt: skip
        uid = self.trainjob["metadata"]["uid"]
        name = f"jobs/{self.training.folder}-{uid[:8]}.json"
        open_store(self.training.root).write(name, json.dumps(record, indent=1).encode())
        if not self.exit_status():
            return
        cause = cause_of(ends)
        for line in (cause.last_lines if cause else "").splitlines():
            logger.error("node %d: %s", cause.rank if cause else 0, line)
        for line in events[:5]:
            logger.error("event of %s", line)
        logger.error(
            "%s; the record of TrainJob %s is %s",
            self.sentence,
            self.name,
            join_uri(self.training.root, name),
        )

    def _delete(self) -> None:
        """Delete this job, and no other of its name."""
        where = (GROUP, VERSION, self.kube.namespace, TRAINJOBS, self.name)
        body = {"propagationPolicy": "Background", "preconditions": {"uid": self.trainjob["metadata"]["uid"]}}
        try:
            patiently(partial(self.kube.custom.delete_namespaced_custom_object, *where, body=body))
        except ApiException as error:
            if error.status not in (404, 409):
                logger.warning("TrainJob %s cannot be deleted (%s)", self.name, message_of(error))


def _metrics_port() -> list[Json]:
    """The trainer serves its metrics on the port on which this step would."""
    return [
        {"name": name, "value": os.environ[name]} for name in ("DMD2_METRICS_PORT",) if name in os.environ
    ]


@dataclass
class Deadline:
    """A time that runs only while the training should begin and has not."""

    seconds: float
    since: float = 0.0

    def is_over(self, running: bool) -> bool:
        if running:
            self.since = 0.0
            return False
        self.since = self.since or time.monotonic()
        return time.monotonic() - self.since > self.seconds


@dataclass
class IdleRestarts:
    """Restarts of the gang that JobSet does not count, since the last one that found a newer checkpoint."""

    training: Training
    uncounted: int | None = None
    """As last seen; what was before the first look is another launcher's."""
    checkpoint: int = -1
    idle: int = 0

    def count(self, jobset: Json) -> int:
        status = jobset.get("status", {})
        uncounted = status.get("restarts", 0) - status.get("restartsCountTowardsMax", 0)
        if self.uncounted is None or uncounted > self.uncounted:
            newest, before = newest_checkpoint(self.training.out), self.uncounted or 0
            self.idle = self.idle + uncounted - before if newest <= self.checkpoint else 0
            self.uncounted, self.checkpoint = uncounted, newest
        return self.idle


def newest_checkpoint(out: str) -> int:
    """Step of the newest checkpoint of an unfinished run on a bucket; 0 if there is none."""
    found = (CHECKPOINT.match(one.name) for one in open_store(out).list_objects("checkpoints/"))
    return max((int(one[1]) for one in found if one), default=0)


class RankZeroLog:
    """Prints the log of rank 0, pod after pod."""

    def __init__(self, kube: Kube) -> None:
        self.kube = kube
        self.threads: dict[str, threading.Thread] = {}
        self.running: set[str] = set()
        """Pods that have not ended, by their uid."""

    def follow(self, pods: list[Json]) -> None:
        phases = {pod["metadata"]["uid"]: pod.get("status", {}).get("phase") for pod in pods}
        self.running = {uid for uid, phase in phases.items() if phase == "Running"}
        for pod in pods:
            labels, uid = pod["metadata"].get("labels", {}), pod["metadata"]["uid"]
            first = labels.get("batch.kubernetes.io/job-completion-index") == "0"
            begun = phases[uid] in ("Running", "Succeeded", "Failed")
            if first and begun and uid not in self.threads:
                name = pod["metadata"]["name"]
                self.threads[uid] = threading.Thread(target=self._print, args=(name, uid), daemon=True)
                self.threads[uid].start()

    def _print(self, pod: str, uid: str) -> None:
        """Print the log to its end; after a broken connection go on behind the last line."""
        last = ""
        while True:
            seen = last
            try:
                for at, line in self.kube.log_lines(pod, CONTAINER):
                    if at > seen:
                        last = at
                        print(line, flush=True)
                if uid not in self.running:
                    return
            except ApiException as error:
                if error.status in (400, 403, 404):
                    if not last:
                        logger.info("the log of %s cannot be read (%s)", pod, message_of(error))
                    return
            except (HTTPError, OSError):
                pass
            time.sleep(1)

    def finish(self) -> None:
        """Wait a moment for the last lines."""
        for thread in self.threads.values():
            thread.join(10)
        sys.stdout.flush()


@dataclass(frozen=True)
class Runtime:
    """What the TrainingRuntime of the cluster says of the nodes of a training."""

    gpus: int
    """GPUs of each node."""
    root: str = ""
    """Folder on a bucket below which alone they may write; empty = it does not say."""

    def check_folder(self, folder: str) -> None:
        """Raise Refused for the folder of a run that the nodes may not write to."""
        if self.root and not f"{folder}/".startswith(f"{self.root.rstrip('/')}/"):
            raise Refused(
                f"the folder of the run is {folder}, and the pods of a TrainJob may write below {self.root} only, by the annotation {ROOT} of "
                f"the TrainingRuntime {RUNTIME}; give as root a folder there, as {join_uri(self.root, 'first')}"
            )


def find_runtime(kube: Kube) -> Runtime | str:
    """The runtime of the cluster, or why there is none for this account."""
    where = (GROUP, VERSION, kube.namespace, RUNTIMES, RUNTIME)
    try:
        found = patiently(partial(kube.custom.get_namespaced_custom_object, *where))
    except ApiException as error:
        return message_of(error)
    (job,) = [one for one in found["spec"]["template"]["spec"]["replicatedJobs"] if one["name"] == CONTAINER]
    containers = job["template"]["spec"]["template"]["spec"]["containers"]
    node = next(one for one in containers if one["name"] == CONTAINER)
    gpus = int(node.get("resources", {}).get("limits", {}).get("nvidia.com/gpu", 0))
    return Runtime(gpus, found["metadata"].get("annotations", {}).get(ROOT, ""))
