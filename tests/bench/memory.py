"""Peak memory of a step of student and critic with a U-Net of the size of Stable Diffusion 1.5, on the CPU: `make bench-memory`.

859.52 M random weights in bfloat16 shared by student, critic and teacher, a LoRA of rank 64 each for student and critic, the
discriminator head, one 512-pixel image, and the other settings of the recipe. Prints seconds and peak memory, writes
runs/bench/memory.json, and fails above 20 GB.
"""

from __future__ import annotations

import json
import resource
import shutil
import tempfile
import time
from pathlib import Path

import torch
import tyro

from dmd2 import recipes
from dmd2.batch import Batch, Conditioning
from dmd2.config import Config, DistillConfig, LoraConfig
from dmd2.io.local import write_text
from dmd2.models.family import make_family
from dmd2.models.stable import UNET, Stable, published_pipeline
from dmd2.parallel import ranks
from dmd2.training import build

LIMIT_GB = 20.0


def main(small: bool = False) -> None:
    """Measure one step.

    Args:
        small: Use a U-Net with an eighth of the width.
    """
    config = shared()
    with tempfile.TemporaryDirectory() as folder:
        family = make_family(
            config.family, narrow(Path(folder) / "p") if small else published_pipeline("sd15")
        )
    assert isinstance(family, Stable)
    empty = peak_gb()
    torch.set_default_dtype(torch.bfloat16)
    teacher = family.network()
    torch.set_default_dtype(torch.float32)
    trainer = build.trainer(config, family, teacher.state_dict(), ranks.World(torch.device("cpu")))
    start = time.monotonic()
    text = torch.randn(1, 77, 768)
    sample = Batch(torch.randn(1, *family.shape), Conditioning(text=text), Conditioning(text=text * 0))
    metrics = trainer.step(sample, 0)
    assert all(value.isfinite() for value in metrics.values()), metrics
    figures = {
        "weights_m": round(sum(p.numel() for p in teacher.parameters()) / 1e6, 2),
        "learning_m": round(
            sum(p.numel() for p in trainer.student.module.parameters() if p.requires_grad) / 1e6, 2
        ),
        "seconds": round(time.monotonic() - start, 1),
        "peak_gb": round(peak_gb(), 2),
        "before_gb": round(empty, 2),
    }
    if not small:
        write_text(Path("runs/bench/memory.json"), json.dumps(figures, indent=1) + "\n")
    print(figures)
    if figures["peak_gb"] > LIMIT_GB:
        raise SystemExit(f"the step took {figures['peak_gb']} GB, more than {LIMIT_GB}")


def narrow(folder: Path) -> Path:
    shutil.copytree(published_pipeline("sd15"), folder)
    config = json.loads((folder / UNET).read_text())
    config["block_out_channels"] = [width // 8 for width in config["block_out_channels"]]
    (folder / UNET).write_text(json.dumps(config | {"norm_num_groups": 8}))
    return folder


def shared() -> Config:
    base = recipes.get("sd15-1step-gan")
    changes = {"lora": LoraConfig(shared_base=True), "batch": 1}
    distill = DistillConfig.model_validate({**dict(base.distill), **changes})
    return base.model_copy(update={"distill": distill})


def peak_gb() -> float:
    """Resident memory of this process at its largest, in units of 1e9 bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


if __name__ == "__main__":
    tyro.cli(main)
