"""The Frechet distance: known answers, clean-fid's own function, and sets that are seen in parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cleanfid.fid
import numpy as np
import pytest
import torch

from dmd2.evaluation import frechet
from dmd2.evaluation.frechet import FrechetState, Gaussian, frechet_distance
from dmd2.evaluation.metrics import ImageBatch

Moments = tuple[np.ndarray, np.ndarray]


def state_of(*parts: np.ndarray) -> FrechetState:
    """The state of features that arrive in these parts, each (N, D)."""
    state = FrechetState()
    for part in parts:
        state.update(ImageBatch([0] * len(part), torch.from_numpy(part)))
    return state


def fid(a: np.ndarray, b: np.ndarray) -> float:
    return state_of(a).score(state_of(b)).value


@pytest.fixture
def cleanfid_distance(monkeypatch: pytest.MonkeyPatch) -> Callable[[np.ndarray, np.ndarray], float]:
    """clean-fid's distance of two sets of features. It calls `sqrtm` with an argument that scipy 1.18 removes."""

    original: Callable[[np.ndarray], np.ndarray] = cleanfid.fid.linalg.sqrtm

    def sqrtm(matrix: np.ndarray, disp: bool = True) -> Any:
        root = original(matrix)
        return root if disp else (root, None)

    monkeypatch.setattr(cleanfid.fid, "linalg", type("linalg", (), {"sqrtm": staticmethod(sqrtm)}))

    def distance(a: np.ndarray, b: np.ndarray) -> float:
        moments = [m for x in (a, b) for m in (x.mean(axis=0), np.cov(x, rowvar=False))]
        return float(cleanfid.fid.frechet_distance(*moments))

    return distance


def features(count: int, size: int, condition: float, seed: int) -> np.ndarray:
    """Gaussian features whose covariance has this condition number, in a random basis, with a random mean."""
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.normal(size=(size, size)))[0]
    scales = np.geomspace(1, condition**-0.5, size)
    return (rng.normal(size=(count, size)) * scales + rng.normal(size=size)) @ basis


def test_equal_sets_have_distance_zero() -> None:
    same = np.random.default_rng(0).normal(size=(500, 16))
    assert fid(same, same) == pytest.approx(0, abs=1e-6)


def test_distance_of_gaussians_has_its_closed_form() -> None:
    """|m1 - m2|^2 + sum (s1 - s2)^2 for diagonal covariances, made exact by whitening the samples."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(400, 6))
    white = (x - x.mean(0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(x, rowvar=False))).T
    s1, s2 = rng.uniform(0.5, 2, 6), rng.uniform(0.5, 2, 6)
    m1, m2 = rng.normal(size=6), rng.normal(size=6)
    expected = ((m1 - m2) ** 2).sum() + ((s1 - s2) ** 2).sum()
    assert fid(white * s1 + m1, white * s2 + m2) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("condition", [1, 1e4, 1e8])
def test_distance_is_that_of_clean_fid_also_for_nearly_singular_covariances(
    condition: float, cleanfid_distance: Callable[[np.ndarray, np.ndarray], float]
) -> None:
    a, b = features(300, 40, condition, 0), features(200, 40, condition, 1)
    assert fid(a, b) == pytest.approx(cleanfid_distance(a, b), rel=1e-9)


def test_distance_is_that_of_clean_fid_for_fewer_images_than_features(
    cleanfid_distance: Callable[[np.ndarray, np.ndarray], float],
) -> None:
    """To 1e-6: clean-fid takes the square root of a singular product, whose zero eigenvalues it finds as roots of rounding errors."""
    a, b = features(24, 64, 1, 0), features(24, 64, 1, 1)
    assert fid(a, b) == pytest.approx(cleanfid_distance(a, b), rel=1e-6)


@pytest.mark.parametrize("count", [1, 3, 7])
def test_any_split_of_a_set_gives_the_same_distance(count: int) -> None:
    a, b = features(100, 12, 1e4, 0), features(80, 12, 1e4, 1)
    order = np.random.default_rng(count).permutation(count)
    parts = np.array_split(a, count)
    for state in (state_of(*(parts[index] for index in order)), state_of(*parts)):
        assert state.score(state_of(b)).value == pytest.approx(fid(a, b), rel=1e-9)


def test_an_empty_batch_changes_nothing() -> None:
    a, b = features(50, 5, 1, 0), features(40, 5, 1, 1)
    assert state_of(a[:0], a, a[:0]).score(state_of(b)).value == fid(a, b)


def test_a_reference_that_grows_after_a_score_is_fitted_anew() -> None:
    a, b, c = (features(50, 5, 1, seed) for seed in range(3))
    reference = state_of(b)
    assert state_of(a).score(reference).value == fid(a, b)
    assert state_of(a).score(reference).value == fid(a, b)
    reference.update(ImageBatch((), torch.from_numpy(c)))
    assert state_of(a).score(reference).value == pytest.approx(fid(a, np.concatenate([b, c])), rel=1e-9)


def test_of_many_features_the_root_is_replaced_by_a_factor_that_is_found_faster(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    draw = torch.Generator().manual_seed(0)
    rows = [torch.randn(count, 12, generator=draw).double() for count in (50, 40, 6)]
    a, full, singular = (Gaussian(each.mean(0), each.T.cov()) for each in rows)
    exact = [frechet_distance(a, Gaussian(b.mean, b.covariance)) for b in (full, singular)]
    monkeypatch.setattr(frechet, "MANY", 12)
    assert torch.equal(full.factor, torch.linalg.cholesky(full.covariance))
    torch.testing.assert_close(singular.factor @ singular.factor.T, singular.covariance)
    assert [frechet_distance(a, b) for b in (full, singular)] == pytest.approx(exact, rel=1e-9)


@pytest.mark.parametrize("condition", [1, 1e8])
def test_few_images_span_few_directions_and_the_others_are_left_out(condition: float) -> None:
    """The distance is compared with one from the images themselves: tr (C_a C_b)^1/2 is the sum of the singular values of A B^T."""
    rows = [torch.from_numpy(features(count, 200, condition, count)) for count in (24, 18)]
    one, two = (Gaussian(each.mean(0), each.T.cov(), len(each) - 1) for each in rows)
    assert two.root.shape == (200, 17)
    a, b = ((each - each.mean(0)) / (len(each) - 1) ** 0.5 for each in rows)
    cross = torch.linalg.svdvals(a @ b.T).sum()
    exact = (one.mean - two.mean).square().sum() + a.square().sum() + b.square().sum() - 2 * cross
    assert frechet_distance(one, two) == pytest.approx(float(exact), rel=1e-12)
    torch.testing.assert_close(two.root @ two.root.T, two.covariance)
    torch.testing.assert_close(
        two.inverse_root @ two.inverse_root.T, torch.linalg.pinv(two.covariance, rtol=1e-12)
    )
