"""The command line: `dmd2 VERB [RECIPE] --flags`. One verb per stage; flags are read from the stage's signature.

Exit status: 0 done, 64 a wrong input, 74 the disk or the bucket, 75 stopped by SIGTERM or SIGHUP after
saving, or a worker was lost, 76 diverged, 130 Ctrl-C.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import tyro

from dmd2 import recipes
from dmd2.config import Config
from dmd2.errors import Refused, near_miss, one_sentence

VERBS = {
    "shard": "source -> shards",
    "encode": "shards -> latents (VAE)",
    "resolve": "pipeline, checkpoint or pickle -> teacher",
    "teach": "shards -> teacher (small, for demos and tests)",
    "pairs": "teacher -> pairs of noise and answer, for a warm-up",
    "plan": "recipe + hardware -> memory, time and cost, before paying",
    "distill": "shards or latents + teacher -> run",
    "adopt": "a published student -> run",
    "sample": "package, run or teacher -> picture",
    "evaluate": "shards + teacher + run -> evaluation",
    "gate": "evaluation -> accepted or rejected",
    "package": "run + evaluation + gate -> package",
    "publish": "package -> models",
    "report": "all of them -> report.html",
}


def main() -> None:
    with one_sentence():
        run(sys.argv[1:])


def run(words: Sequence[str]) -> None:
    if not words or words[0] in ("-h", "--help"):
        print(_overview())
        return
    verb, *rest = words
    if verb not in VERBS:
        raise Refused(f"unknown verb {verb!r}; {near_miss(verb, list(VERBS))}")
    from dmd2 import stages

    stage: Callable[..., Any] = getattr(stages, verb)
    program, config = f"dmd2 {verb}", None
    if "config" in inspect.signature(stage).parameters:
        if rest[:1] in (["-h"], ["--help"]):
            print(_recipe_help(verb, stage))
            return
        if not rest or rest[0].startswith("-"):
            raise Refused(f"{program} needs a recipe as its first word: {', '.join(recipes.RECIPES)}")
        config = recipes.get(rest[0])
        program, rest = f"{program} {rest[0]}", rest[1:]
    result = stage(**recipes.parse(_arguments(stage, config), rest, program))
    print(f"{verb}: {_told(result.facts)}" if hasattr(result, "facts") else result)


def _arguments(stage: Callable[..., Any], config: Config | None) -> Callable[..., dict[str, Any]]:
    """A function with the stage's parameters as flags, the Config's among them, that returns what it was given."""
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
    names = "\n".join(f"  {name:<33} {_first_line(make)}" for name, make in recipes.RECIPES.items())
    return f"""usage: dmd2 VERB [RECIPE] --flags

Distil a diffusion teacher into a one- or few-step student. Each verb reads folders and makes one.

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
    return f"usage: dmd2 {verb} RECIPE --flags\n\n{inspect.getdoc(stage)}\n\nrecipes (dmd2 {verb} RECIPE --help lists every flag):\n{names}"


def _first_line(make: Callable[[], Config]) -> str:
    config = make()
    parts = [f"{len(config.distill.student_timesteps)} step", f"{config.family.image[1]} px"]
    parts += ["DMD"] if config.distill.dmd else []
    parts += [f"critic x{config.distill.critic_updates}"] + (["GAN"] if config.distill.gan else [])
    return ", ".join(parts)


def _told(facts: dict[str, Any]) -> str:
    """The numbers and short texts of a manifest, on one line."""
    short = {k: v for k, v in facts.items() if isinstance(v, (int, float, str))}
    return ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in short.items())
