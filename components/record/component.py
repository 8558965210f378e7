from kfp import dsl

from components.image import image


@dsl.component(base_image=image("dmd2-launch"), install_kfp_package=False)
def record(claim: str, run_id: str, root: str, status: dsl.PipelineTaskFinalStatus) -> None:
    """Record in the ledger of retraining how a run has ended: done, with its package, or failed, with the reason.

    Args:
        claim: What retraining gave to the run; empty for a run that a person has started, which is not recorded.
        run_id: The platform's name of the run.
        root: Folder of the run, with its gate and its package.
        status: How the stages ended.
    """
    from components.record.end import end
    from dmd2.errors import one_sentence

    with one_sentence():
        print(end(claim, run_id, root, status.state, status.error_message or ""))
