"""What a run that retraining has started reports to the ledger: its start and its end.

A run that a person has started has no claim and reports nothing. A failure whose cause the run does not know is left to
the next watcher, which asks the platform.
"""

from __future__ import annotations

from components.find_teachers.entries import Claim
from components.find_teachers.ledger import Ledger
from components.find_teachers.runs import cause_of
from dmd2.io.artifact import read_manifest
from dmd2.io.storage import join_uri, open_store

NO_CLAIM = "this run belongs to no entry of a ledger"
UNKNOWN_CAUSE = "the cause is not known here; the next watcher asks the platform"


def report_start(claim: str, run: str) -> str:
    """Record that the run works for its claim -> a sentence for the log.

    Args:
        claim: The claim of the run; empty if a person has started it.
        run: The KFP id of the run.

    Raises:
        Refused: If the claim no longer belongs to this run, which must not do anything then.
    """
    if not claim:
        return NO_CLAIM
    held = Claim.read(claim)
    return Ledger(open_store(held.ledger)).begin(held, run).summary


def report_end(
    claim: str, run: str, root: str, state: str, error: str, gpu_hours: float | None = None
) -> str:
    """Record how the run ended: done, with the gate's decision and the package, or failed if the cause is known -> a
    sentence for the log.

    Args:
        claim: The claim of the run; empty if a person has started it.
        run: The KFP id of the run.
        root: Folder of the run, with its gate and its package.
        state: SUCCEEDED, FAILED or CANCELLED, as KFP says.
        error: KFP's message about the failure.
        gpu_hours: What the run has taken; None if it is not known.
    """
    if not claim:
        return NO_CLAIM
    held = Claim.read(claim)
    ledger = Ledger(open_store(held.ledger))
    if state != "SUCCEEDED":
        if (cause := cause_of(error)) == "unknown":
            return UNKNOWN_CAUSE
        return ledger.failed(held, run, error, counted=cause == "teacher").summary
    decision = str(read_manifest(join_uri(root, "gate"), "gate").facts["decision"])
    package = join_uri(root, "package") if decision == "accepted" else ""
    if package:
        read_manifest(package, "package")
    return ledger.done(held, run, decision, package, gpu_hours).summary
