"""The objectives of DMD2, as functions of tensors.

No function here calls a network, draws a random number or reads a configuration. Samples are
(B, C, H, W) in float32; logits are (B, ...); every loss is a scalar.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def distribution_matching(x: Tensor, x0_teacher: Tensor, x0_critic: Tensor) -> Tensor:
    """Pull `x` along the difference of the two scores (DMD, Yin et al. 2024, eq. 7 and 8).

    The gradient of the result with respect to x is (x0_critic - x0_teacher) / w / x.numel(),
    w being the mean absolute distance of each x to its teacher estimate.
    """
    weight = (x - x0_teacher).abs().mean(dim=(1, 2, 3), keepdim=True)
    # Only a distance of zero is caught: a critic that diverged must be seen, not turned into zeros.
    gradient = (x0_critic - x0_teacher) / weight.clamp_min(torch.finfo(x.dtype).tiny)
    return 0.5 * F.mse_loss(x, (x - gradient).detach())


def denoising(out: Tensor, target: Tensor) -> Tensor:
    """Mean squared error in the network's own output space."""
    return F.mse_loss(out, target)


def gan_student(fake_logits: Tensor) -> Tensor:
    """Non-saturating loss: the student wants its samples to pass for real (DMD2, eq. 4)."""
    return F.softplus(-fake_logits).mean()


def gan_critic(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """The critic wants to tell real from generated (DMD2, eq. 4)."""
    return gan_fake(fake_logits) + gan_real(real_logits)


def gan_fake(logits: Tensor) -> Tensor:
    """The share of the generated samples in the critic's loss."""
    return F.softplus(logits).mean()


def gan_real(logits: Tensor) -> Tensor:
    """The share of the real samples in the critic's loss."""
    return F.softplus(-logits).mean()
