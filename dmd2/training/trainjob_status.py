"""The progress of a training in the status of its TrainJob, where Kubeflow Trainer takes it: the feature TrainJobStatus, alpha in 2.3.

With the feature on, Trainer puts the address of its server, its certificate and a token that is renewed into the pods of a TrainJob.
A thread of its own sends; the training neither waits for an answer nor learns of one that failed. Without the address nothing is sent.
"""

from __future__ import annotations

import json
import logging
import math
import os
import ssl
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dmd2.errors import brief
from dmd2.training.exporter import Exporter
from dmd2.training.metrics_log import read_metrics

logger = logging.getLogger(__name__)
URL, CERTIFICATE, TOKEN = (f"KUBEFLOW_TRAINER_SERVER_{name}" for name in ("URL", "CA_CERT", "TOKEN"))
EVERY_S = 30.0
TIMEOUT_S = 10.0
MOST, LONGEST = 256, 64
"""Metrics of a status, and characters of the name of one, that Trainer takes."""


def trainer_status(exporter: Exporter) -> dict[str, Any]:
    """What is known of a training, in the form of Trainer's `TrainerStatus`. Metrics are the last finite values of the log."""
    last = {name: value for line in read_metrics(exporter.folder) for name, value in line.items()}
    metrics = {name: value for name, value in last.items() if math.isfinite(value) and len(name) <= LONGEST}
    status: dict[str, Any] = {
        "progressPercentage": 100 * exporter.done // exporter.steps,
        "metrics": [{"name": name, "value": f"{value:g}"} for name, value in metrics.items()][:MOST],
        "lastUpdatedTime": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }
    if math.isfinite(eta := last.get("eta_s", math.nan)):
        status["estimatedRemainingSeconds"] = round(eta)
    return status


@contextmanager
def trainjob_status(exporter: Exporter, is_main: bool) -> Iterator[None]:
    """Inside the block the main process keeps the status of its TrainJob, if the pod has an address for it; at the end a last time."""
    if not is_main or not os.environ.get(URL):
        yield
        return
    ended = threading.Event()
    thread = threading.Thread(target=_keep, args=(exporter, ended), daemon=True, name="trainjob status")
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _keep(exporter: Exporter, ended: threading.Event) -> None:
    """Send every few seconds, and at the end. A failure is logged once, not each time."""
    failure, is_last = "", False
    while not is_last:
        is_last = ended.wait(EVERY_S)
        before, failure = failure, _failure_to_send(trainer_status(exporter))
        if failure and failure != before:
            logger.warning(
                "the status of the TrainJob is not kept: %s does not take it (%s)", os.environ[URL], failure
            )


def _failure_to_send(status: dict[str, Any]) -> str:
    """Why the status could not be sent; empty if it was."""
    try:
        _send(status)
    except (OSError, ValueError) as error:
        return brief(error)
    return ""


def _send(status: dict[str, Any]) -> None:
    headers = {
        "Authorization": f"Bearer {Path(os.environ[TOKEN]).read_text()}",
        "Content-Type": "application/json",
    }
    body = json.dumps({"trainerStatus": status}).encode()
    request = urllib.request.Request(os.environ[URL], body, headers, method="POST")
    trusted = ssl.create_default_context(cafile=os.environ[CERTIFICATE])
    with urllib.request.urlopen(request, context=trusted, timeout=TIMEOUT_S):
        pass
