"""`python()`: an interpreter that has imported torch already.

It is a program that is called like `python`: `python -m dmd2 distill ...`, `python -c CODE`. It asks a server (`server.py`,
one for all workers of pytest) to fork a process that runs this, hands its output over, passes signals on and ends as that
process ends (`client.py`). A start costs a tenth of a second instead of seven. The process has the environment, the
directory, the output and the exit status of a real one, but not its parent and not its group, and its modules are there
before it asks for them: what is about these takes `sys.executable`.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import tempfile
import uuid
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDER, OWNER = "DMD2_TESTS_WARM", "DMD2_TESTS_OWNER"
"""Variables of the environment, by which workers find the server of their session."""


def announce() -> None:
    """Call this in the process that outlives all others of the session, before it starts them."""
    if FOLDER not in os.environ:
        os.environ[FOLDER] = f"{tempfile.gettempdir()}/warm-{uuid.uuid4().hex}"
        os.environ[OWNER] = str(os.getpid())


@cache
def python() -> str:
    """The path of the program. The first call of a session starts the server, which ends with the session."""
    folder = Path(os.environ[FOLDER])
    program, socket = folder / "python", folder / "socket"
    folder.mkdir(mode=0o700, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not program.exists():
            _start(socket, folder / "pid")
            client = Path(__file__).with_name("client.py")
            program.write_text(f'#!/bin/sh\nexec {sys.executable} -IS {client} {socket} "$@"\n')
            program.chmod(0o755)
    return str(program)


def _start(socket: Path, pid: Path) -> None:
    words = [sys.executable, "-m", "tests.warm.server", str(socket), os.environ[OWNER]]
    one_thread = {
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "JE_ARROW_MALLOC_CONF": "background_thread:false",
    }
    server = subprocess.Popen(words, cwd=ROOT, env=os.environ | one_thread, stdout=subprocess.PIPE)
    pid.write_text(str(server.pid))
    assert server.stdout
    assert server.stdout.readline(), "the server of warm processes has not started"


def processor_s() -> float:
    """Seconds of processor time that the server and the processes that have ended took; 0 if there is none."""
    pid = Path(os.environ[FOLDER]) / "pid"
    if not pid.exists():
        return 0.0
    times = Path(f"/proc/{pid.read_text()}/stat").read_text().rpartition(")")[2].split()[11:15]
    return sum(map(int, times)) / os.sysconf("SC_CLK_TCK")


def environment(**more: str) -> dict[str, str]:
    """For commands of the tests: one thread, as the tests themselves have it, and warm workers under torchrun."""
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHON_EXEC": python()} | more


def dmd2(*words: str) -> list[str]:
    return [python(), "-m", "dmd2", *words]


def torchrun(processes: int, *words: str) -> list[str]:
    """torchrun itself is warm as well, so its workers are not the children of the process that is started."""
    return [python(), "-m", "torch.distributed.run", f"--nproc-per-node={processes}", *words]
