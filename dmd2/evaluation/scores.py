"""The scores in the manifest of an evaluation, as gate, report, model card, KFP metrics and summary read them.

The manifest holds title, direction and format of each metric beside its values, so a reader needs neither the table of metrics nor
the code that computed them. Evaluations of version 0.1.0 know only FID; they read the same way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from dmd2.errors import Refused
from dmd2.evaluation.metrics import METRICS, Better, Metric, Score

REAL = "real"
"""Name of the set of real training images, whose score is what a perfect student would reach."""


@dataclass(frozen=True)
class ImageSet:
    """Images that were scored together, and how they were made."""

    name: str
    """`student`, `teacher`, `teacher_1step`, ...; `real`."""
    recipe: str
    """The recipe of a student, or `teacher`; empty for real images."""
    steps: int
    """Sampler steps; 0 for real images."""
    calls: int
    """Network calls per image; 0 for real images."""

    @property
    def title(self) -> str:
        """`teacher in 4 steps`."""
        if self.name == REAL:
            return "real training images"
        who, *fewer = self.name.split("_")
        return f"{who} in {self.steps} step{'s' if self.steps > 1 else ''}" if fewer else who


REAL_IMAGES = ImageSet(REAL, "", 0, 0)


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

    @classmethod
    def of(cls, metric: Metric, scores: Mapping[str, Score]) -> MetricScores:
        values = {name: score.value for name, score in scores.items()}
        intervals = {name: score.interval for name, score in scores.items() if score.interval}
        return cls(metric.name, metric.title, metric.better, metric.format, values, intervals)

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
    return flat | {"scores": [asdict(metric) for metric in scores], "variants": variants}


def read_scores(facts: Mapping[str, Any]) -> list[MetricScores]:
    """The scores of an evaluation, a metric each, in the order of `evaluate.metrics`."""
    if "scores" in facts:
        return [MetricScores(**metric) for metric in facts["scores"]]
    values = {name.removeprefix("fid_"): value for name, value in facts.items() if name.startswith("fid_")}
    return [MetricScores.of(METRICS["fid"], {name: Score(value) for name, value in values.items()})]


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
    return [ImageSet(v["name"], v["recipe"], v["steps"], v["calls"]) for v in facts["variants"]]


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
