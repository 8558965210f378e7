"""The losses of DMD2 as functions of tensors.

No function here calls a network, draws a random number or reads a configuration. Samples x, x0 are (B, C, H, W) in float32,
in the space of the family; logits are (B, ...), positive where the discriminator takes a sample for real; every loss is a
scalar, a mean over all elements.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def distribution_matching(x: Tensor, x0_teacher: Tensor, x0_critic: Tensor) -> Tensor:
    """The distribution-matching loss of samples x, whose gradient is the difference of the two scores.

    DMD (Yin et al. 2024, arXiv 2311.18828), eq. 7 and 8: the gradient of the result with respect to x is
    (x0_critic - x0_teacher) / w / x.numel(), where w (B, 1, 1, 1) = mean |x - x0_teacher| of each sample.
    """
    weight = (x - x0_teacher).abs().mean(dim=(1, 2, 3), keepdim=True)
    # Only a distance of zero is replaced: a critic that diverged must stay visible as nan or inf.
    gradient = (x0_critic - x0_teacher) / weight.clamp_min(torch.finfo(x.dtype).tiny)
    return 0.5 * F.mse_loss(x, (x - gradient).detach())


def denoising(out: Tensor, target: Tensor) -> Tensor:
    """The mean squared error of a network output (B, C, H, W), in the parametrization of the family (eps, v, x0, flow, EDM)."""
    return F.mse_loss(out, target)


def gan_student(fake_logits: Tensor) -> Tensor:
    """The non-saturating GAN loss of the student: -log sigmoid(logits) (DMD2, eq. 4)."""
    return F.softplus(-fake_logits).mean()


def gan_critic(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """The GAN loss of the discriminator (DMD2, eq. 4): `gan_fake` + `gan_real`."""
    return gan_fake(fake_logits) + gan_real(real_logits)


def gan_fake(logits: Tensor) -> Tensor:
    """The discriminator's loss on fake samples: -log(1 - sigmoid(logits))."""
    return F.softplus(logits).mean()


def gan_real(logits: Tensor) -> Tensor:
    """The discriminator's loss on real samples: -log sigmoid(logits)."""
    return F.softplus(-logits).mean()
