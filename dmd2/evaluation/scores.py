"""The scores in the manifest of an evaluation, as gate, report, model card, KFP metrics and summary read them.

`scores` is {set of images: {metric: {value, low, high}}}, and `metrics` has title, direction and format of each metric, so a reader
needs neither the table of metrics nor the code that computed them. Evaluations of version 0.1.0 know only FID, and for some time
`scores` was a list of metrics; both are still read.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from dmd2.errors import Refused
from dmd2.evaluation.baselines import BASELINE
from dmd2.evaluation.confidence import margin
from dmd2.evaluation.metrics import METRICS, Better, Metric, Score

if TYPE_CHECKING:
    from dmd2.config import Config
    from dmd2.models.family import ModelFamily

SCORES_FILE = "scores.json"
"""File of an evaluation with `facts["scores"]`, for readers without this library."""
FORMAT = r"[^{}]{0,20}\{:[,+]?(\.\d)?[efg%]?\}[^{}]{0,20}"
"""What `Metric.format` may be: it is read from manifests and applied to numbers."""
COLUMNS = ("values", "intervals", "replicates", "details")
"""Fields of `MetricScores` that map the name of a set to something."""
REAL = "real"
"""Name of the set of real training images, whose score is what a perfect student would reach."""


@dataclass(frozen=True)
class ImageSet:
    """Images that were scored together, and how they were made."""

    name: str
    """`student`, `teacher`, `teacher_1step`, ...; `real`."""
    recipe: str
    """The recipe of a student, `teacher` or `baseline`; empty for real images."""
    steps: int
    """Sampler steps; 0 for real images."""
    calls: int
    """Network calls per image; 0 for real images."""

    @property
    def title(self) -> str:
        """`teacher in 4 steps`."""
        if self.name == REAL:
            return "real training images"
        if self.recipe == BASELINE:
            return f"{self.name} in {_steps(self.steps)}"
        who, *fewer = self.name.split("_")
        return f"{who} in {_steps(self.steps)}" if fewer else who


def _steps(count: int) -> str:
    return f"{count} step{'s' if count > 1 else ''}"


REAL_IMAGES = ImageSet(REAL, "", 0, 0)


def sets_to_sample(config: Config, steps: int, family: ModelFamily) -> list[ImageSet]:
    """What an evaluation of a student of so many steps samples: student and teacher as they are used, both in one step, and the teacher
    in as many steps as the student."""
    settings = config.evaluate

    def by_teacher(name: str, count: int) -> ImageSet:
        return ImageSet(name, "teacher", count, family.teacher_calls(count, settings.teacher_guidance))

    sets = [
        ImageSet("student", config.recipe, steps, steps),
        by_teacher("teacher", settings.teacher_steps),
        by_teacher("teacher_1step", 1),
    ]
    if steps > 1:
        sets += [ImageSet("student_1step", config.recipe, 1, 1), by_teacher(f"teacher_{steps}step", steps)]
    return sets


@dataclass(frozen=True)
class MetricScores:
    """The scores of all sets by one metric."""

    name: str
    title: str
    better: Better
    format: str
    """How a value is printed, with its unit."""
    values: dict[str, float] = field(default_factory=dict)
    """{name of the set: score}."""
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    """{name of the set: (low, high)}, for metrics that give a confidence interval."""
    replicates: dict[str, list[float]] = field(default_factory=dict)
    """{name of the set: replicates of its score}, see `dmd2.evaluation.confidence`."""
    details: dict[str, dict[str, float]] = field(default_factory=dict)
    """{name of the set: further numbers about its score}: of FID `half`, at half the number of images, and `infinity`, without the bias
    of finite sets."""

    @classmethod
    def of(cls, metric: Metric, scores: Mapping[str, Score]) -> MetricScores:
        values = {name: score.value for name, score in scores.items()}
        intervals = {name: score.interval for name, score in scores.items() if score.interval}
        replicates = {name: list(score.replicates) for name, score in scores.items() if score.replicates}
        details = {name: dict(score.details) for name, score in scores.items() if score.details}
        about = (metric.name, metric.title, metric.better, metric.format)
        return cls(*about, values, intervals, replicates, details)

    def with_set(self, name: str, other: MetricScores, theirs: str) -> MetricScores:
        """These scores and, as `name`, those of the set `theirs` among others by the same metric."""
        added = other.columns_of(theirs, name)
        return replace(self, **{column: getattr(self, column) | added[column] for column in COLUMNS})

    def columns_of(self, name: str, called: str) -> dict[str, Any]:
        """Values, intervals, replicates and details of one set alone, under another name."""
        columns = {column: getattr(self, column) for column in COLUMNS}
        return {c: {called: found[name]} if name in found else {} for c, found in columns.items()}

    def margin(self, name: str) -> float:
        """Half the width of the interval of 95 % of a score; 0 if it has none."""
        return self.margin_of_sum({name: 1.0})

    def margin_of_sum(self, weights: Mapping[str, float]) -> float:
        """The same of the weighted sum of the scores of several sets. Without replicates their errors count as independent."""
        if all(self.replicates.get(name) for name in weights):
            rows = zip(*(self.replicates[name] for name in weights), strict=True)
            return margin([sum(w * r for w, r in zip(weights.values(), row, strict=True)) for row in rows])
        return math.hypot(*(w * self._half_width(name) for name, w in weights.items()))

    def _half_width(self, name: str) -> float:
        low, high = self.intervals.get(name, (0.0, 0.0))
        return (high - low) / 2

    @classmethod
    def from_json(cls, name: str, facts: Mapping[str, Any]) -> MetricScores:
        """Read what `score_facts` wrote."""
        about = facts["metrics"][name]
        found = {each: metrics[name] for each, metrics in facts["scores"].items() if name in metrics}
        values = {each: score["value"] for each, score in found.items()}
        intervals = {
            each: (score["low"], score["high"]) for each, score in found.items() if score["low"] is not None
        }
        more = [dict(facts.get(kind, {}).get(name, {})) for kind in ("replicates", "details")]
        return cls(name, about["title"], about["better"], about["format"], values, intervals, *more)

    def as_json(self, name: str) -> dict[str, float | None]:
        """The score of a set."""
        low, high = self.intervals.get(name, (None, None))
        return {"value": self.values[name], "low": low, "high": high}

    @property
    def direction(self) -> str:
        return f"{self.better} is better"

    def text(self, name: str) -> str:
        """The value of a set as people read it, with its interval if there is one."""
        text = self.format.format(self.values[name])
        if name not in self.intervals:
            return text
        low, high = (self.format.format(bound) for bound in self.intervals[name])
        return f"{text} ({low} to {high})"

    def ratio(self, name: str) -> str:
        """The value of a set as a multiple of the teacher's; empty if the teacher's is zero."""
        teacher = self.values["teacher"]
        return f"{self.values[name] / teacher:.2f}" if teacher else ""


def score_facts(scores: Sequence[MetricScores], sampled: Sequence[ImageSet]) -> dict[str, Any]:
    """What the manifest of an evaluation says about the sampled sets and their scores.

    Each value is also a fact of its own, `<metric>_<set>`; `fd` of a variant is its FID as version 0.1.0 wrote it."""
    flat = {f"{metric.name}_{name}": value for metric in scores for name, value in metric.values.items()}
    fid = {metric.name: metric.values for metric in scores}.get("fid", {})
    variants = [asdict(each) | ({"fd": fid[each.name]} if fid else {}) for each in sampled]
    described = {"scores": scores_by_set(scores), "metrics": _descriptions(scores), "variants": variants}
    for name in ("replicates", "details"):
        if found := {metric.name: getattr(metric, name) for metric in scores if getattr(metric, name)}:
            described[name] = found
    return flat | described


def scores_by_set(scores: Sequence[MetricScores]) -> dict[str, dict[str, dict[str, float | None]]]:
    """{set: {metric: {value, low, high}}}; low and high are None for a metric without an interval."""
    sets = dict.fromkeys(name for metric in scores for name in metric.values)
    return {name: {m.name: m.as_json(name) for m in scores if name in m.values} for name in sets}


def _descriptions(scores: Sequence[MetricScores]) -> dict[str, dict[str, str]]:
    return {m.name: {"title": m.title, "better": m.better, "format": m.format} for m in scores}


def read_scores(facts: Mapping[str, Any]) -> list[MetricScores]:
    """The scores of an evaluation, a metric each, in the order of `evaluate.metrics`."""
    scores = _read_scores(facts)
    for each in scores:
        if not re.fullmatch(FORMAT, each.format):
            raise Refused(
                f"the scores of {each.name!r:.80} have the format {each.format!r:.80}; evaluate again"
            )
    return scores


def _read_scores(facts: Mapping[str, Any]) -> list[MetricScores]:
    if "metrics" in facts:
        return [MetricScores.from_json(name, facts) for name in facts["metrics"]]
    if "scores" in facts:
        return [MetricScores(**metric) for metric in facts["scores"]]
    values = {name.removeprefix("fid_"): value for name, value in facts.items() if name.startswith("fid_")}
    return [MetricScores.of(METRICS["fid"], {name: Score(value) for name, value in values.items()})]


def student_facts(facts: Mapping[str, Any], inputs: Mapping[str, str]) -> dict[str, Any]:
    """What a package notes of the evaluation of its student, by which a later student can be compared with it."""
    names = [name for name in ("features", "images", "images_real", "seed", "card") if name in facts]
    scores = [replace(s, **s.columns_of("student", "student")) for s in read_scores(facts)]
    noted = {name: facts[name] for name in names} | {name: inputs[name] for name in ("teacher", "shards")}
    return noted | {"scores": [asdict(metric) for metric in scores]}


def scores_by(metric: str, facts: Mapping[str, Any]) -> MetricScores:
    """The scores of an evaluation by one metric; refused if it was not computed."""
    scores = {found.name: found for found in read_scores(facts)}
    if metric not in scores:
        raise Refused(
            f"the evaluation has no {metric!r}, only {', '.join(scores)}; evaluate again with --evaluate.metrics {metric} among them"
        )
    return scores[metric]


def sampled_image_sets(facts: Mapping[str, Any]) -> list[ImageSet]:
    """The sets that an evaluation sampled and scored."""
    found = [ImageSet(v["name"], v["recipe"], v["steps"], v["calls"]) for v in facts["variants"]]
    for each in found:
        if not re.fullmatch(r"\w{1,64}", each.name):
            raise Refused(f"a set of images of the evaluation is called {each.name!r:.80}; evaluate again")
        if not (isinstance(each.steps, int) and isinstance(each.calls, int)):
            raise Refused(
                f"{each.name} of the evaluation has {each.steps!r:.40} steps and {each.calls!r:.40} network calls, which must be numbers; "
                "evaluate again"
            )
    return found


def score_table(facts: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """(head, rows) of the table of all scores, as text: a row per set of images, and for each metric its score and the score as a
    multiple of the teacher's. The first column is the title of the set; empty cells do not apply."""
    scores = read_scores(facts)
    head = ["", "steps", "network calls"]
    for metric in scores:
        head += [f"{metric.title} ({metric.direction})", "/ teacher's"]
    rows = []
    for each in [*sampled_image_sets(facts), REAL_IMAGES]:
        row = [each.title, *(str(count) if count else "" for count in (each.steps, each.calls))]
        for metric in scores:
            row += [metric.text(each.name), metric.ratio(each.name)]
        rows.append(row)
    return head, rows


def markdown_table(head: list[str], rows: list[list[str]]) -> str:
    """The table in Markdown; the first column is text, the others are numbers."""
    lines = [head, ["---", *["--:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
