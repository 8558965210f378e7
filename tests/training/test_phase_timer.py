"""Seconds by phase of a step."""

from __future__ import annotations

import time

import pytest
import torch

from dmd2.training.phase_timer import PhaseTimer


def test_phases_end_where_the_next_one_starts_and_add_up_over_steps() -> None:
    timer = PhaseTimer()
    for _ in range(2):
        timer.start("student")
        time.sleep(0.02)
        timer.start("critic")
        time.sleep(0.01)
        timer.stop()
        time.sleep(0.05)
    seconds = timer.read()
    assert seconds.keys() == {"student", "critic"}
    assert seconds["student"] >= 0.04
    assert seconds["critic"] >= 0.02
    assert timer.read() == {}


def test_time_between_steps_is_of_no_phase() -> None:
    timer = PhaseTimer()
    timer.start("student")
    timer.stop()
    time.sleep(0.2)
    timer.start("student")
    timer.stop()
    assert timer.read()["student"] < 0.1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_the_time_is_that_of_the_device_and_no_call_waits_for_it() -> None:
    timer, size = PhaseTimer(torch.device("cuda")), 8192
    x = torch.randn(size, size, device="cuda")
    torch.cuda.synchronize()
    start = time.perf_counter()
    timer.start("student")
    for _ in range(20):
        x @ x
    timer.stop()
    host_s = time.perf_counter() - start
    assert timer.read()["student"] > 2 * host_s
