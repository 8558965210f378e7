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
        graphs = _read_graphs(data)
        if self.world.is_main:
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


def _read_graphs(data: bytes) -> int:
    """Give torch what `save` wrote, and return the number of graphs; 0 from a damaged file.

    The bytes have a part for each call of torch.compiler.save_cache_artifacts. torch.compiler.load_cache_artifacts reads the last
    one only, because CacheArtifactManager.deserialize makes a dictionary of the parts (torch 2.14).
    """
    from torch.compiler._cache import CacheArtifactManager, _deserialize_single_cache
    from torch.utils._appending_byte_serializer import AppendingByteSerializer

    CacheArtifactManager._ensure_cache_artifacts_registered()
    try:
        parts = AppendingByteSerializer.to_list(data, deserialize_fn=_deserialize_single_cache)
    except Exception as error:
        if data:
            logger.warning("compiled graphs of earlier processes cannot be read: %s", error)
        return 0
    found = [CacheArtifactManager.populate_caches({kind: graphs}) for kind, graphs in parts]
    return sum(len(one.inductor_artifacts) for one in found)
