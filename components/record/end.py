"""What a distillation that retraining has started says to the ledger: that it begins, and how it ended.

Without a claim, as in a run that a person has started, there is nothing to say.
"""

from __future__ import annotations

from components.find_teachers.ledger import Claim, Ledger
from dmd2.io.artifact import read_manifest
from dmd2.io.storage import join_uri, open_store


def begin(claim: str, run: str) -> str:
    """Before anything else; refused if the claim is not this run's any more.

    Args:
        claim: What retraining gave to the run; empty if nothing did.
        run: The platform's name of the run.
    """
    if not claim:
        return "this run works for no entry of a ledger"
    held = Claim.read(claim)
    return Ledger(open_store(held.ledger)).begin(held, run).told


def end(claim: str, run: str, root: str, state: str, error: str) -> str:
    """Afterwards, however it went.

    Args:
        claim: What retraining gave to the run; empty if nothing did.
        run: The platform's name of the run.
        root: Folder of the run, with its gate and its package.
        state: SUCCEEDED, FAILED or CANCELLED, as the platform says.
        error: What the platform says of a failure.
    """
    if not claim:
        return "this run works for no entry of a ledger"
    held = Claim.read(claim)
    ledger = Ledger(open_store(held.ledger))
    if state != "SUCCEEDED":
        reason = error or f"the run ended as {state}"
        return ledger.failed(held, run, reason, for_good=state == "CANCELLED").told
    decision = str(read_manifest(join_uri(root, "gate"), "gate").facts["decision"])
    package = join_uri(root, "package") if decision == "accepted" else ""
    if package:
        read_manifest(package, "package")
    return ledger.done(held, run, decision, package).told
