"""The normal distribution with diagonal covariance."""

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Normal(NamedTuple):
    """N(mean, diag std²) of vectors [B, D] or feature maps [B, D, h, w]; fp32, so that what is computed from it keeps
    its digits, inside autocast or not."""

    mean: Tensor
    log_std: Tensor

    def draw(self, noise: Tensor) -> Tensor:
        """mean + std ⊙ noise, noise from N(0, I): the gradient passes to mean and std (Kingma, Welling 2014, 2.4)."""
        return self.mean + self.log_std.exp() * noise

    def log_density(self, z: Tensor) -> Tensor:
        """Of each latent in nats, of z's shape."""
        squares = ((z - self.mean) * (-self.log_std).exp()).square()
        return -(squares / 2 + self.log_std + math.log(2 * math.pi) / 2)


def normal(output: Tensor) -> Normal:
    """Of a network's output of any float type, [B, 2 D, …]: means, then logarithms of standard deviations."""
    return Normal(*output.float().chunk(2, dim=1))


def standard(like: Tensor) -> Normal:
    """N(0, I) of this shape."""
    zero = torch.zeros_like(like)
    return Normal(zero, zero)


def kl(q: Normal, p: Normal) -> Tensor:
    """KL(q‖p) of each latent in nats, of the distributions' shape (Kingma, Welling 2014, appendix B, where p is
    N(0, I)): (d² + r² − 1)/2 − log r, with r = std_q / std_p and d the means' distance in std_p."""
    log_ratio = q.log_std - p.log_std
    distance = (q.mean - p.mean) * (-p.log_std).exp()
    return (distance.square() + torch.expm1(2 * log_ratio)) / 2 - log_ratio
