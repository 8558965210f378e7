"""`python -m tests.cluster.step JSON`: the step `distill` of a run, called with its parameters as KFP's executor calls it."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace
from typing import Any

from components.distill.component import distill
from components.distill.launch import JobSize, choose


def main(given: dict[str, Any]) -> None:
    """Run the step; `data` is the address of `shards` and `teacher`."""
    data = given.pop("data")
    inputs = {
        name: SimpleNamespace(metadata={"uri": f"{data}/{at}"})
        for name, at in (("samples", "shards"), ("teacher", "teacher"))
    }
    fixed = {
        "recipe": "edm-digits",
        "folder": "run",
        "start": "",
        "pairs": "",
        "prompts": "",
        "pool": {},
        "gpus": 0,
    }
    where = choose(JobSize(int(given["nodes"])))
    distill.python_func(
        **fixed | given | inputs, where=where, run=SimpleNamespace(metadata={}, path="/tmp/run.json")
    )


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
