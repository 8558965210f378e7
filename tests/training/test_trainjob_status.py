"""The progress of a training, as a server receives it that stands where Trainer's would; `tests/cluster` has Trainer's own."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import certifi
import pytest

from dmd2 import stages
from dmd2.config import Config
from dmd2.training import trainjob_status
from dmd2.training.trainjob_status import CERTIFICATE, TOKEN, URL


class Server(HTTPServer):
    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.received: list[tuple[str, dict[str, Any]]] = []
        self.answer = 200


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.received.append((self.headers["Authorization"], body["trainerStatus"]))
        self.send_response(self.server.answer)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None: ...


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    (tmp_path / "token").write_text("secret")
    monkeypatch.setattr(trainjob_status, "EVERY_S", 0.01)
    monkeypatch.setenv(TOKEN, str(tmp_path / "token"))
    monkeypatch.setenv(CERTIFICATE, certifi.where())
    with Server() as server:
        monkeypatch.setenv(URL, f"http://127.0.0.1:{server.server_port}/status")
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def distil(micro: Config, made: Path, out: Path) -> None:
    stages.distill(micro, str(made / "shards"), str(made / "teacher"), str(out))


def test_a_training_tells_its_progress_and_its_metrics_to_the_end(
    micro: Config, made: Path, tmp_path: Path, server: Server
) -> None:
    distil(micro, made, tmp_path / "run")
    assert {token for token, _ in server.received} == {"Bearer secret"}
    told = [status for _, status in server.received]
    progress = [status["progressPercentage"] for status in told]
    assert progress == sorted(progress)
    assert progress[-1] == 100
    assert any(0 < percent < 100 for percent in progress)
    assert told[-1]["estimatedRemainingSeconds"] == 0
    metrics = {one["name"]: float(one["value"]) for one in told[-1]["metrics"]}
    assert metrics["step"] == micro.distill.steps
    assert "critic/grad_norm" in metrics


def test_a_server_that_refuses_is_told_of_once_and_does_not_stop_the_training(
    micro: Config, made: Path, tmp_path: Path, server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    server.answer = 403
    distil(micro, made, tmp_path / "run")
    (line,) = [one.message for one in caplog.records if "TrainJob" in one.message]
    assert "does not take it (HTTP Error 403: Forbidden)" in line
    assert len(server.received) > 1
