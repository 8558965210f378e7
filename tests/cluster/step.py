"""`python -m tests.cluster.step JSON`: the step `distill` of a run, called with its parameters as KFP's executor calls it."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace
from typing import Any

from components.distill.component import distill
from components.distill.kube import connect
from components.distill.launch import JobSize, Training, choose, run_to_end
from components.distill.trainjob import TrainJob
from dmd2.errors import one_sentence


class Scripted(TrainJob):
    """A launcher whose nodes run a script of the shell in place of a training."""

    def body(self) -> dict[str, Any]:
        found = super().body()
        found["spec"]["trainer"]["command"] = ["sh", "-c", self.training.arguments[-1]]
        return found


def main(given: dict[str, Any]) -> None:
    """Run the step; `data` is the address of `shards` and `teacher`, and `script` replaces the training."""
    data, script = given.pop("data"), given.pop("script", "")
    size = JobSize(int(given["nodes"]), 0, given["queue"])
    where = choose(size, given["root"])
    if script:
        kube = connect()
        arguments = ["distill", "edm-digits", script]
        training = Training(arguments, size, given["run_id"], given["root"], "run", given.get("pool", {}))
        sys.exit(run_to_end(Scripted(training, kube, kube.this_pod())))
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
        "price": 0.0,
        "budget": 0.0,
        "pool": {},
        "gpus": 0,
    }
    distill.python_func(
        **fixed | given | inputs, where=where, run=SimpleNamespace(metadata={}, path="/tmp/run.json")
    )


if __name__ == "__main__":
    with one_sentence():
        main(json.loads(sys.argv[1]))
