"""The metrics of a training for Prometheus: `GET /metrics` of the main process, on the port that DMD2_METRICS_PORT names.

A thread of its own answers, from the log of metrics and from what the loop has reported last; the training neither waits
for a scrape nor learns of one that failed. Without the variable nothing listens, and prometheus_client is not imported.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dmd2.errors import Refused
from dmd2.training.metrics_log import SCORE, read_metrics
from dmd2.training.optim import SKIPPED
from dmd2.training.spending import Spending

if TYPE_CHECKING:
    from prometheus_client import Metric

logger = logging.getLogger(__name__)
PORT = "DMD2_METRICS_PORT"
"""Environment variable: the port, on all addresses of the machine; empty = no metrics."""
NETWORKS, STRENGTH = ("student", "critic"), "_grad_l1"
"""What is trained; the ending of the strength of a term in the log."""
VALUES = {
    "samples_per_s": ("dmd2_samples_per_second", "Samples per second over all ranks, since the log line before."),
    "mfu": ("dmd2_mfu_ratio", "Model FLOPs utilization, from 0 to 1."),
    "eta_s": ("dmd2_remaining_seconds", "Seconds left at the mean speed of this start."),
    SCORE: ("dmd2_checkpoint_fid", "Frechet distance of the checkpoint that was scored last."),
}  # fmt: skip
"""Value in a line of the log -> metric, description."""
NETWORK_VALUES = {
    "grad_norm": ("dmd2_gradient_norm", "Norm of the gradient before clipping."),
    "lr": ("dmd2_learning_rate", "Learning rate."),
}
"""Value of a network in a line of the log -> metric, description."""


@dataclass(eq=False)  # a registry knows its collectors by their identity
class Exporter:
    """What is known of a training, as a collector of prometheus_client. All values have the label `recipe`."""

    recipe: str
    folder: Path
    """Folder with the log of metrics."""
    steps: int
    spending: Spending
    done: int = 0
    """Steps made, over all starts."""
    last_progress: float = field(default_factory=time.time)
    """Unix time of the last step, compiled graph, saved checkpoint or scored batch."""

    def report(self, done: int) -> None:
        """Called by the training loop whenever it has got further."""
        self.done, self.last_progress = done, time.time()

    def collect(self) -> Iterator[Metric]:
        lines = read_metrics(self.folder)
        last = {name: value for line in lines for name, value in line.items()}
        yield from self._state()
        yield from self._values(last)
        yield from self._losses(lines)
        yield from self._skipped(lines)

    def _state(self) -> Iterator[Metric]:
        spent = self.spending
        for name, value, text in (
            ("dmd2_steps_done", self.done, "Steps made, over all starts."),
            ("dmd2_steps", self.steps, "Steps of the whole training."),
            ("dmd2_last_progress_timestamp_seconds", self.last_progress, "Unix time of the last step, compiled graph, saved checkpoint or scored batch."),
            ("dmd2_restarts", spent.restarts, "Starts of the training before this one."),
            ("dmd2_gpus", spent.gpus, "GPUs of the training."),
            ("dmd2_gpu_hours", spent.gpu_hours, "GPU-hours of the training so far, over all starts."),
            ("dmd2_gpu_hours_budget", spent.budget or math.nan, "Largest number of GPU-hours of the run; NaN = no limit."),
            ("dmd2_gpu_hour_price", spent.price or math.nan, "Price of a GPU for an hour; NaN = not given."),
        ):  # fmt: skip
            yield self._gauge(name, text, {(): value})

    def _values(self, last: Mapping[str, float]) -> Iterator[Metric]:
        for key, (name, text) in VALUES.items():
            if key in last:
                yield self._gauge(name, text, {(): last[key]})
        if "peak_memory_gb" in last:
            text = "Peak memory of the main process on its device."
            yield self._gauge("dmd2_peak_memory_bytes", text, {(): last["peak_memory_gb"] * 1e9})
        phases = {(k[5:-2],): v for k, v in last.items() if k.startswith("time/") and k.endswith("_s")}
        text = "Seconds of a mean step by phase; `data` is the wait for the data loader."
        yield self._gauge("dmd2_step_phase_seconds", text, phases, "phase")
        for key, (name, text) in NETWORK_VALUES.items():
            found = {(k.split("/")[0],): v for k, v in last.items() if k.endswith(f"/{key}")}
            yield self._gauge(name, text, found, "network")

    def _losses(self, lines: list[dict[str, float]]) -> Iterator[Metric]:
        """Of each network's last line with an optimizer step: a loss that is no longer finite is not in it."""
        losses, strengths = {}, {}
        for network in NETWORKS:
            line = next((one for one in reversed(lines) if f"{network}/{SKIPPED}" in one), {})
            terms = {k.partition("/")[2]: v for k, v in line.items() if k.startswith(f"{network}/")}
            for term, value in terms.items():
                if term.endswith(STRENGTH):
                    strengths[(term.removesuffix(STRENGTH),)] = value
                elif term not in (*NETWORK_VALUES, SKIPPED):
                    losses[network, term] = value
        text = "Mean loss of a term since the log line before; a loss that is not finite is left out."
        yield self._gauge("dmd2_loss", text, losses, "network", "term")
        text = "L1 norm of the gradient of a term at the samples."
        yield self._gauge("dmd2_sample_gradient_norm", text, strengths, "term")

    def _skipped(self, lines: list[dict[str, float]]) -> Iterator[Metric]:
        from prometheus_client.core import CounterMetricFamily

        text = "Optimizer steps that were skipped because their gradient was not finite."
        found = CounterMetricFamily("dmd2_skipped_steps", text, labels=["recipe", "network"])
        for network in NETWORKS:
            found.add_metric(
                [self.recipe, network], sum(line.get(f"{network}/{SKIPPED}", 0.0) for line in lines)
            )
        yield found

    def _gauge(self, name: str, text: str, values: Mapping[Any, float], *labels: str) -> Metric:
        """`values`: {values of the labels: value}."""
        from prometheus_client.core import GaugeMetricFamily

        found = GaugeMetricFamily(name, text, labels=["recipe", *labels])
        for key, value in values.items():
            found.add_metric([self.recipe, *key], value)
        return found


@contextmanager
def metrics_endpoint(exporter: Exporter, is_main: bool) -> Iterator[None]:
    """Inside the block the main process serves the metrics, if DMD2_METRICS_PORT names a port. One that is taken is a warning.

    Raises:
        Refused: The variable is not a port.
    """
    port = _port()
    if not port or not is_main:
        yield
        return
    from prometheus_client import CollectorRegistry, start_http_server

    registry = CollectorRegistry()
    registry.register(exporter)
    try:
        server, thread = start_http_server(port, registry=registry)
    except OSError as error:
        logger.warning(
            "the metrics of this training are not served: port %d cannot be opened (%s)", port, error
        )
        yield
        return
    logger.info("metrics for Prometheus: port %d, /metrics", port)
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _port() -> int:
    text = os.environ.get(PORT, "")
    if text and not (text.isascii() and text.isdigit() and 0 < int(text) < 65536):
        raise Refused(f"{PORT} is {text!r}; give the number of a port, from 1 to 65535, or leave it empty")
    return int(text or 0)
