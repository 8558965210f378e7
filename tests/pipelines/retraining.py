"""What retraining is tested with: the API of Kubeflow Pipelines over HTTP, and processes that can be killed.

`Platform` answers the requests that `kfp.Client` makes, in the words of the server's OpenAPI (`kfp_server_api`), and starts
whatever it is given for each run. Watchers and runs are real processes; nothing here imports torch.
"""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import os
import random
import re
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import kfp_server_api as api

from components.find_teachers import run_reports
from components.find_teachers.ledger import Ledger
from components.find_teachers.limits import RetrainLimits
from components.find_teachers.runs import UploadedPipeline
from components.find_teachers.sources import find
from components.find_teachers.watch import Watcher
from dmd2.errors import Refused
from dmd2.io.artifact import MANIFEST, ArtifactFile, Manifest
from dmd2.io.storage import join_uri, open_store
from tests.bucket import serve

PARAMETERS = ("source", "teacher", "recipe", "overrides", "gate", "destination", "root", "claim")
V2 = "/apis/v2beta1"
LEASE = timedelta(seconds=6)


def spec(image: str = "dmd2@sha256:0") -> dict[str, Any]:
    """A pipeline as the server keeps it, with settings of Kubernetes beside it."""
    parameters = {name: {"parameterType": "STRING", "isOptional": True} for name in PARAMETERS}
    parameters["recipe"]["literals"] = ["edm-digits", "sdxl-4step"]
    executors = {"exec-distill": {"container": {"image": image}}, "exec-importer": {"importer": {}}}
    inner = {
        "deploymentSpec": {"executors": executors},
        "root": {"inputDefinitions": {"parameters": parameters}},
    }
    return {"pipeline_spec": inner, "platform_spec": {}}


@dataclass
class Platform:
    """Kubeflow Pipelines, as far as its API is asked."""

    begin: Callable[[dict[str, Any]], Any] = lambda run: None
    """What happens when a run is created."""
    health: Callable[[dict[str, Any]], str] = lambda run: str(run["state"])
    versions: list[dict[str, Any]] = field(default_factory=list)
    experiments: dict[str, dict[str, Any]] = field(default_factory=dict)
    runs: dict[str, dict[str, Any]] = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)
    """Requests that the contract does not know."""
    refuses: str = ""
    """Teacher whose runs are refused."""
    terminates: bool = True
    """Whether a run that is terminated ends."""
    page: int = 200
    """Most runs of a page."""
    clock: Callable[[], datetime] = lambda: datetime.now(UTC)
    url: str = ""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def upload(self, image: str) -> None:
        version = {
            "pipeline_id": "the-pipeline", "pipeline_version_id": f"version-{len(self.versions)}",
            "display_name": image, "created_at": _time(), "pipeline_spec": spec(image),
        }  # fmt: skip
        self.versions.insert(0, version)

    @contextmanager
    def serving(self) -> Iterator[Platform]:
        with serve(type("Bound", (Answers,), {"platform": self})) as self.url:
            yield self

    def answer(self, method: str, path: str, query: dict[str, str], body: Any) -> dict[str, Any]:
        if method == "POST" and path.endswith(":terminate"):
            return self._terminate(path.removeprefix(f"{V2}/runs/").removesuffix(":terminate"))
        if method == "POST":
            return self._create(path, body)
        if path == f"{V2}/healthz":
            return {"multi_user": False}
        if path == f"{V2}/pipelines":
            one = {"pipeline_id": "the-pipeline", "created_at": _time()}
            names = ("dmd2-distill", "dmd2-distill-retrain")
            return {"pipelines": _fitting([one | {"display_name": name} for name in names], query)}
        if path == f"{V2}/pipelines/the-pipeline/versions":
            assert query["sort_by"] == "created_at desc"
            return {"pipeline_versions": self.versions[: int(query["page_size"])]}
        if path == f"{V2}/experiments":
            return {"experiments": _fitting(list(self.experiments.values()), query)}
        if path == f"{V2}/runs":
            assert query["sort_by"] == "created_at"
            mine = [run for run in self.runs.values() if run["experiment_id"] == query["experiment_id"]]
            return self._page(_fitting([self._shown(run) for run in mine], query), query)
        found = re.fullmatch(f"{V2}/runs/([^/]+)", path)
        if not found or found[1] not in self.runs:
            raise Problem(404, f"{path} not found")
        return self._shown(self.runs[found[1]])

    def _page(self, runs: list[dict[str, Any]], query: dict[str, str]) -> dict[str, Any]:
        start, size = int(query.get("page_token") or 0), min(int(query.get("page_size", 10)), self.page)
        more = {"next_page_token": str(start + size)} if start + size < len(runs) else {}
        return {"runs": runs[start : start + size], "total_size": len(runs)} | more

    def _create(self, path: str, body: Any) -> dict[str, Any]:
        if path == f"{V2}/experiments":
            _contract(body, api.V2beta1Experiment)
            if body["display_name"] in self.experiments:
                raise Problem(409, "experiment already exists")
            made = {"experiment_id": f"experiment-{len(self.experiments)}", **body, "created_at": _time()}
            return self.experiments.setdefault(body["display_name"], made)
        assert path == f"{V2}/runs", path
        _contract(body, api.V2beta1Run)
        _contract(body["runtime_config"], api.V2beta1RuntimeConfig)
        _contract(body["pipeline_version_reference"], api.V2beta1PipelineVersionReference)
        parameters = body["runtime_config"]["parameters"]
        if unknown := parameters.keys() - {*PARAMETERS}:
            raise Problem(400, f"Invalid input error: unknown parameters {sorted(unknown)}")
        if self.refuses and parameters.get("teacher") == self.refuses:
            raise Problem(400, f"Invalid input error: {self.refuses}")
        run = {"run_id": str(uuid.uuid4()), "state": "RUNNING", **body, "created_at": _time(self.clock())}
        self.runs[run["run_id"]] = run
        run["begun"] = self.begin(run)
        return self._shown(run)

    def _terminate(self, run: str) -> dict[str, Any]:
        if run not in self.runs:
            raise Problem(404, f"{run} not found")
        self.runs[run]["state"] = "CANCELED" if self.terminates else "CANCELING"
        return {}

    def _shown(self, run: dict[str, Any]) -> dict[str, Any]:
        state = self.health(run)
        error = {"error": {"code": 2, "message": f"step distill: {run['why']}"}} if "why" in run else {}
        return {k: v for k, v in run.items() if k not in ("begun", "why")} | {"state": state} | error


