"""Deletion of TrainJobs that outlived their run: KFP ends a run that is terminated without giving its pods time, and a launcher that
died deletes nothing.

A TrainJob of a Workflow that is gone or has ended is deleted after a grace, in which its launcher may still keep its record. One
that has ended itself is deleted after a day, for it counts in the quota. Its state is logged before. TrainJobs that
belong to no Workflow are left alone: a person made them.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from functools import partial

from kubernetes.client import ApiException

from components.distill.cause import Json, is_true
from components.distill.kube import Kube, message_of, patiently
from components.distill.trainjob import ENDED, GROUP, TRAINJOBS, VERSION

logger = logging.getLogger("components.reap_jobs")

OURS = "app.kubernetes.io/part-of=dmd2"
WORKFLOWS = ("argoproj.io", "v1alpha1")
OVER = ("Succeeded", "Failed", "Error")
"""Phases of a Workflow that has ended."""
GRACE = timedelta(minutes=10)
"""Time for which a launcher may still be at work after its Workflow has ended, and a Workflow not be seen yet."""
KEPT = timedelta(days=1)
"""Time for which a TrainJob that has ended is kept, if its launcher has not deleted it."""


def reap(
    kube: Kube, now: datetime | None = None, *, grace: timedelta = GRACE, kept: timedelta = KEPT
) -> list[str]:
    """Delete what nobody follows -> the names of the TrainJobs."""
    now = now or datetime.now(UTC)
    listing = kube.listing(GROUP, VERSION, TRAINJOBS, label_selector=OURS)
    found: list[Json] = patiently(listing)["items"]
    deleted = []
    for job in found:
        if (reason := why_to_delete(kube, job, now, grace, kept)) and _delete(kube, job, reason):
            deleted.append(str(job["metadata"]["name"]))
    logger.info("%d TrainJobs, %d of them deleted", len(found), len(deleted))
    return deleted


def why_to_delete(kube: Kube, job: Json, now: datetime, grace: timedelta, kept: timedelta) -> str:
    """Why nobody needs the job any more; empty if somebody may."""
    meta = job["metadata"]
    owner = next((one for one in meta.get("ownerReferences", []) if one["kind"] == "Workflow"), None)
    if not owner or meta.get("deletionTimestamp") or now - _time(meta["creationTimestamp"]) < grace:
        return ""
    workflow = _workflow(kube, owner)
    if not workflow:
        return f"its Workflow {owner['name']} is gone"
    status = workflow.get("status", {})
    if status.get("phase") in OVER and now - _time(status["finishedAt"]) > grace:
        return f"its Workflow {owner['name']} has ended ({status['phase']})"
    ends = list(_ends(job))
    return "it has ended, and its launcher has not deleted it" if ends and now - max(ends) > kept else ""


def _workflow(kube: Kube, owner: Json) -> Json | None:
    """The Workflow of an owner reference; None if it is gone, or another of its name is there."""
    get = kube.custom.get_namespaced_custom_object
    try:
        found: Json = patiently(partial(get, *WORKFLOWS, kube.namespace, "workflows", owner["name"]))
    except ApiException as error:
        if error.status == 404:
            return None
        raise
    return found if found["metadata"]["uid"] == owner["uid"] else None


def _ends(job: Json) -> Iterator[datetime]:
    for condition in job.get("status", {}).get("conditions", []):
        if condition["type"] in ENDED and is_true(job, condition["type"]):
            yield _time(condition["lastTransitionTime"])


def _delete(kube: Kube, job: Json, reason: str) -> bool:
    """Log the state of the job and delete it -> whether it was this one that was there."""
    meta = job["metadata"]
    record = {"labels": meta.get("labels", {}), "uid": meta["uid"], "status": job.get("status", {})}
    logger.info("TrainJob %s is deleted: %s; it was %s", meta["name"], reason, json.dumps(record))
    where = (GROUP, VERSION, kube.namespace, TRAINJOBS, meta["name"])
    body = {"propagationPolicy": "Background", "preconditions": {"uid": meta["uid"]}}
    try:
        patiently(partial(kube.custom.delete_namespaced_custom_object, *where, body=body))
    except ApiException as error:
        if error.status not in (404, 409):
            raise
        logger.info("TrainJob %s was gone already (%s)", meta["name"], message_of(error))
        return False
    return True


def _time(text: str) -> datetime:
    return datetime.fromisoformat(text.replace("Z", "+00:00"))
