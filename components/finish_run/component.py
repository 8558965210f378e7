from kfp import dsl

from components.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def finish_run(
    root: str,
    run_id: str,
    claim: str,
    price: float,
    status: dsl.PipelineTaskFinalStatus,
    summary: dsl.Output[dsl.Markdown],
) -> None:
    """Report how the run ended and which folders it has made: as a page, in `<root>/outcome.json` and to the ledger.

    The exit handler of the pipeline: it runs after a failure too, but not after a run was terminated.

    Args:
        root: Folder of the run; empty for the folder beside the KFP artifacts of the run.
        run_id: The KFP id of the run.
        claim: The claim in the ledger, in a run that retraining has started; otherwise empty.
        price: Price of a GPU for an hour; 0 = unknown.
        status: How the other tasks ended.
        summary: The outcome as a page of the UI.
    """
    import logging
    from pathlib import Path

    from components.failure import read_failure
    from components.find_teachers.run_reports import report_end
    from components.finish_run.outcome import gpu_hours, write_outcome
    from components.run_folder import run_folder
    from dmd2.errors import one_sentence

    logger = logging.getLogger("components.finish_run")
    with one_sentence():
        folder = run_folder(root, run_id, summary.uri)
        failure = read_failure(folder, run_id)
        error = failure.sentence if failure else status.error_message or ""
        text = write_outcome(folder, run_id, status.state, error, price)
        Path(summary.path).write_text(text)
        logger.info(text)
        logger.info(report_end(claim, run_id, folder, status.state, error, gpu_hours(folder)))
