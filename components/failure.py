"""Why a training failed for good, kept in the folder of the run.

KFP repeats a failed step whatever its exit status was. A wrong input and a divergence come back, so a repetition in the same
run ends at once instead of training on all GPUs again; and the last step of the run, which KFP tells no cause, reads it here.
"""

from __future__ import annotations

import signal

from pydantic import BaseModel

from dmd2.errors import EXIT_RANK_LOST, EXIT_RESTARTABLE, Diverged, Refused, brief
from dmd2.io.storage import join_uri, open_store

FAILURE = "failure.json"
FINAL = {
    Refused.status: "an input is wrong",
    Diverged.status: "the training diverged",
}
"""Exit statuses with which a training ends again when it is repeated -> what they mean."""
CONSEQUENCES = (EXIT_RANK_LOST, EXIT_RESTARTABLE, 128 + signal.SIGTERM)
"""Exit statuses of processes that ended because of another one, or were told to, those that say more first."""


def severity(status: int) -> int:
    """How little an exit status says about why a training of several processes failed: 0 = it is the cause."""
    if status in FINAL:
        return 0
    return 2 + CONSEQUENCES.index(status) if status in CONSEQUENCES else 1


class Failure(BaseModel):
    """The failure of a step that would fail again."""

    run: str
    """KFP id of the run."""
    folder: str
    status: int

    @property
    def sentence(self) -> str:
        return (
            f"the training of {self.folder} ended with exit status {self.status}: {FINAL[self.status]}, as its log says in "
            "a sentence; start a new run when that is mended"
        )


def write_failure(root: str, run: str, folder: str, status: int) -> None:
    """Keep the exit status of a training, if a repetition would end the same."""
    if status in FINAL:
        text = Failure(run=run, folder=folder, status=status).model_dump_json(indent=1)
        open_store(root).write(FAILURE, text.encode())


def read_failure(root: str, run: str) -> Failure | None:
    """The failure for good of this run; those of earlier runs in the same folder do not count."""
    try:
        found = Failure.model_validate_json(open_store(root).read(FAILURE))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise Refused(f"{join_uri(root, FAILURE)} cannot be read ({brief(error)}); remove it") from None
    return found if found.run == run else None
