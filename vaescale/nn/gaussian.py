"""The normal distribution with diagonal covariance."""

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Normal(NamedTuple):
    """N(mean, diag std²) over vectors [B, D] or feature maps [B, D, h, w]. Both tensors are fp32 for accuracy, even
    inside autocast."""

    mean: Tensor
    log_std: Tensor

    def draw(self, noise: Tensor) -> Tensor:
        """Returns mean + std ⊙ noise, with noise from N(0, I), differentiable in mean and std (Kingma, Welling 2014,
        2.4)."""
        return self.mean + self.log_std.exp() * noise

    def log_density(self, z: Tensor) -> Tensor:
        """Returns the log-density of each latent in nats, in the shape of z."""
        squares = ((z - self.mean) * (-self.log_std).exp()).square()
        return -(squares / 2 + self.log_std + math.log(2 * math.pi) / 2)


def normal(output: Tensor) -> Normal:
    """Splits a network's output of any float type, [B, 2 D, …], into means and log standard deviations."""
    return Normal(*output.float().chunk(2, dim=1))


def standard(like: Tensor) -> Normal:
    """Returns N(0, I) in the shape of `like`."""
    zero = torch.zeros_like(like)
    return Normal(zero, zero)


def kl(q: Normal, p: Normal) -> Tensor:
    """Returns KL(q‖p) of each latent in nats, in the shape of q and p: (d² + r² − 1)/2 − log r, with r = std_q / std_p
    and d the distance of the means in units of std_p (Kingma, Welling 2014, appendix B, where p is N(0, I))."""
    log_ratio = q.log_std - p.log_std
    distance = (q.mean - p.mean) * (-p.log_std).exp()
    return (distance.square() + torch.expm1(2 * log_ratio)) / 2 - log_ratio
