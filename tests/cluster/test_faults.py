"""What a launcher lives through and waits for, by real means: restarts, a server that is away, full quotas, preemption, a lost node."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from components.distill.trainjob import IDLE_RESTARTS
from dmd2.io.storage import open_store
from tests.cluster.bed import PROGRAMS, missing
from tests.cluster.conftest import (
    LONG,
    NAMESPACE,
    ROOT,
    SECURE,
    Cluster,
    Run,
    asked_by,
    granted,
    kubelet,
    right,
    student,
    wait_for,
    wait_until_gone,
)
from tests.cluster.kubelet import CPU

NewRun = Callable[..., Run]
STOPPABLE = "trap 'exit 75' TERM; echo stoppable; sleep 600 & wait"
"""A training that saves nothing, and ends when it is told to: process 1 of a pod ignores a signal that it has not asked for yet."""
COUNTING = "for i in $(seq 30); do echo line $i; sleep 1; done"


def test_restarts_that_kubernetes_does_not_count_end_after_five_without_a_newer_checkpoint(
    cluster: Cluster, new_run: NewRun
) -> None:
    run = new_run(script=STOPPABLE)
    pod = run.start()
    evictions = 2 + 1 + IDLE_RESTARTS
    for attempt in range(evictions):
        node = run.running_pods(attempt)[1]["metadata"]["name"]
        if attempt == 2:
            open_store(run.root).write("run/checkpoints/00000010/weights", b"progress")
        run.wait_for_line(node, "stoppable")
        cluster.evict(node)
    job = run.job
    assert run.wait(pod) == 75, cluster.log(pod)
    assert "restarted 5 times without a newer checkpoint" in cluster.log(pod)
    (jobset,) = run.record()["jobset"]
    assert (jobset["restarts"], jobset.get("restartsCountTowardsMax", 0)) == (evictions, 0)
    wait_until_gone(cluster, job)


def test_nothing_is_lost_when_the_api_server_restarts(cluster: Cluster, new_run: NewRun) -> None:
    bed = cluster.bed
    run = new_run(script=COUNTING)
    pod = run.start()
    job, uid = run.job, cluster.get("trainjob", run.job)["metadata"]["uid"]
    run.wait_for_line(pod, "line 5")
    path = f"/api/v1/namespaces/{NAMESPACE}/pods"
    version = json.loads(cluster.kubectl("get", "--raw", path))["metadata"]["resourceVersion"]
    bed.stop("kube-apiserver")
    time.sleep(5)
    bed.start_api_server()
    watched = cluster.kubectl("get", "--raw", f"{path}?watch=1&resourceVersion={version}&timeoutSeconds=5")
    assert '"code":410' in watched, "the server has forgotten what was watched"
    assert run.wait(pod) == 0, cluster.log(pod)
    lines = [line for line in cluster.log(pod).splitlines() if line.startswith("line ")]
    assert lines == [f"line {number}" for number in range(1, 31)]
    assert run.record()["trainjob"]["metadata"]["uid"] == uid
    wait_until_gone(cluster, job)


@pytest.fixture
def full(cluster: Cluster) -> Iterator[Callable[[str], None]]:
    """Sets how many TrainJobs the namespace's quota allows."""
    counted = "count/trainjobs.trainer.kubeflow.org"
    before = cluster.get("resourcequota", "dmd2")["spec"]["hard"][counted]

    def allow(number: str) -> None:
        cluster.patch("resourcequota", "dmd2", {"spec": {"hard": {counted: number}}})
        wait_for(lambda: cluster.get("resourcequota", "dmd2")["status"]["hard"][counted] == number, 60)

    yield allow
    allow(before)


def test_a_full_quota_is_waited_for_and_said(
    cluster: Cluster, new_run: NewRun, full: Callable[[str], None]
) -> None:
    full("0")
    run = new_run(script="true")
    pod = run.start()
    run.wait_for_line(pod, "waits: ")
    assert "exceeded quota: dmd2" in cluster.log(pod)
    full("20")
    assert run.wait(pod) == 0, cluster.log(pod)


def test_a_full_queue_is_waited_for_and_said(cluster: Cluster, new_run: NewRun) -> None:
    first, second = (new_run(script=script, nodes=4, queue="dmd2") for script in ("sleep 15", "true"))
    pod = first.start()
    first.running_pods()
    waiting = second.start()
    second.wait_for_line(waiting, "waits: Kueue: ")
    assert "insufficient unused quota for cpu" in cluster.log(waiting)
    assert second.wait(waiting) == 0, cluster.log(waiting)
    assert first.wait(pod) == 0, cluster.log(pod)


def test_pods_that_no_node_takes_are_said(cluster: Cluster, new_run: NewRun) -> None:
    run = new_run(script="true", pool={"dmd2/pool": "none"})
    pod = run.start()
    run.wait_for_line(pod, "waits: pod not scheduled: ")
    assert "node affinity/selector" in cluster.log(pod)
    cluster.kubectl("delete", "workflow", run.name)


