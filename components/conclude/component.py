from kfp import dsl

from components.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def conclude(
    root: str,
    run_id: str,
    claim: str,
    status: dsl.PipelineTaskFinalStatus,
    summary: dsl.Output[dsl.Markdown],
) -> None:
    """Say how the run ended and what of it is there, to people, in `<root>/outcome.json` and to retraining.

    It runs after failures too, but not after a run was stopped: the platform gives it no time then.

    Args:
        root: Folder of the run; empty for the one beside the artifacts of the run.
        run_id: The platform's name of the run.
        claim: What retraining gave to the run; empty for one that a person has started.
        status: How the stages ended.
        summary: The same for people.
    """
    from pathlib import Path

    from components.conclude.outcome import conclusion
    from components.place import place
    from components.record.end import end
    from dmd2.errors import one_sentence

    with one_sentence():
        folder = place(root, run_id, summary.uri)
        text = conclusion(folder, run_id, status.state, status.error_message or "")
        Path(summary.path).write_text(text)
        print(text)
        print(end(claim, run_id, folder, status.state, status.error_message or ""))
