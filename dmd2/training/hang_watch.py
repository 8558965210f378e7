"""Ends a process that makes no step for too long, and lets one compile for longer, or wait for another one that compiles.

A rank that compiles says so in the store of the rendezvous, where ranks that wait for it in a collective can read it. The end
itself is left to faulthandler, which needs no Python.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch.distributed as dist

from dmd2.parallel.ranks import World

logger = logging.getLogger(__name__)


class HangWatch:
    """Between two calls of `reset` may pass `hang_timeout_s` seconds, or `compile_timeout_s` if a rank compiles meanwhile.

    After that the process writes the stacks of its threads to stderr and ends.
    """

    def __init__(self, hang_timeout_s: float, compile_timeout_s: float, world: World) -> None:
        self.hang_timeout_s = hang_timeout_s
        self.compile_timeout_s = max(compile_timeout_s, hang_timeout_s)
        self.world = world
        self._lock = threading.Lock()
        self._start: float | None = None
        self._extended = False
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="hang watch", daemon=True)

    def reset(self) -> None:
        """Count from now on."""
        with self._lock:
            self._start, self._extended = time.monotonic(), False
            self._end_after(self.hang_timeout_s)

    def pause(self) -> None:
        """Do not count until the next `reset`."""
        with self._lock:
            self._start = None
            faulthandler.cancel_dump_traceback_later()

    def set_compiling(self, on: bool) -> None:
        """Tell the other ranks whether this one compiles."""
        self.world.publish("compiling", socket.gethostname() if on else "")

    def start(self) -> None:
        self.set_compiling(False)
        self.reset()
        self._thread.start()

    def stop(self) -> None:
        self._ended.set()
        self._thread.join()
        self.pause()

    def _end_after(self, seconds: float) -> None:
        faulthandler.dump_traceback_later(seconds, exit=True, file=2)

    def _watch(self) -> None:
        while not self._ended.wait(min(5.0, self.hang_timeout_s / 8)):
            with self._lock:
                waited = 0.0 if self._start is None else time.monotonic() - self._start
                if waited > self.hang_timeout_s / 2 and not self._extended:
                    self._extend(waited)
                if waited > self.compile_timeout_s:
                    self._end(waited)

    def _extend(self, waited: float) -> None:
        """If a rank compiles, wait longer; `_end` comes first, and faulthandler where Python cannot run."""
        if slow := self._compiling():
            self._extended = True
            self._end_after(self.compile_timeout_s - waited + self.hang_timeout_s / 2)
            if self.world.is_main:
                logger.info(
                    f"no step for {waited:.0f} s: {slow} compiling, which may take {self.compile_timeout_s:.0f} s"
                    " (engine.compile_timeout_s)"
                )

    def _end(self, waited: float) -> None:
        slow = self._compiling() or "no process is still"
        logger.error(
            f"no step for {waited:.0f} s, and {slow} compiling, but engine.compile_timeout_s is {self.compile_timeout_s:.0f}; set it"
            " higher, engine.compile_cache to keep what was compiled, or engine.compile=off"
        )
        faulthandler.dump_traceback(file=2)
        os._exit(1)

    def _compiling(self) -> str:
        """The ranks that compile, with their machines, as the subject of a sentence; empty if there are none."""
        try:
            found = self.world.published("compiling")
        except dist.DistError:  # the rank that keeps the store is lost, and torchrun ends this one
            return ""
        names = [f"process {rank} on {host}" for rank, host in found.items() if host]
        return f"{', '.join(names)} {'are' if len(names) > 1 else 'is'}" if names else ""


@contextmanager
def hang_watch(
    hang_timeout_s: float,
    compile_timeout_s: float,
    world: World,
    on_compiled: Callable[[float], None] = lambda seconds: None,
) -> Iterator[HangWatch]:
    """A watch that counts inside the block. `on_compiled` is called with the seconds that each graph took to compile."""
    from torch._dynamo.callback import callback_handler

    watch, start = HangWatch(hang_timeout_s, compile_timeout_s, world), 0.0

    def on_start(args: object) -> None:
        nonlocal start
        start = time.monotonic()
        watch.set_compiling(True)

    def on_end(args: object) -> None:
        watch.set_compiling(False)
        on_compiled(time.monotonic() - start)

    callback_handler.register_start_callback(on_start)
    callback_handler.register_end_callback(on_end)
    watch.start()
    try:
        yield watch
    finally:
        watch.stop()
        callback_handler.remove_start_callback(on_start)
        callback_handler.remove_end_callback(on_end)
