"""Log records on stderr: plain lines, or one JSON object per record; one sentence at the end in either format."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import Any

import google.auth._helpers
import pytest

from dmd2 import log, recipes
from dmd2.errors import Refused, one_sentence
from dmd2.progress import Progress


@pytest.fixture(autouse=True)
def logging_of_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each test configures logging for itself and leaves it as it was."""
    monkeypatch.setenv(log.FORMAT, "text")
    root, hook = logging.getLogger(), sys.excepthook
    names = ("root", "google", *log.PACKAGES)
    handlers, levels = list(root.handlers), {name: logging.getLogger(name).level for name in names}
    yield
    root.handlers[:], sys.excepthook = handlers, hook
    logging.captureWarnings(False)
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


def events(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_a_record_is_one_json_object_as_cloud_logging_reads_it(capsys: pytest.CaptureFixture[str]) -> None:
    log.configure("json")
    logging.getLogger("dmd2.training").warning(
        "loss is %g\nagain", 2.5, extra={"step": 3, "loss": float("nan")}
    )
    (event,) = events(capsys.readouterr().err)
    time = datetime.fromisoformat(event.pop("time"))
    assert time.utcoffset() is not None
    assert abs(time.timestamp() - datetime.now().timestamp()) < 60
    assert event == {
        "severity": "WARNING",
        "message": "loss is 2.5\nagain",
        "logger": "dmd2.training",
        "step": 3,
        "loss": "nan",
    }


@pytest.mark.parametrize("level", log.SEVERITIES)
def test_levels_are_severities_by_the_same_name(level: str) -> None:
    record = logging.makeLogRecord({"levelno": logging.getLevelNamesMapping()[level]})
    assert log.event(record)["severity"] == level


def test_configuring_twice_logs_once_in_the_format_of_the_last_time(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for format in ("text", "json", "text", ""):
        log.configure(format)
    logging.getLogger("dmd2.io").info("uploaded")
    logging.getLogger("dmd2.io").warning("slow")
    assert capsys.readouterr().err == "uploaded\nwarning: slow\n"


def test_the_environment_chooses_the_format_and_other_libraries_log_warnings_only(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(log.FORMAT, "json")
    logging.getLogger().setLevel(logging.INFO)  # as the executor of KFP does
    log.configure()
    for level in (logging.INFO, logging.WARNING):
        logging.getLogger("google.auth").log(level, "credentials")
    assert [event["severity"] for event in events(capsys.readouterr().err)] == ["WARNING"]


def test_warnings_of_google_are_logged_where_its_library_hid_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(google.auth._helpers, "_LOGGING_INITIALIZED", False)
    google_logger = logging.getLogger("google")
    google_logger.setLevel(logging.NOTSET)
    google.auth._helpers.is_logging_enabled(google_logger)
    assert not google_logger.propagate
    log.configure("text")
    logging.getLogger("google.auth").warning("no project")
    monkeypatch.setattr(google.auth._helpers, "_LOGGING_INITIALIZED", False)
    google.auth._helpers.is_logging_enabled(google_logger)
    logging.getLogger("google.auth").warning("no quota")
    assert capsys.readouterr().err == "warning: no project\nwarning: no quota\n"


def test_a_record_is_printed_once_beside_the_handler_of_kfps_executor(
    capsys: pytest.CaptureFixture[str],
) -> None:
    executor = logging.StreamHandler(sys.stderr)
    logging.getLogger().addHandler(executor)
    log.configure("text")
    logging.getLogger("dmd2.stages").info("encoding")
    logging.getLogger("kfp").warning("of KFP")
    assert capsys.readouterr().err.splitlines() == ["encoding", "of KFP", "warning: of KFP"]


@pytest.mark.parametrize(("rank", "level", "logged"), [("0", "", 1), ("1", "", 0), ("1", "INFO", 1)])
def test_only_the_main_process_logs_info_unless_asked(
    rank: str, level: str, logged: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv(log.LEVEL, level)
    log.configure("text")
    logging.getLogger("dmd2.stages").info("encoding")
    assert capsys.readouterr().err.count("encoding") == logged


def test_an_unknown_format_is_refused(refusal: Callable[..., str]) -> None:
    assert "DMD2_LOG_FORMAT is 'jsn'; did you mean 'json'?" in refusal(lambda: log.configure("jsn"))


def test_the_last_sentence_is_an_error_with_the_exit_status(capsys: pytest.CaptureFixture[str]) -> None:
    log.configure("json")
    with pytest.raises(SystemExit) as caught, one_sentence():
        raise Refused("the folder is empty")
    (event,) = events(capsys.readouterr().err)
    assert (event["severity"], event["message"], event["exit_status"]) == ("ERROR", "the folder is empty", 64)
    assert caught.value.code == 64


def test_in_json_progress_is_events(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("dmd2.progress.RECORD_EVERY_S", 0.0)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    log.configure("json")
    with Progress("distill", 10, "steps", done=4) as progress:
        progress.advance(2, "loss 0.5")
    first, last = events(capsys.readouterr().err)
    assert first["message"].startswith("distill: 6/10 steps, ")
    assert (first["stage"], first["done"], first["total"], first["note"]) == ("distill", 6, 10, "loss 0.5")
    assert last["done"] == 6


def test_progress_expects_no_more_of_what_was_left_out_and_knows_nothing_before_the_first_step(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("dmd2.progress.RECORD_EVERY_S", 0.0)
    log.configure("json")
    with Progress("distill", 10, "steps") as progress:
        progress.start -= 100
        progress.leave_out(80)
        progress.advance(0, "compiled graphs: 3 in 80 s")
        progress.advance(5)
    first, second, _ = events(capsys.readouterr().err)
    assert first["message"] == "distill: 0/10 steps, compiled graphs: 3 in 80 s"
    assert second["message"] == "distill: 5/10 steps, 20 s left"


def test_on_a_terminal_a_bar_and_log_lines_share_the_screen(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    log.configure("text")
    with Progress("distill", 10, "steps") as progress:
        logging.getLogger("dmd2.training").warning("an update is skipped")
        progress.advance(10, "loss 0.5")
    shown = capsys.readouterr().err
    assert "WARNING" in shown
    assert "an update is skipped" in shown
    assert "10/10" in shown


def test_an_uncaught_exception_is_one_json_object() -> None:
    program = "from dmd2 import log; log.configure('json'); 1 / 0"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    (event,) = events(done.stderr)
    assert event["severity"] == "CRITICAL"
    assert event["message"] == "ZeroDivisionError: division by zero"
    assert event["stack_trace"].startswith("Traceback")


def test_importing_what_logs_imports_nothing_slow() -> None:
    program = (
        "import sys, dmd2.errors, dmd2.log, dmd2.progress, dmd2.io.storage;"
        "print(sorted({'torch', 'rich', 'google.cloud.storage', 'requests', 'numpy'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


CONTROLS = "a\x1b[31mred\x1b]0;title\x07\x9b2J\u202egnp.exe\r"
ADDRESS = "https://me:pass@word@host/x?X-Goog-Signature=abc123&alt=media&access_token=t0ken"


def test_names_cannot_steer_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    log.configure("text")
    logging.getLogger("dmd2.x").warning("read %s", CONTROLS)
    assert capsys.readouterr().err == (
        "warning: read a\\x1b[31mred\\x1b]0;title\\x07\\x9b2J\\u202egnp.exe\\r\n"
    )
    with pytest.raises(SystemExit), one_sentence():
        raise Refused(f"{CONTROLS}\ndmd2: all is well")
    assert capsys.readouterr().err == (
        "dmd2: a\\x1b[31mred\\x1b]0;title\\x07\\x9b2J\\u202egnp.exe\\r\\ndmd2: all is well\n"
    )


def test_names_in_any_script_are_printed_as_they_are() -> None:
    for text in (
        "Käse.png",
        "猫/🐈‍⬛.jpg",
        "a\tb\nc",
        "gs://bucket/me@x.org/a.png",
        "x?monkey=1",
        "{'a': '@'}",
    ):
        assert log.printable(text) == text


@pytest.mark.parametrize("format", ["text", "json"])
def test_secrets_of_an_address_are_not_logged(format: str, capsys: pytest.CaptureFixture[str]) -> None:
    log.configure(format)
    logging.getLogger("dmd2.x").warning("read %s", ADDRESS, extra={"uri": ADDRESS, "all": [ADDRESS]})
    with pytest.raises(SystemExit), one_sentence():
        raise Refused(f"{ADDRESS} does not exist")
    said = capsys.readouterr().err
    assert "https://***@host/x?X-Goog-Signature=***&alt=media&access_token=***" in said
    for secret in ("word", "pass", "abc123", "t0ken"):
        assert secret not in said


def test_an_address_with_a_password_is_no_setting(refusal: Callable[[Callable[[], object]], str]) -> None:
    sentence = refusal(
        lambda: recipes.resolve("edm-digits", (f"evaluate.inception.uri={ADDRESS.partition('?')[0]}",))
    )
    assert "holds a password" in sentence
    assert "pass@word" not in log.printable(sentence)
