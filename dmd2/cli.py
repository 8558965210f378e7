"""The command line: `dmd2 [--log-format json] VERB [RECIPE] --flags`. One verb per stage; its flags are the stage's parameters.

Exit status: 0 for success, 64 for a wrong input, 74 for the disk or the bucket, 75 stopped by SIGTERM or SIGHUP after
saving, 76 for a diverged training, 79 if another process of the run was lost, 130 for Ctrl-C.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import tyro

from dmd2 import log, recipes
from dmd2.config import Config
from dmd2.errors import Refused, near_miss, one_sentence
from dmd2.overrides import parse_flags

VERBS = {
    "recipes": "the recipes, with what each needs, costs and scores; `recipes show NAME`: all settings of one",
    "shard": "source -> shards",
    "encode": "shards -> latents (VAE)",
    "convert": "latents of DMD2's reference code -> latents",
    "resolve": "diffusers pipeline, checkpoint or pickle -> teacher",
    "teach": "shards -> teacher (small, for demos and tests)",
    "pairs": "teacher -> pairs of noise and sample, for a regression warm-up",
    "mirror": "feature networks, decoders, teacher and safety checker of a recipe -> a folder or bucket of your own",
    "plan": "recipe + hardware -> predicted memory, time and cost",
    "distill": "shards or latents + teacher -> run",
    "adopt": "student distilled elsewhere -> run",
    "sample": "package, run or teacher -> picture grid",
    "evaluate": "shards + teacher + run -> evaluation",
    "gate": "evaluation -> accepted or rejected",
    "package": "accepted run + evaluation + gate -> package",
    "verify": "package -> whether it is what its manifest and provenance say",
    "publish": "package -> folder of published models",
    "alias": "published model -> a name that moves, such as latest, and remembers",
    "serve": "packages -> a page and an HTTP API that draw with them",
    "report": "shards, teacher, run, evaluation, gate -> report.html",
}

POSITIONAL = {
    "sample": "package",
    "verify": "package",
    "publish": "package",
    "alias": "name",
    "serve": "packages",
}
"""Verb -> the flag that its words before the first flag belong to: `dmd2 verify FOLDER` is `dmd2 verify --package FOLDER`."""


def main() -> None:
    with one_sentence():
        run(_configure_log(sys.argv[1:]))


def _configure_log(arguments: Sequence[str]) -> Sequence[str]:
    """Apply `--log-format text|json`, which stands before the verb -> the other arguments."""
    flag, equals, value = arguments[0].partition("=") if arguments else ("", "", "")
    if flag != "--log-format":
        return arguments
    rest = arguments[1:] if equals else arguments[2:]
    log.configure(value if equals else "".join(arguments[1:2]))
    return rest


def run(arguments: Sequence[str]) -> None:
    """Run `VERB [RECIPE] --flags` and print its result."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_overview())
        return
    verb, *rest = arguments
    if verb not in VERBS:
        raise Refused(f"unknown verb {verb!r}; {near_miss(verb, VERBS)}")
    if verb == "recipes":
        print(_recipes(rest))
        return
    from dmd2 import stages

    stage: Callable[..., Any] = getattr(stages, verb)
    if "config" in inspect.signature(stage).parameters and rest[:1] in (["-h"], ["--help"]):
        print(_recipe_help(verb, stage))
        return
    result = stage(**parse(verb, stage, rest))
    said = f"{verb}: {_facts_line(result.facts)}" if hasattr(result, "facts") else str(result)
    print(log.printable(said))


def parse(verb: str, stage: Callable[..., Any], rest: Sequence[str]) -> dict[str, Any]:
    """The arguments of a stage from the words after its verb."""
    program, config = f"dmd2 {verb}", None
    if "config" in inspect.signature(stage).parameters:
        if not rest or rest[0].startswith("-"):
            raise Refused(f"{program} needs a recipe as its first word: {', '.join(recipes.RECIPES)}")
        config = recipes.get(rest[0])
        program, rest = f"{program} {rest[0]}", rest[1:]
    if verb in POSITIONAL and rest and not rest[0].startswith("-"):
        rest = [f"--{POSITIONAL[verb]}", *rest]
    return parse_flags(_arguments(stage, config), rest, program)


def _recipes(words: Sequence[str]) -> str:
    """The answer to `dmd2 recipes` and `dmd2 recipes show NAME [field=value ...]`."""
    match words:
        case []:
            return recipes.overview()
        case ["show", name, *overrides]:
            return recipes.resolve(name, overrides).model_dump_json(indent=2)
    raise Refused("dmd2 recipes takes no words, or `show NAME` and fields to replace, as field=value")


def _arguments(stage: Callable[..., Any], config: Config | None) -> Callable[..., dict[str, Any]]:
    """A function that returns its arguments as a dict, with the stage's parameters and the Config's fields as its flags."""
    given = inspect.signature(stage).parameters.values()
    types = {
        p.name: eval(p.annotation, stage.__globals__) for p in given
    }  # not that of the result: slow to import
    types["config"] = Annotated[Config, tyro.conf.arg(name="")]
    parameters = [
        p.replace(
            kind=p.KEYWORD_ONLY,
            annotation=types[p.name],
            default=config if p.name == "config" else p.default,
        )
        for p in given
    ]

    def collect(**arguments: Any) -> dict[str, Any]:
        return arguments

    collect.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    collect.__annotations__ = {p.name: p.annotation for p in parameters}
    collect.__doc__ = stage.__doc__
    return collect


def _overview() -> str:
    verbs = "\n".join(f"  {verb:<9} {what}" for verb, what in VERBS.items())
    names = "\n".join(f"  {name:<33} {recipes.summary(make())}" for name, make in recipes.RECIPES.items())
    return f"""usage: dmd2 [--log-format {{text,json}}] VERB [RECIPE] --flags

Distil a diffusion teacher into a one- or few-step student with DMD2. Each verb reads folders and writes one, local or gs://.

verbs (dmd2 VERB --help):
{verbs}

recipes (dmd2 VERB RECIPE --help lists every setting and its default):
{names}

example:
  dmd2 shard   edm-digits --source digits --out runs/a/shards
  dmd2 teach   edm-digits --data runs/a/shards --out runs/a/teacher
  dmd2 distill edm-digits --data runs/a/shards --teacher runs/a/teacher --out runs/a/run --distill.steps 500"""


def _recipe_help(verb: str, stage: Callable[..., Any]) -> str:
    names = "\n".join(f"  {name}" for name in recipes.RECIPES)
    words = re.sub(
        r"^    \w+:",
        lambda flag: flag[0].replace("    ", "    --").replace("_", "-"),
        inspect.getdoc(stage) or "",
        flags=re.MULTILINE,
    )
    return f"usage: dmd2 {verb} RECIPE --flags\n\n{words}\n\nrecipes (dmd2 {verb} RECIPE --help lists every flag):\n{names}"


def _facts_line(facts: dict[str, Any]) -> str:
    """The numbers and texts among the facts of a manifest, on one line."""
    short = {k: v for k, v in facts.items() if isinstance(v, (int, float, str)) and v != ""}
    return ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in short.items())
