"""The step that writes the report, for a run on a bucket."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

from components.report.component import report
from dmd2.io.storage import open_store, upload_files


def test_the_report_of_a_run_on_a_bucket_is_also_the_page_of_the_ui(
    bucket: str, made: Path, tmp_path: Path
) -> None:
    names = ("shards", "teacher", "run", "evaluation", "gate")
    files = [
        str(path.relative_to(made)) for name in names for path in (made / name).rglob("*") if path.is_file()
    ]
    upload_files(made, files, open_store(bucket))
    inputs = {name: SimpleNamespace(metadata={"uri": f"{bucket}/{name}"}) for name in names if name != "gate"}
    page = SimpleNamespace(path=str(tmp_path / "page"))
    report.python_func(root=bucket, decision="rejected", start="", pairs="", page=page, **inputs)
    text = (tmp_path / "page").read_bytes()
    assert b"</html>" in text
    assert open_store(bucket).read("report.html") == text
