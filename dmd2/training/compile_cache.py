"""Compiled graphs that outlive the process: one file per rank of a machine, in a folder or on a bucket.

The file holds torch.compile's own cache (torch.compiler.save_cache_artifacts), whose entries are found by the content of the
graph, the versions and the device: one that does not fit is never used. It contains pickled code, so only trainings may be able
to write to the folder.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass, field

import torch

from dmd2.io.storage import open_store
from dmd2.parallel.ranks import World

logger = logging.getLogger(__name__)


@dataclass
class CompileCache:
    """The file of this rank. Ranks of the same number on other machines compile the same graphs, and read it too."""

    folder: str
    """Local or on a bucket; empty = none."""
    world: World
    _saved: int = field(default=0, init=False)
    """Graphs that this process had compiled when it wrote the file."""

    @property
    def name(self) -> str:
        """Of the file: a rank compiles for its own device."""
        device = self.world.device
        card = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        kind = re.sub(r"[^A-Za-z0-9.]+", "-", f"torch-{torch.__version__}-{card}")
        return f"{kind}-rank-{self.world.local_rank}.graphs"

    def load(self) -> None:
        """Give torch the graphs of earlier processes, if there are any, and wait for the other ranks.

        Raises:
            OSError: The folder cannot be read.
        """
        if not self.folder:
            return
        try:
            data = open_store(self.folder).read(self.name)
        except FileNotFoundError:
            data = b""
        found = torch.compiler.load_cache_artifacts(data) if data else None
        if self.world.is_main:
            graphs = len(found.inductor_artifacts) if found else 0
            logger.info("compiled graphs of earlier processes: %d, from %s", graphs, self.folder)
        self.world.barrier()  # of the hosts: the collectives of the first step need not wait for a slow download

    def save(self) -> None:
        """Write the file, if this process has compiled graphs since it wrote it last. Training goes on where it cannot be written."""
        if not self.folder or self.world.rank != self.world.local_rank:  # of another machine than the first
            return
        # Slow to import, and there already where something was compiled.
        from torch._dynamo.utils import counters

        compiled: int = counters["inductor"]["fxgraph_cache_miss"]
        if compiled <= self._saved:
            return
        if found := torch.compiler.save_cache_artifacts():
            try:
                open_store(self.folder).write(self.name, found[0])
            except OSError as error:
                logger.warning("compiled graphs were not kept: %s", error)
        self._saved = compiled
