from __future__ import annotations

import torch
import torch.nn.functional as F

from dmd2.training import losses


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def test_distribution_matching_gradient_is_the_normalised_difference_over_numel() -> None:
    torch.manual_seed(0)
    x, teacher, critic = draw(4, 3, 5, 5).requires_grad_(), draw(4, 3, 5, 5), draw(4, 3, 5, 5)
    (gradient,) = torch.autograd.grad(losses.distribution_matching(x, teacher, critic), x)
    weight = (x - teacher).abs().mean(dim=(1, 2, 3), keepdim=True)
    torch.testing.assert_close(gradient, ((critic - teacher) / weight / x.numel()).detach())


def test_distribution_matching_has_one_normaliser_per_sample() -> None:
    torch.manual_seed(0)
    x, teacher, critic = draw(2, 1, 4, 4).requires_grad_(), draw(2, 1, 4, 4), draw(2, 1, 4, 4)
    (both,) = torch.autograd.grad(losses.distribution_matching(x, teacher, critic), x)
    (alone,) = torch.autograd.grad(losses.distribution_matching(x[:1], teacher[:1], critic[:1]), x)
    torch.testing.assert_close(both[0] * 2, alone[0])


def test_equal_scores_give_no_gradient_even_at_the_teachers_estimate() -> None:
    x = draw(2, 1, 4, 4).requires_grad_()
    estimate = x.detach().clone()
    (gradient,) = torch.autograd.grad(losses.distribution_matching(x, estimate, estimate), x)
    assert (gradient == 0).all()


def test_a_diverged_critic_is_seen() -> None:
    x = draw(2, 1, 4, 4).requires_grad_()
    critic = torch.full_like(x, float("nan")).detach()
    assert losses.distribution_matching(x, draw(2, 1, 4, 4), critic).isnan()


def test_gan_losses_are_non_saturating() -> None:
    real, fake = draw(8), draw(8)
    torch.testing.assert_close(losses.gan_student(fake), -F.logsigmoid(fake).mean())
    torch.testing.assert_close(
        losses.gan_critic(real, fake), -F.logsigmoid(real).mean() - F.logsigmoid(-fake).mean()
    )


def test_denoising_is_the_mean_squared_error() -> None:
    out, target = draw(2, 1, 4, 4), draw(2, 1, 4, 4)
    torch.testing.assert_close(losses.denoising(out, target), ((out - target) ** 2).mean())
