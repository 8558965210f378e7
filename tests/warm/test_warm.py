"""A warm process is to its starter what a real one is, but for the time that it takes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests import warm
from tests.bucket import wait_until

BOTH = pytest.mark.parametrize("cold", [True, False], ids=["cold", "warm"])


def python(cold: bool) -> str:
    return sys.executable if cold else warm.python()


@BOTH
@pytest.mark.parametrize(
    ("code", "status", "said"),
    [
        ("import sys; sys.exit(7)", 7, ""),
        ("import sys; sys.exit('a reason')", 1, "a reason\n"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", -9, ""),
        ("import atexit; atexit.register(print, 'at exit')", 0, "at exit\n"),
        ("import sys; print(sys.argv, __name__, sys.stdin.read())", 0, "['-c', 'word'] __main__ read\n"),
        ("import os; print(os.getcwd(), os.environ['ONLY_HERE'])", 0, "/ value\n"),
        ("import threading, time; threading.Timer(0.1, print, ('late',)).start()", 0, "late\n"),
    ],
)
def test_it_ends_and_says_what_a_real_one_does(cold: bool, code: str, status: int, said: str) -> None:
    words = [python(cold), "-c", code, "word"]
    environment = os.environ | {"ONLY_HERE": "value"}
    done = subprocess.run(
        words, input="read", stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd="/", env=environment
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (status, said)


@BOTH
def test_an_error_that_nobody_handles_is_traced_and_ends_with_1(cold: bool) -> None:
    done = subprocess.run([python(cold), "-c", "1 / 0"], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback (most recent call last):\n")
    assert done.stderr.endswith("ZeroDivisionError: division by zero\n")


SLEEP = "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(3)); print(1, flush=True); time.sleep(600)"


@BOTH
@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 3), (signal.SIGINT, -2), (signal.SIGHUP, -1)]
)
def test_signals_reach_it(cold: bool, number: signal.Signals, status: int) -> None:
    quiet = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen([python(cold), "-c", SLEEP], **quiet, preexec_fn=_sigint_as_in_a_terminal)  # type: ignore[call-overload]
    assert process.stdout.readline()
    process.send_signal(number)
    assert process.wait() == status


def _sigint_as_in_a_terminal() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_killed_it_is_gone_and_its_output_closed(tmp_path: Path) -> None:
    code = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
    process = subprocess.Popen([warm.python(), "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout
    pid = int(process.stdout.readline())
    process.kill()
    assert not process.communicate()[0]
    assert process.returncode == -signal.SIGKILL
    wait_until(lambda: not Path(f"/proc/{pid}").exists())


def test_it_starts_with_torch_and_draws_its_own_numbers() -> None:
    code = "import sys; assert 'torch' in sys.modules; import numpy; print(numpy.random.rand())"
    python, before = warm.python(), warm.processor_s()
    drawn = {subprocess.run([python, "-c", code], capture_output=True).stdout for _ in range(2)}
    assert len(drawn) == 2
    assert warm.processor_s() - before < 4, "importing torch takes longer"