def test_a_run_of_higher_priority_goes_first_and_costs_the_other_one_no_step(
    cluster: Cluster, new_training: NewRun, new_run: NewRun, weights: dict[str, str]
) -> None:
    training = new_training(LONG, queue="dmd2", priority="dmd2-retrain")
    pod = training.start()
    training.training_pods()
    urgent = new_run(script="sleep 2", nodes=5, queue="dmd2", priority="dmd2-run")
    first = urgent.start()
    assert urgent.wait(first) == 0, cluster.log(first)
    assert training.wait(pod) == 0, cluster.log(pod)
    assert "waits: Kueue: " in cluster.log(pod)
    assert student(f"{training.root}/run") == weights
    (jobset,) = training.record()["jobset"]
    assert (jobset.get("restarts", 0), jobset.get("restartsCountTowardsMax", 0)) == (0, 0)


def test_a_lost_node_costs_one_counted_restart_and_no_more_than_the_steps_since_the_checkpoint(
    cluster: Cluster, new_training: NewRun, weights: dict[str, str]
) -> None:
    """The other node ends with 79 long before Kubernetes says, after 40 s, that the lost one was a disruption."""
    bed = cluster.bed
    training = new_training(LONG)
    pod = training.start()
    here = wait_for(lambda: cluster.get("pod", pod)["spec"].get("nodeName"), 60)
    (lost, *_) = {node["spec"]["nodeName"] for node in training.training_pods()} - {here}
    bed.kubectl("delete", "node", lost)
    assert training.wait(pod) == 0, cluster.log(pod)
    assert student(f"{training.root}/run") == weights
    (jobset,) = training.record()["jobset"]
    assert (jobset["restarts"], jobset.get("restartsCountTowardsMax", 0)) == (1, 1)


def test_the_role_of_the_launcher_allows_what_it_asks_and_nothing_else(
    cluster: Cluster, new_run: NewRun
) -> None:
    """By the API server's own record of a run whose launcher is started twice."""
    log = cluster.bed.folder / "audit.log"
    begun = log.stat().st_size
    run = new_run(script="sleep 20", queue="dmd2")
    first = run.start()
    run.running_pods()
    cluster.kubectl("delete", "pod", first, "--force", "--grace-period=0")
    second = run.start()
    assert run.wait(second) == 0, cluster.log(second)
    used = asked_by(log, "launcher", begun)
    pods = {right(verb, {"resource": "pods"}) for verb in ("get", "list", "watch")}
    """Of the Role `run`, which the executors of Argo need too."""
    assert used - pods == granted(cluster.get("role", "launch"))


def test_the_servers_end_with_the_process_that_started_them(tmp_path: Path) -> None:
    if "etcd" in missing():
        pytest.skip("etcd is not built")
    script = f"""
import sys, time
from pathlib import Path
from tests.cluster.bed import Bed, _free_ports
bed = Bed(Path({str(tmp_path)!r}), is_tied=True)
bed.ports = dict(zip(("etcd", "peer"), _free_ports(2)))
bed._start_etcd()
print((bed.folder / "pids" / "etcd").read_text(), flush=True)
time.sleep(600)
"""
    words: list[Any] = [sys.executable, "-c", script]
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        pid = int(process.stdout.readline())

        def program() -> str:
            try:
                return Path(f"/proc/{pid}/cmdline").read_text().partition("\0")[0]
            except OSError:
                return ""

        wait_for(lambda: program() == str(PROGRAMS / "etcd"), 30)
        process.kill()
    wait_for(lambda: program() != str(PROGRAMS / "etcd"), 30)


def test_the_pods_end_with_the_process_that_plays_their_node(cluster: Cluster, tmp_path: Path) -> None:
    bed, name = cluster.bed, "node-that-dies"
    node = {"name": name, "capacity": CPU, "taints": [{"key": "dies", "effect": "NoSchedule"}]}
    main = {"name": "main", "image": cluster.image, "command": ["sleep", "54321"], "securityContext": SECURE}
    spec = {"nodeName": name, "restartPolicy": "Never", "containers": [main]}
    with kubelet(bed, tmp_path / "node", {cluster.image: {"user": 65532}}, [node]) as process:
        cluster.create({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "sleeper"}, "spec": spec})
        wait_for(lambda: running("sleep 54321"), 60)
        process.kill()
        wait_for(lambda: not running("sleep 54321"), 30)
    cluster.kubectl("delete", "pod", "sleeper", "--force", "--grace-period=0")
    bed.kubectl("delete", "node", name)


def running(command: str) -> bool:
    """Whether a process of this machine has this command line."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            if path.read_text().split("\0")[:-1] == command.split():
                return True
    return False
