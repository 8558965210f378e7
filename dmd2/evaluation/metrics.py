"""The metrics of an evaluation: one table, `METRICS`.

A row names a metric, says which direction is better, what it reads of an image and makes its states. A state is updated, batch by
batch, with what was measured of images (`dmd2.evaluation.measurements`), and gives their score against the real images. The
evaluation fills states for every row that `evaluate.metrics` names and writes title, direction and format beside the scores into its
manifest, from where gate, report, model card, KFP metrics and summary read them: none of them knows a metric by name.

A new metric is a new row. Importing this module imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol, Self

from dmd2.errors import Refused, near_miss

if TYPE_CHECKING:
    from torch import Tensor

    from dmd2.models.family import Prompt

Better = Literal["smaller", "larger"]
"""Which direction of a score is better."""


class Score(NamedTuple):
    """The value of a metric for one set of images."""

    value: float
    interval: tuple[float, float] | None = None
    """(low, high) of its confidence interval of 95 %, if the metric has one."""
    replicates: Sequence[float] = ()
    """Independent replicates around the value (`dmd2.evaluation.confidence`), by which scores of several sets are compared."""
    details: Mapping[str, float] = {}
    """Further numbers about the value, such as the same at half the number of images."""


class ImageBatch(NamedTuple):
    """What a state is updated with. The images themselves are forgotten by then."""

    prompts: Sequence[Prompt]
    """What the images were sampled for; of real images their classes or captions."""
    features: Tensor
    """float64 (B, D) on the CPU: the measurement that the metric reads."""


class MetricState(Protocol):
    """What a metric has accumulated over the images of one set, in float64."""

    def update(self, batch: ImageBatch) -> None:
        """Add a batch of images, in the order of their rows."""

    def score(self, reference: Self) -> Score:
        """The score against `reference`, the state of the held-out real images."""


@dataclass(frozen=True)
class Metric:
    """A row of the table."""

    name: str
    """Its key in the Config and in manifests."""
    title: str
    """Its name for people."""
    better: Better
    new_state: Callable[[], MetricState]
    """Makes an empty state."""
    reads: str = "features"
    """What its states are updated with: a row of the table of measurements. `features` are those of the network that
    `evaluate.features` names."""
    format: str = "{:.2f}"
    """How a value is printed, with its unit."""


def _fid() -> MetricState:
    from dmd2.evaluation.frechet import FidState

    return FidState()


def _clip() -> MetricState:
    from dmd2.evaluation.clip_score import ClipState

    return ClipState()


def _kid() -> MetricState:
    from dmd2.evaluation.kernel import KernelState

    return KernelState()


def _cmmd() -> MetricState:
    from dmd2.evaluation.image_embeddings import CMMD_SCALE, gaussian_kernel
    from dmd2.evaluation.kernel import KernelState

    return KernelState(gaussian_kernel, CMMD_SCALE)


def _inception_score() -> MetricState:
    from dmd2.evaluation.inception_score import InceptionScoreState

    return InceptionScoreState()


def _class_fid() -> MetricState:
    from dmd2.evaluation.per_class import PerClassState

    return PerClassState()


def _neighbours(name: str) -> MetricState:
    from dmd2.evaluation import neighbours

    return neighbours.NeighbourState(getattr(neighbours, name))


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("fid", "FID", "smaller", _fid),
        Metric("clip", "CLIP score", "larger", _clip, reads="clip", format="{:.4f}"),
        Metric("kid", "KID", "smaller", _kid, format="{:.5f}"),
        Metric("precision", "Precision", "larger", partial(_neighbours, "precision"), format="{:.3f}"),
        Metric("recall", "Recall", "larger", partial(_neighbours, "recall"), format="{:.3f}"),
        Metric("density", "Density", "larger", partial(_neighbours, "density"), format="{:.3f}"),
        Metric("coverage", "Coverage", "larger", partial(_neighbours, "coverage"), format="{:.3f}"),
        Metric("patch_fid", "Patch FID", "smaller", _fid, reads="patches"),
        Metric("inception_score", "Inception Score", "larger", _inception_score, reads="classes"),
        Metric("class_fid", "Per-class FID", "smaller", _class_fid),
        Metric("cmmd", "CMMD", "smaller", _cmmd, reads="clip_images", format="{:.3f}"),
        Metric("dinov2_fd", "FD of DINOv2", "smaller", _fid, reads="dinov2"),
    )
}  # fmt: skip
"""{name: row}."""


def select(names: Iterable[str]) -> list[Metric]:
    """The rows with these names; unknown names are refused."""
    names = list(names)
    if unknown := [name for name in names if name not in METRICS]:
        raise Refused(
            f"evaluate.metrics has {unknown[0]!r}, which is no metric; {near_miss(unknown[0], METRICS)}"
        )
    return [METRICS[name] for name in names]
