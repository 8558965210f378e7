"""GPUs by their data sheets, and the assumptions of the predictions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

GB, TERA = 1e9, 1e12


class Efficiency(NamedTuple):
    """Fraction of the peak FLOP/s that passes reach."""

    eager: float
    compiled: float
    source: str

    def reached(self, compiled: bool) -> float:
        return self.compiled if compiled else self.eager


A100_SDXL = Efficiency(0.39, 0.51, "from PyTorch's published figures of SDXL on an A100")
H100_RECKONED = Efficiency(0.25, 0.32, "reckoned from the operators of SDXL, not measured")
AS_A100 = Efficiency(0.39, 0.51, "taken to be an A100's, not measured")


@dataclass(frozen=True)
class Gpu:
    """Rates of a data sheet: dense, without sparsity."""

    bf16: float
    """TFLOP/s."""
    tf32: float
    fp32: float
    gb: float
    """Memory, in 1e9 bytes."""
    memory_gb_s: float
    """Memory bandwidth, 1e9 bytes/s."""
    inside_gb_s: float
    """Bandwidth to the other GPUs of a node in one direction, 1e9 bytes/s."""
    host_gb_s: float
    """Bandwidth from the host's memory in one direction, 1e9 bytes/s: PCIe 4 or 5 with 16 lanes."""
    between_gb_s: float
    """A GPU's share of the usual network between nodes in one direction, 1e9 bytes/s."""
    source: str
    efficiency: Efficiency


A100 = "NVIDIA A100 data sheet (SXM4); network as in a DGX A100: 200 Gb/s per GPU"
H100 = "NVIDIA {} data sheet (SXM5); network as in {} Gb/s per GPU"
DGX = "a DGX H100: 400"
GPUS = {
    "a100-40gb": Gpu(312, 156, 19.5, 40, 1555, 300, 32, 25, A100, A100_SDXL),
    "a100-80gb": Gpu(312, 156, 19.5, 80, 2039, 300, 32, 25, A100, A100_SDXL),
    "h100-80gb": Gpu(989, 494, 67, 80, 3350, 450, 64, 50, H100.format("H100", DGX), H100_RECKONED),
    "h100-mega-80gb": Gpu(
        989, 494, 67, 80, 3350, 450, 64, 25, H100.format("H100", "GKE's A3 Mega: 200"), H100_RECKONED
    ),
    "h200-141gb": Gpu(989, 494, 67, 141, 4800, 450, 64, 50, H100.format("H200", DGX), H100_RECKONED),
    "l4-24gb": Gpu(
        121, 60, 30.3, 24, 300, 32, 32, 1.6, "NVIDIA L4 data sheet; PCIe 4 x16; 100 Gb/s for 8 GPUs", AS_A100
    ),
    "l40s-48gb": Gpu(
        362, 183, 91.6, 48, 864, 32, 32, 12.5, "NVIDIA L40S data sheet; PCIe 4 x16; 100 Gb/s per GPU", AS_A100
    ),
    "a10-24gb": Gpu(
        125,
        62.5,
        31.2,
        24,
        600,
        32,
        32,
        3.1,
        "NVIDIA A10 data sheet; PCIe 4 x16; 100 Gb/s for 4 GPUs",
        AS_A100,
    ),
}
BY_DEVICE_NAME = {
    "NVIDIA A100-SXM4-40GB": "a100-40gb",
    "NVIDIA A100-PCIE-40GB": "a100-40gb",
    "NVIDIA A100-SXM4-80GB": "a100-80gb",
    "NVIDIA A100 80GB PCIe": "a100-80gb",
    "NVIDIA H100 80GB HBM3": "h100-80gb",
    "NVIDIA H200": "h200-141gb",
    "NVIDIA L4": "l4-24gb",
    "NVIDIA L40S": "l40s-48gb",
    "NVIDIA A10": "a10-24gb",
}
"""{name that torch reports of a device: key of GPUS with its peak rates}. Others, such as an H100 PCIe, have other peaks."""
LINK_EFFICIENCY = 0.7
"""Fraction of a link's bandwidth that large collectives reach: an assumption."""
CALL_S = 50e-6
"""Latency of a collective, in seconds."""


class Assumption(NamedTuple):
    """What makes a prediction of seconds a low, a likely or a high one."""

    efficiency: float
    """Multiple of the card's efficiency."""
    kernel_s: float
    """Seconds of the host per kernel launch. A small pass takes as long as its launches."""


LOW, LIKELY, HIGH = Assumption(1.2, 12e-6), Assumption(1.0, 13.5e-6), Assumption(0.8, 15e-6)
USABLE = 0.92
"""Fraction of a device's memory for tensors; the rest is for the driver, the libraries and fragmentation."""
DISK_GB_S = 1.0
"""1e9 bytes/s at which a node writes a checkpoint: an assumption."""
UPDATE_BYTES = 36
"""Bytes read and written per update of a weight: 28 by AdamW, 8 by gradient clipping; 12 more per EMA."""
UPDATE_BYTES_8BIT = 345
"""The same with 8-bit moments, which are decoded and encoded by one elementwise kernel after another."""
MERGE_BYTES = 44
"""Bytes read and written per weight that a low-rank update is merged into: base in float32, sum, rounding noise, rounded, copied."""
