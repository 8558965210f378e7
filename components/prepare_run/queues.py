"""Kueue's queues of a run: in one that does not exist, its pods would wait for ever."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

from components.distill.launch import IN_A_POD, Where
from components.prepare_run.parameters import RunParameters
from dmd2.errors import Refused

if TYPE_CHECKING:
    from components.distill.kube import Kube

QUEUE = "dmd2"
"""Kueue's LocalQueue of pods with a GPU. It is fixed, because a pod label cannot be a parameter of a run."""
GROUP, VERSION, QUEUES = "kueue.x-k8s.io", "v1beta2", "localqueues"

logger = logging.getLogger(__name__)


def check_queues(given: RunParameters, where: Where) -> None:
    """Raise Refused if a queue of the run does not exist; nothing where there is no cluster."""
    if not IN_A_POD.exists() or not (names := sorted(set(_queues(given, where)))):
        return
    from components.distill.kube import connect  # the client takes a second to import

    kube = connect()
    for name in names:
        check_queue(kube, name)


def _queues(given: RunParameters, where: Where) -> Iterator[str]:
    if given.chosen_gpus:
        yield QUEUE
    if where == "trainjob" and given.queue:
        yield given.queue


def check_queue(kube: Kube, name: str) -> None:
    """Raise Refused if the cluster has Kueue and not this LocalQueue. Without Kueue nothing waits, and without the right to look
    nothing is known: both are logged."""
    from kubernetes.client import ApiException

    from components.distill.kube import message_of, patiently

    where = (GROUP, VERSION, kube.namespace, QUEUES, name)
    try:
        patiently(partial(kube.custom.get_namespaced_custom_object, *where))
    except ApiException as error:
        if _names_the_queue(error, name):
            raise Refused(
                f"the LocalQueue {name} is not in namespace {kube.namespace}, and pods would wait in it for ever; give the name of one as queue, "
                "or create it as manifests/README.md says"
            ) from None
        logger.warning("whether the LocalQueue %s exists is not known: %s", name, message_of(error))


def _names_the_queue(error: Exception, name: str) -> bool:
    """Whether the server knows LocalQueues and has none of this name: without Kueue the answer says nothing about one."""
    try:
        answer = json.loads(getattr(error, "body", ""))
        return bool(answer["reason"] == "NotFound" and answer["details"]["name"] == name)
    except (ValueError, KeyError, TypeError):
        return False
