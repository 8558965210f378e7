"""The process: what it says must be what the papers say."""

from __future__ import annotations

import pytest
import torch

from dmd2.diffusion import (
    Diffusion,
    edm_preconditioning,
    eps_prediction,
    flow_prediction,
    flow_schedule,
    karras_schedule,
    scaled_linear_schedule,
    v_prediction,
    x0_prediction,
)

PROCESSES = {
    "edm": Diffusion(karras_schedule(), edm_preconditioning(0.5)),
    "eps": Diffusion(scaled_linear_schedule(), eps_prediction),
    "v": Diffusion(scaled_linear_schedule(), v_prediction),
    "x0": Diffusion(scaled_linear_schedule(), x0_prediction),
    "flow": Diffusion(flow_schedule(shift=3.0), flow_prediction),
}
LEVELS = torch.tensor([0, 20, 249, 399, 499, 749, 980, 999])


@pytest.fixture
def x0() -> torch.Tensor:
    return torch.randn(len(LEVELS), 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("name", PROCESSES)
def test_target_is_the_inverse_of_to_x0(name: str, x0: torch.Tensor) -> None:
    diffusion = PROCESSES[name]
    x_t = diffusion.add_noise(x0, torch.randn_like(x0), LEVELS)
    torch.testing.assert_close(
        diffusion.to_x0(diffusion.target(x0, x_t, LEVELS), x_t, LEVELS), x0, rtol=0, atol=1e-9
    )


@pytest.mark.parametrize(
    ("name", "formula"),
    [
        ("eps", lambda alpha, sigma, x0, eps: eps),
        ("v", lambda alpha, sigma, x0, eps: alpha * eps - sigma * x0),
        ("x0", lambda alpha, sigma, x0, eps: x0),
        ("flow", lambda alpha, sigma, x0, eps: eps - x0),
    ],
)
def test_target_is_the_quantity_that_the_paper_predicts(name: str, formula, x0: torch.Tensor) -> None:  # type: ignore[no-untyped-def]
    diffusion = PROCESSES[name]
    eps = torch.randn_like(x0)
    alpha, sigma = (
        table[LEVELS].reshape(-1, 1, 1, 1) for table in (diffusion.schedule.alpha, diffusion.schedule.sigma)
    )
    x_t = diffusion.add_noise(x0, eps, LEVELS)
    torch.testing.assert_close(
        diffusion.target(x0, x_t, LEVELS), formula(alpha, sigma, x0, eps), rtol=1e-6, atol=1e-9
    )


def test_scaled_linear_alpha_bar_has_the_published_values() -> None:
    timesteps = torch.tensor([0, 20, 249, 399, 499, 749, 980, 999])
    published = torch.tensor([0.99915, 0.98131, 0.67543, 0.42609, 0.27767, 0.05662, 0.00584, 0.00466])
    alpha_bar = scaled_linear_schedule().alpha[timesteps] ** 2
    torch.testing.assert_close(alpha_bar.float(), published, rtol=0, atol=5.1e-6)


def test_karras_sigmas_have_the_published_values() -> None:
    sigma = karras_schedule().sigma
    for timestep, value in {0: 0.002, 20: 0.0032, 500: 2.53, 980: 72.05, 999: 80.0}.items():
        assert sigma[timestep].item() == pytest.approx(value, rel=2e-2 if timestep == 20 else 2e-3)
    assert (sigma.diff() > 0).all()


def test_edm_preconditioning_is_table_1_of_karras() -> None:
    diffusion, data = PROCESSES["edm"], 0.5
    sigma = diffusion.schedule.sigma
    torch.testing.assert_close(diffusion.coefficients.skip, data**2 / (sigma**2 + data**2))
    torch.testing.assert_close(diffusion.coefficients.scale, sigma * data / (sigma**2 + data**2).sqrt())
    torch.testing.assert_close(diffusion.coefficients.gain, 1 / (sigma**2 + data**2).sqrt())
    torch.testing.assert_close(diffusion.schedule.time, sigma.log() / 4)


def test_unit_weight_on_the_output_is_edm_weight_on_x0(x0: torch.Tensor) -> None:
    """mse(out, target) == lambda(sigma) (D(x) - x0)^2 with lambda = sigma^-2 + sigma_data^-2."""
    diffusion = PROCESSES["edm"]
    sigma = diffusion.schedule.sigma[LEVELS].reshape(-1, 1, 1, 1)
    x_t = diffusion.add_noise(x0, torch.randn_like(x0), LEVELS)
    out = torch.randn_like(x0)
    ours = (out - diffusion.target(x0, x_t, LEVELS)) ** 2
    weight = sigma**-2 + 0.5**-2
    torch.testing.assert_close(
        ours, weight * (diffusion.to_x0(out, x_t, LEVELS) - x0) ** 2, rtol=1e-7, atol=1e-9
    )
