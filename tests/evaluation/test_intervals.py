"""Intervals of scores and the bias of finite sets, on distributions whose distance is known."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dmd2.evaluation import influence
from dmd2.evaluation.confidence import GROUPS
from dmd2.evaluation.frechet import FidState, Gaussian, frechet_distance
from dmd2.evaluation.influence import SampledRows, group_means, groups_of_rows, half_of_rows
from dmd2.evaluation.kernel import KernelState, cubic
from dmd2.evaluation.metrics import ImageBatch, Score

State = FidState | KernelState


class TwoGaussians:
    """Generated and real features with known mean and covariance."""

    def __init__(self, features: int) -> None:
        self.draw = torch.Generator().manual_seed(features)
        scale = torch.arange(1, features + 1).double() ** -0.5
        first, second = (self._normal(features, features) / features**0.5 * scale for _ in range(2))
        self.maps = (first, first + 0.3 * second)
        self.mean = 0.05 * self._normal(features)
        zero = torch.zeros(features).double()
        fake, real = (Gaussian(m, a.T @ a) for m, a in zip((self.mean, zero), self.maps, strict=True))
        self.distance = frechet_distance(fake, real)

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.draw, dtype=torch.float64)

    def fake(self, count: int) -> Tensor:
        return self._normal(count, len(self.mean)) @ self.maps[0] + self.mean

    def real(self, count: int) -> Tensor:
        return self._normal(count, len(self.mean)) @ self.maps[1]


def score(new: Callable[[], State], fake: Tensor, real: Tensor) -> Score:
    states = new(), new()
    for state, features in zip(states, (fake, real), strict=True):
        for part in features.split(64):
            state.update(ImageBatch([], part))
    return states[0].score(states[1])  # type: ignore[arg-type]


def count_covered(features: int, fakes: int, reals: int, repetitions: int) -> tuple[int, int, float]:
    """(repetitions whose interval covers the known distance, those whose interval around FID_infinity does, mean of FID_infinity
    as a multiple of the known distance)."""
    known, covered, alone, sum_infinity = TwoGaussians(features), 0, 0, 0.0
    for _ in range(repetitions):
        found = score(FidState, known.fake(fakes), known.real(reals))
        assert found.interval
        covered += found.interval[0] <= known.distance <= found.interval[1]
        infinity, width = found.details["infinity"], found.interval[1] - found.value
        alone += abs(infinity - known.distance) <= width
        sum_infinity += infinity
    return covered, alone, sum_infinity / repetitions / known.distance


@pytest.mark.slow
@pytest.mark.parametrize("features", [16, 64])
def test_the_interval_of_fid_covers_the_known_distance(features: int) -> None:
    covered, alone, ratio = count_covered(features, 2000, 1000, 100)
    assert covered >= 90
    assert alone >= 85
    assert ratio == pytest.approx(1, abs=0.03)


def test_the_interval_of_fid_covers_the_known_distance_in_most_of_a_few_repetitions() -> None:
    covered, _, ratio = count_covered(8, 800, 600, 20)
    assert covered >= 17
    assert ratio == pytest.approx(1, abs=0.2)


def test_replicates_are_the_derivative_of_the_distance() -> None:
    """A replicate is the distance of sets in which one group of rows weighs more, to first order."""
    known = TwoGaussians(6)
    fake, real = known.fake(400), known.real(300)
    found = score(FidState, fake, real)
    step = 1e-4

    def weighted(x: Tensor, group: int, by: float) -> Gaussian:
        weight = 1 + by * GROUPS * (groups_of_rows(torch.arange(len(x))) == group).double()
        weight = weight / weight.sum()
        mean = weight @ x
        centred = x - mean
        unbiased = len(x) / (len(x) - 1)
        return Gaussian(mean, unbiased * (centred * weight[:, None]).T @ centred)

    for group in range(0, GROUPS, 7):
        moved = [
            frechet_distance(weighted(fake, group, by), weighted(real, group, by)) for by in (step, -step)
        ]
        slope = (moved[0] - moved[1]) / (2 * step)
        assert found.replicates[group] - found.value == pytest.approx(
            slope, rel=0.01
        )  # n - 1 in the covariance


def test_fewer_images_than_features_have_the_interval_of_their_mean() -> None:
    known = TwoGaussians(60)
    found = [score(FidState, known.fake(40), known.real(50)) for _ in range(20)]
    assert all(each.details["infinity"] < each.value < each.details["half"] for each in found)
    mean = sum(each.value for each in found) / len(found)
    assert sum(each.interval[0] <= mean <= each.interval[1] for each in found if each.interval) >= 17


def test_the_kernel_distance_is_unbiased_and_its_interval_covers_the_truth() -> None:
    known = TwoGaussians(4)
    many = [known.fake(3000), known.real(3000)]
    truth = score(KernelState, *many).value
    found = [score(KernelState, known.fake(60), known.real(60)) for _ in range(100)]
    error = torch.tensor([each.value for each in found]).std().item() / len(found) ** 0.5
    assert sum(each.value for each in found) / len(found) == pytest.approx(truth, abs=3 * error)
    covered = sum(each.interval[0] <= truth <= each.interval[1] for each in found if each.interval)
    assert covered >= 88
    assert cubic(torch.ones(1, 2), torch.ones(1, 2)).item() == 8


def test_a_sample_of_rows_does_not_depend_on_the_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(influence, "LARGEST_SAMPLE", 50)
    features = torch.randn(333, 3, generator=torch.Generator().manual_seed(0)).double()
    samples = []
    for size in (1, 64, 333):
        rows = SampledRows()
        for part in features.split(size):
            rows.add(part)
        samples.append(rows.sample())
        assert len(samples[-1][0]) == 50
    for numbers, kept in samples[1:]:
        assert torch.equal(numbers, samples[0][0])
        assert torch.equal(kept, features[numbers])
    found = group_means(features[:, 0], torch.arange(333), 333)
    assert float(found.mean()) == pytest.approx(0, abs=1e-12)


def test_groups_and_halves_of_rows_are_even_whatever_repeats() -> None:
    for period in (1, 2, 10, GROUPS, 1000):
        rows = torch.arange(0, 20_000 * period, period)
        counts = groups_of_rows(rows).bincount(minlength=GROUPS)
        assert 850 < int(counts.min()) <= int(counts.max()) < 1150
        assert 0.48 < float(half_of_rows(rows).double().mean()) < 0.52
