"""A node of a training on several machines: its signals, its exit status, and the order in which pods end."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from components.distill import node
from components.distill.launch import _child_processes
from components.failure import severity
from tests import conftest, warm


@pytest.mark.parametrize(
    ("statuses", "cause"),
    [((79, 64), 64), ((75, 76), 76), ((137, 64), 64), ((79, 137), 137), ((75, 79), 79), ((143, 75), 75)],
)
def test_the_cause_comes_before_its_consequences(statuses: tuple[int, ...], cause: int) -> None:
    assert min(statuses, key=severity) == cause


ENDS = """
import sys
from components.distill import node
node.run_to_end = lambda training: {status}
node.LINGER_S = {linger}
print("begun", flush=True)
sys.exit(node.run_node(0, []))
"""


def ends(status: int, linger: float) -> subprocess.Popen[str]:
    """A node whose training ended with a status."""
    command = [warm.python(), "-c", ENDS.format(status=status, linger=linger)]
    return subprocess.Popen(command, env=warm.environment(), stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("status", [0, 1, 64, 76, 137])
def test_a_node_that_knows_the_cause_ends_at_once(status: int) -> None:
    process = ends(status, 600)
    assert process.wait(60) == status


@pytest.mark.parametrize("status", [75, 79])
def test_a_node_that_ends_because_of_another_waits_until_it_is_told(status: int) -> None:
    assert ends(status, 0.01).wait(60) == status
    process = ends(status, 600)
    assert process.stdout
    assert process.stdout.readline() == "begun\n"
    time.sleep(0.2)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == status


@pytest.mark.slow
def test_two_nodes_train_and_the_loss_of_one_has_a_status_of_its_own(made: Path, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    words = ["distill", "edm-digits", "--data", str(made / "shards"), "--teacher", str(made / "teacher")]
    words += ["--out", str(tmp_path / "run")]
    for change in (*conftest.MICRO, "distill.steps=100000"):
        words += [f"--{change.partition('=')[0]}", change.partition("=")[2]]
    sizes = {
        "PET_NNODES": "2",
        "PET_NPROC_PER_NODE": "1",
        "PET_MASTER_ADDR": "127.0.0.1",
        "PET_MASTER_PORT": port,
    }
    nodes = [
        subprocess.Popen(
            [sys.executable, "-m", "components.distill.node", "0", *words],
            env=warm.environment() | sizes | {"PET_NODE_RANK": str(rank)}, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    metrics = tmp_path / ".run.partial" / "metrics.jsonl"
    while not (metrics.exists() and metrics.stat().st_size):
        assert all(one.poll() is None for one in nodes)
        time.sleep(0.1)
    (torchrun,) = _child_processes(nodes[1].pid)
    (worker,) = _child_processes(torchrun)
    os.kill(worker, signal.SIGKILL)
    assert nodes[1].wait(120) == 128 + signal.SIGKILL
    assert nodes[0].wait(120) == 79
    assert nodes[0].stderr
    assert "because of another node" in nodes[0].stderr.read()


SLOWLY = """
import runpy, sys, time

class Disk:
    def find_spec(self, name, path=None, target=None):
        if name == "components.distill.launch":
            print("importing", flush=True)
            time.sleep(0.5)

sys.meta_path.insert(0, Disk())
runpy.run_module("components.distill.node", run_name="__main__", alter_sys=True)
"""
"""A node whose first import waits for a disk."""


@pytest.mark.parametrize("process_1", [False, True])
def test_a_signal_that_arrives_while_the_node_imports_stops_the_training(
    process_1: bool, tmp_path: Path
) -> None:
    """As process 1 of a pod it would never see the signal: the kernel drops one that has no handler yet."""
    if process_1 and os.geteuid():
        pytest.skip("a PID namespace takes root")
    pod = ["unshare", "--pid", "--fork", "--mount-proc"] if process_1 else []
    words = ["distill", "edm-digits", "--data", "none", "--teacher", "none", "--out", str(tmp_path / "run")]
    started = subprocess.Popen(
        [*pod, sys.executable, "-c", SLOWLY, "0", *words],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert started.stdout
    assert started.stdout.readline() == "importing\n"
    (node_pid,) = _child_processes(started.pid) if process_1 else [started.pid]
    os.kill(node_pid, signal.SIGTERM)
    _, said = started.communicate(timeout=60)
    assert started.returncode == 128 + signal.SIGTERM, said
    assert "SIGTERM: passed on to the training" in said


def test_the_wait_is_shorter_than_the_grace_period_of_spot() -> None:
    assert node.LINGER_S < 15
