from kfp import dsl

from components.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def report(
    root: str,
    decision: str,
    start: str,
    pairs: str,
    shards: dsl.Input[dsl.Dataset],
    teacher: dsl.Input[dsl.Model],
    run: dsl.Input[dsl.Model],
    evaluation: dsl.Input[dsl.Artifact],
    page: dsl.Output[dsl.HTML],
) -> None:
    """Write one self-contained HTML page about the whole run, also to `<root>/report.html`.

    Args:
        root: Folder of the run.
        decision: The decision of the gate; the report of an accepted run includes its package.
        start: The run that the distillation started from, or empty.
        pairs: The pairs that one of both learned from, or empty.
        shards: Real images.
        teacher: The teacher.
        run: The student.
        evaluation: The scores.
        page: The report, for the UI.
    """
    import shutil

    from dmd2 import stages
    from dmd2.errors import one_sentence
    from dmd2.io.storage import fetch_file

    with one_sentence():
        data, original, student, scores = (a.metadata["uri"] for a in (shards, teacher, run, evaluation))
        package = f"{root}/package" if decision == "accepted" else ""
        written = stages.report(
            data, original, student, scores, f"{root}/gate", f"{root}/report.html", package, start, pairs
        )
        shutil.copyfile(fetch_file(written), page.path)
