"""The normal distribution with diagonal covariance."""

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Normal(NamedTuple):
    """N(mean, diag std²); fp32, so that what is computed from it keeps its digits, inside autocast or not."""

    mean: Tensor  # fp32 [B, D]
    log_std: Tensor  # fp32 [B, D]

    def draw(self, noise: Tensor) -> Tensor:
        """mean + std ⊙ noise, noise from N(0, I): the gradient passes to mean and std (Kingma, Welling 2014, 2.4)."""
        return self.mean + self.log_std.exp() * noise

    def log_prob(self, z: Tensor) -> Tensor:
        """Log-density in nats. [B, D] → [B]."""
        squares = ((z - self.mean) * (-self.log_std).exp()).square()
        return -(squares / 2 + self.log_std + math.log(2 * math.pi) / 2).sum(1)

    def rates(self) -> Tensor:
        """KL to N(0, 1) of each latent in nats, fp32 [B, D] (Kingma, Welling 2014, appendix B)."""
        return (self.mean.square() + torch.expm1(2 * self.log_std)) / 2 - self.log_std


def normal(output: Tensor) -> Normal:
    """Of a network's output of any float type, [B, 2 D]: means, then logarithms of standard deviations."""
    return Normal(*output.float().chunk(2, dim=1))


def standard_log_prob(z: Tensor) -> Tensor:
    """Log-density of N(0, I) in nats. [B, D] → [B]."""
    return -(z.square() + math.log(2 * math.pi)).sum(1) / 2
