"""The command line as a user meets it: what it teaches, and what it says to a mistake."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from dmd2 import recipes, stages
from dmd2.cli import VERBS, main, parse, run
from dmd2.config import Config
from tests import warm
from tests.conftest import flags


def dmd2(python: str, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [python, "-m", "dmd2", *words],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"COLUMNS": "100"},
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["destill"], "did you mean 'distill'"),
        (["distill"], "needs a recipe"),
        (["distill", "edm-digit"], "did you mean 'edm-digits'"),
        (
            ["distill", "edm-digits", "--data", "a", "--teacher", "t", "--out", "b", "--distil.steps", "3"],
            "--distill.steps",
        ),
        (["distill", "edm-digits", "--data", "a", "--out", "b"], "--teacher"),
        (
            ["distill", "edm-digits", "--data", "a", "--teacher", "t", "--out", "b", "--distill.steps", "-3"],
            "steps: Input should be greater than 0, not -3",
        ),
        (
            [
                "distill",
                "edm-digits",
                "--data",
                "a",
                "--teacher",
                "t",
                "--out",
                "b",
                "--distill.steps",
                "many",
            ],
            "'many'",
        ),
        (
            ["distill", "edm-digits", "--data", "a", "--teacher", "t", "--out", "b", "--seed", "-1"],
            "seed: Input should be greater than or equal to 0",
        ),
        (
            ["shard", "edm-digits", "--source", "/nowhere/at/all", "--out", "b"],
            "/nowhere/at/all does not exist",
        ),
        (
            ["distill", "edm-digits", "--data", "/nowhere", "--teacher", "t", "--out", "b"],
            "/nowhere has no manifest.json, so it does not exist",
        ),
        (
            ["package", "--run", "/nowhere", "--evaluation", "e", "--gate", "g", "--out", "b"],
            "/nowhere has no manifest.json, so it does not exist",
        ),
    ],
)
def test_a_mistake_gets_one_sentence_and_exit_status_64(
    words: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["dmd2", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    told = capsys.readouterr().err
    assert ended.value.code == 64
    assert said in told
    assert told.count("\n") == 1
    assert told.startswith("dmd2: ")


def test_help_may_be_cut_short_by_its_reader() -> None:
    command = f"{sys.executable} -m dmd2 distill edm-digits --help | head -1"
    ended = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert ended.stdout.startswith("usage: dmd2 distill edm-digits")
    assert not ended.stderr


def test_a_mistake_ends_a_real_process_without_a_stack_trace() -> None:
    ended = dmd2(
        sys.executable, "distill", "edm-digits", "--data", "/nowhere", "--teacher", "t", "--out", "b"
    )
    assert ended.returncode == 64
    assert (
        ended.stderr == "dmd2: /nowhere has no manifest.json, so it does not exist or was never finished; "
        "expected a shards folder (dmd2 --help lists which verb makes it)\n"
    )


def test_the_log_format_stands_before_the_verb(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DMD2_LOG_FORMAT", "text")
    for words in (["--log-format", "json"], ["--log-format=json"]):
        monkeypatch.setattr(sys, "argv", ["dmd2", *words, "destill"])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 64
        assert json.loads(capsys.readouterr().err)["exit_status"] == 64


def test_an_unknown_log_format_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["dmd2", "--log-format", "xml", "--help"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 64
    assert "text" in capsys.readouterr().err


def test_help_lists_verbs_and_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    run([])
    shown = capsys.readouterr().out
    assert all(verb in shown for verb in VERBS)
    assert all(recipe in shown for recipe in recipes.RECIPES)


def test_help_of_a_recipe_explains_every_field() -> None:
    shown = dmd2(warm.python(), "distill", "edm-digits", "--help")
    assert shown.returncode == 0
    for wanted in ("--distill.critic-updates", "two time-scale rule", "--data", "--teacher", "--seed"):
        assert wanted in shown.stdout
    assert "--recipe" not in shown.stdout


def test_help_of_a_verb_lists_its_flags_and_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    run(["plan", "--help"])
    shown = capsys.readouterr().out
    assert "edm-imagenet64" in shown
    assert "    --gpus-per-node: " in shown


def commands() -> list[str]:
    """The lines of the documents that start `dmd2 VERB` or `torchrun ... dmd2 VERB` and are complete, without their comments."""
    top = Path(__file__).parents[1]
    lines = [
        line for page in (top / "README.md", *top.glob("docs/*.md")) for line in page.read_text().split("\n")
    ]
    found = [
        re.fullmatch(r"(?:torchrun .*-m (?:-- )?)?dmd2 +([a-z]+ [^#]*?) *(#.*)?", line) for line in lines
    ]
    return sorted({one[1] for one in found if one and "..." not in one[1]})


@pytest.mark.parametrize("command", commands())
def test_a_command_of_the_documents_is_understood(command: str) -> None:
    verb, *words = shlex.split(command)
    assert parse(verb, getattr(stages, verb), words)


def test_a_verb_does_its_work_and_says_what_it_found(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(
        [
            "gate",
            "edm-digits",
            "--evaluation",
            str(made / "evaluation"),
            "--out",
            str(tmp_path / "gate"),
            *flags(),
        ]
    )
    assert capsys.readouterr().out.startswith("gate: decision ")
    run(["sample", "--package", str(made / "run"), "--out", str(tmp_path / "grid.png"), "--count", "3"])
    assert (tmp_path / "grid.png").is_file()


def test_recipes_are_listed_with_what_they_need_and_what_was_published(
    capsys: pytest.CaptureFixture[str],
) -> None:
    run(["recipes"])
    shown = capsys.readouterr().out
    entry = shown[shown.index("\nsdxl-1step\n") :].split("\n")[1:5]
    assert entry == [
        "sdxl-1step",
        "  1 step, 1024 px, DMD, GAN, critic x5, after sdxl-1step-warmup; 24,000 steps of batch 128",
        "  needs a run of sdxl-1step-warmup (--start) and a file of prompts (--prompts)",
        "  published: FID 19.01, 3,648 A100-hours (64 GPUs, 57 hours)",
    ]
    assert all(f"{name}\n" in shown for name in recipes.RECIPES)


def test_a_recipe_is_shown_with_all_its_settings_and_overrides(capsys: pytest.CaptureFixture[str]) -> None:
    run(["recipes", "show", "sdxl-4step"])
    assert Config.model_validate_json(capsys.readouterr().out) == recipes.get("sdxl-4step")
    run(["recipes", "show", "sdxl-4step", "distill.steps=7"])
    assert json.loads(capsys.readouterr().out)["distill"]["steps"] == 7


def test_a_flag_that_is_missing_is_told_with_its_meaning(refusal: Callable[..., str]) -> None:
    said = refusal(lambda: run(["plan", "edm-digits"]))
    assert "dmd2 plan edm-digits: missing: --gpu STR Kind of GPU: a100-40gb, " in said
    assert "required" not in said


@pytest.mark.parametrize(
    ("words", "said"),
    [(["show"], "takes no words, or"), (["list"], "takes no words"), (["show", "x"], "unknown recipe")],
)
def test_recipes_takes_nothing_else(words: list[str], said: str, refusal: Callable[..., str]) -> None:
    assert said in refusal(lambda: run(["recipes", *words]))
