"""Stands for a process that the server runs: `client.py SOCKET WORDS`. It imports little, to start at once."""

import json
import os
import resource
import signal
import socket
import sys
from contextlib import suppress
from types import FrameType

PASSED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)


def main(path: str, words: list[str]) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(path)
        ignored = [number for number in PASSED if signal.getsignal(number) == signal.SIG_IGN]
        asked = {
            "words": words,
            "environment": dict(os.environ),
            "directory": os.getcwd(),
            "ignored": ignored,
            "leads": os.getsid(0) == os.getpid(),
        }
        data = json.dumps(asked).encode()
        socket.send_fds(server, [len(data).to_bytes(8, "big")], [0, 1, 2])
        server.sendall(data)
        answers = server.makefile()
        pid = int(answers.readline())

        def pass_on(number: int, frame: FrameType | None) -> None:
            with suppress(ProcessLookupError):
                os.kill(pid, number)

        for number in set(PASSED).difference(ignored):
            signal.signal(number, pass_on)
        status = int(answers.readline() or -signal.SIGKILL)
    end(status)


def end(status: int) -> None:
    """End as the other process did: by a number, or by a signal."""
    if status < 0:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        with suppress(OSError):  # of those that can't be handled
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