class Problem(Exception):
    pass


class Answers(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    platform: Platform

    def do_GET(self) -> None:
        length = int(self.headers.get("Content-Length", 0))
        body = json.loads(self.rfile.read(length)) if length else None
        url = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        with self.platform.lock:
            try:
                status, answer = 200, self.platform.answer(self.command, url.path, query, body)
            except Problem as problem:
                status, answer = problem.args[0], {"code": 3, "message": problem.args[1]}
            except (AssertionError, KeyError) as error:
                self.platform.refused.append(f"{self.command} {self.path}: {error!r}")
                status, answer = 400, {"code": 3, "message": repr(error)}
        data = json.dumps(answer).encode()
        self.send_response_only(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Date", format_datetime(self.platform.clock(), usegmt=True))
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_POST = do_GET  # noqa: N815

    def log_message(self, *_: Any) -> None:
        pass


def _contract(body: Mapping[str, Any], model: Any) -> None:
    """The fields that the server's OpenAPI has for it, and no others."""
    assert body.keys() <= {*model.attribute_map.values()}, f"{model.__name__} has no {body.keys()}"


def _fitting(items: list[dict[str, Any]], query: dict[str, str]) -> list[dict[str, Any]]:
    predicates = json.loads(query.get("filter", '{"predicates": []}'))["predicates"]
    for predicate in predicates:
        operation = predicate["operation"]
        # Its name, or its number, as the client has it.
        assert operation in ("EQUALS", "NOT_EQUALS", 1), operation
        value = predicate.get("stringValue", predicate.get("string_value"))
        equal = operation != "NOT_EQUALS"
        items = [item for item in items if (item[predicate["key"]] == value) == equal]
    return items


def _time(at: datetime | None = None) -> str:
    return (at or datetime.now(UTC)).isoformat().replace("+00:00", "Z")


def teacher(folder: str, content: str = "weights") -> str:
    """A folder of a teacher with one file, its manifest last -> its digest."""
    import hashlib

    store, data = open_store(folder), content.encode()
    store.write("network.safetensors", data)
    file = ArtifactFile(path="network.safetensors", size=len(data), sha256=hashlib.sha256(data).hexdigest())
    return announce(folder, "teacher", [file]).digest


def announce(folder: str, kind: str, files: list[ArtifactFile] | None = None, **facts: Any) -> Manifest:
    manifest = Manifest(
        kind=kind, config=None, inputs={}, files=files or [], facts=facts, versions={}, seconds=0
    )
    open_store(folder).write(MANIFEST, manifest.model_dump_json().encode())
    return manifest


# Processes. Forked from a server that has one thread and has imported what they need.

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["pytest", "google.cloud.storage", "kfp", __name__])


def forked(work: Callable[..., None], *arguments: Any) -> ForkServerProcess:
    process = PROCESSES.Process(target=work, args=arguments, daemon=True)
    process.start()
    return process


@dataclass(frozen=True)
class World:
    """What all processes know."""

    environment: dict[str, str]
    teachers: str
    ledger: str
    root: str
    folder: Path
    """For locks and the journal."""
    limits: RetrainLimits
    preemptions: int = 0
    """So many runs of the teacher `preempted` lose their machine."""

    def note(self, *words: str) -> None:
        """A line of the journal, whole."""
        with (self.folder / "journal").open("ab", buffering=0) as journal:
            journal.write((" ".join(words) + "\n").encode())

    def noted(self, word: str) -> list[str]:
        path = self.folder / "journal"
        lines = path.read_text().splitlines() if path.exists() else []
        return [line.partition(" ")[2] for line in lines if line.split()[0] == word]


def watcher(world: World, seed: int) -> None:
    """Looks again and again, and now and then dies or sleeps at the worst moment."""
    os.environ.update(world.environment)
    os.dup2(os.open(world.folder / "said", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
    dice, parent = random.Random(seed), os.getppid()
    runs = Doomed("dmd2-distill", dice=dice, world=world)
    while os.getppid() == parent:  # not longer than the test
        ledger = Ledger(open_store(world.ledger), runs.now, lease=LEASE)
        watch = Watcher(
            ledger, runs, {"recipe": "edm-digits"}, world.root, 1.0, world.limits, f"watcher-{seed}"
        )
        with suppress(OSError):
            watch.reconcile()
            watch.start(find(world.teachers).teachers)
        time.sleep(dice.uniform(1, 8))


@dataclass
class Doomed(UploadedPipeline):
    """Starts runs, but may be killed before or after, be so late that its claim is over, or start one twice."""

    dice: random.Random = field(default_factory=random.Random)
    world: World | None = None

    def start(self, name: str, settings: Mapping[str, Any]) -> str:
        assert self.world
        fate = self.dice.random()
        if fate < 0.1:
            self._die("before")
        if fate > 0.9:
            self.world.note("late", name)
            time.sleep(1.3 * LEASE.total_seconds())
        run = super().start(name, settings)
        if 0.1 < fate < 0.2:
            self._die("after")
        if 0.2 < fate < 0.5:
            self.world.note("twice", name)
            super().start(name, settings)
        return run

    def _die(self, when: str) -> None:
        assert self.world
        self.world.note("died", when)
        os.kill(os.getpid(), signal.SIGKILL)


def distillation(world: World, run: str, parameters: dict[str, str], seed: int) -> None:
    """Does what the pipeline of a distillation does, as far as the ledger is concerned, and may be killed anywhere."""
    os.environ.update(world.environment)
    dice = random.Random(seed)
    name, claim, root = parameters["teacher"].rpartition("/")[2], parameters["claim"], parameters["root"]
    try:
        run_reports.report_start(claim, run)
    except Refused:
        world.note("gave-way", name, run)
        raise SystemExit(64) from None
    world.note("began", name, run)
    hours = dice.uniform(0.2, 1.0)
    world.note("spent", f"{hours:.3f}")
    with _alone(world.folder / name) as alone, _one_of(world.limits.runs, world.folder) as room:
        if not alone or not room:
            world.note("overlap" if not alone else "crowded", name, run)
        _maybe_die(dice, world)
        if "preempted" in name and len(world.noted("preempted")) < world.preemptions:
            world.note("preempted", run)
            os.kill(os.getpid(), signal.SIGKILL)
        if "poison" in name:
            run_reports.report_end(claim, run, root, "FAILED", "diverged at step 3")
            raise SystemExit(76)
        try:
            open_store(join_uri(root, "package")).compare_and_swap(
                MANIFEST, _manifest("package").encode(), None
            )
            world.note("distilled", name, run)
        except FileExistsError:  # by an attempt that was killed before it could say so
            world.note("found-finished", name, run)
        open_store(join_uri(root, "gate")).write(MANIFEST, _manifest("gate", decision="accepted").encode())
        _maybe_die(dice, world)
    run_reports.report_end(claim, run, root, "SUCCEEDED", "", hours)


def _manifest(kind: str, **facts: Any) -> str:
    return Manifest(
        kind=kind, config=None, inputs={}, files=[], facts=facts, versions={}, seconds=0
    ).model_dump_json()


def _maybe_die(dice: random.Random, world: World) -> None:
    time.sleep(dice.uniform(0.05, 0.3))
    if dice.random() < 0.12:
        world.note("died", "run")
        os.kill(os.getpid(), signal.SIGKILL)


@contextmanager
def _alone(path: Path) -> Iterator[bool]:
    """Whether nobody else has it; the kernel lets go if the process dies."""
    with path.with_suffix(".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


@contextmanager
def _one_of(count: int, folder: Path) -> Iterator[bool]:
    """Whether one of so many places was free."""
    for number in range(count):
        with _alone(folder / f"place-{number}") as free:
            if free:
                yield True
                return
    yield False
