"""Gaussian diffusion: Kingma, Salimans, Poole, Ho 2021, "Variational diffusion models" (VDM).

    q(z_t|x) = N(α_t x, σ_t² I),   α² = sigmoid(−γ),   σ² = sigmoid(γ)

−γ is the logarithm of the signal-to-noise ratio α²/σ². From t = 1 to 0 it grows, and γ falls, linearly, from the
highest γ, where z_1 is almost pure noise, to the lowest, where z_0 is almost x. A network predicts the noise ε of
z = α x + σ ε, and with it the clean x. Instead of the noise it may predict the velocity v = ε − x of flow matching
(Lipman et al. 2023; Esser et al. 2024, "Scaling rectified flow transformers"), whose path (1 − s) x + s ε is z scaled
by 1 / (α + σ), with s = σ / (α + σ) = sigmoid(γ/2).

Shapes: x, z, ε: [B, D, h, w]; γ: [B], fp64, so that differences between close γ are right.
"""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from .gaussian import Normal

LARGEST = 20.0  # |γ| beyond which a network sees no difference
PACE = 50.0  # the highest frequency that a network sees of γ


class Prediction(NamedTuple):
    """What a network says of z: z = α x + σ ε."""

    x: Tensor
    noise: Tensor


Predict = Callable[[Tensor, Tensor], Prediction]  # (z, γ) → x and ε
Noise = Callable[[int], Tensor]  # (number of the draw) → N(0, I) in the shape of z
Sampler = Literal["ancestral", "ddim", "heun"]


def alpha(gamma: Tensor, like: Tensor) -> Tensor:
    """Returns α, in a shape and type that broadcasts with `like`."""
    return torch.sigmoid(-gamma).sqrt().to(like.dtype)[:, None, None, None]


def sigma(gamma: Tensor, like: Tensor) -> Tensor:
    """Returns σ, as `alpha`."""
    return torch.sigmoid(gamma).sqrt().to(like.dtype)[:, None, None, None]


def noised(x: Tensor, noise: Tensor, gamma: Tensor) -> Tensor:
    """Returns z ~ q(z|x)."""
    return alpha(gamma, x) * x + sigma(gamma, x) * noise


def from_noise(z: Tensor, noise: Tensor, gamma: Tensor) -> Prediction:
    """From a prediction of the noise."""
    return Prediction((z - sigma(gamma, z) * noise) / alpha(gamma, z), noise)


def from_velocity(z: Tensor, velocity: Tensor, gamma: Tensor) -> Prediction:
    """From a prediction of the velocity ε − x."""
    scaled, share = flow(z, gamma)
    return Prediction(scaled - share * velocity, scaled + (1 - share) * velocity)


def flow(z: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the point (1 − s) x + s ε on the path of flow matching, and s."""
    total = alpha(gamma, z) + sigma(gamma, z)
    return z / total, sigma(gamma, z) / total


def prior_kl(x: Tensor, gamma: Tensor) -> Tensor:
    """Returns KL(q(z|x) ‖ N(0, I)) in nats, [B], for one γ []."""
    size, squares = x[0].numel(), _squares(x)
    # log σ² + 1 − σ² cancels where σ² is almost 1, so it is computed in the type of γ
    constant = nn.functional.logsigmoid(gamma) + torch.sigmoid(-gamma)
    return (torch.sigmoid(-gamma) * squares - size * constant).to(x.dtype) / 2


def step_kl(noise: Tensor, predicted: Tensor, down: Tensor) -> Tensor:
    """Returns KL(q(z_s|z_t, x) ‖ p(z_s|z_t)) in nats, [B], of the step from γ_t to γ_s = γ_t − `down`: (e^down − 1) / 2
    · ‖ε − ε̂‖² (VDM, equation 14)."""
    return torch.expm1(down).to(noise.dtype) / 2 * _squares(noise - predicted)


def density(noise: Tensor, gamma: Tensor) -> Tensor:
    """Returns −log p(x|z_0) in nats, [B], of continuous x under N(z_0 / α_0, σ_0² / α_0² I), for one γ [] and the noise
    of z_0."""
    return noise[0].numel() * (math.log(2 * math.pi) + gamma).to(noise.dtype) / 2 + _squares(noise) / 2


def entropy(log_std: Tensor) -> Tensor:
    """Returns the entropy of a normal distribution in nats, [B]."""
    return (log_std + (1 + math.log(2 * math.pi)) / 2).flatten(1).sum(1)


def less_noisy(z: Tensor, x: Tensor, gamma: Tensor, below: Tensor) -> Normal:
    """Returns q(z_s|z_t, x) for γ_s = `below`, the distribution of a less noisy z (VDM, appendix A.4); with a
    prediction of x it is p(z_s|z_t)."""
    c = -torch.expm1(below - gamma)[:, None, None, None].to(z.dtype)
    mean = alpha(below, z) * ((1 - c) * z / alpha(gamma, z) + c * x)
    log_std = (sigma(below, z) * c.sqrt()).log()
    return Normal(mean, log_std.expand_as(mean))


def grid(lowest: Tensor, highest: Tensor, steps: int, straight: bool) -> Tensor:
    """Returns the γ of a sampler's points, fp64 [steps + 1], from the highest to the lowest, fp64 [] each.

    straight: evenly in s, the position on the path of flow matching; else evenly in γ."""
    share = torch.linspace(0, 1, steps + 1, dtype=torch.float64, device=lowest.device)
    if not straight:
        return torch.lerp(highest, lowest, share)
    return 2 * torch.logit(torch.lerp(torch.sigmoid(highest / 2), torch.sigmoid(lowest / 2), share))


def sampled(predict: Predict, noise: Noise, gammas: Tensor, sampler: Sampler) -> Tensor:
    """Returns x, drawn from noise 0 along the grid.

    - ancestral: draws from p(z_s|z_t), each step with the noise of its number.
    - ddim: the deterministic steps of Song, Meng, Ermon 2021, "Denoising diffusion implicit models", equal to Euler's
      method for the flow's velocity.
    - heun: Heun's method of second order for it, with two predictions a step.
    """
    z = noise(0)
    for number in range(len(gammas) - 1):
        gamma, below = (one.expand(len(z)) for one in gammas[number : number + 2])
        found = predict(z, gamma)
        if sampler == "ancestral":
            z = less_noisy(z, found.x, gamma, below).draw(noise(number + 1))
            continue
        ahead = alpha(below, z) * found.x + sigma(below, z) * found.noise
        if sampler == "heun":
            again = predict(ahead, below)
            (here, s), (_, t) = flow(z, gamma), flow(ahead, below)
            velocity = (found.noise - found.x + again.noise - again.x) / 2
            ahead = (here + (t - s) * velocity) * (alpha(below, z) + sigma(below, z))
        z = ahead
    return z / alpha(gammas[-1:], z)


def waves(gamma: Tensor, size: int) -> Tensor:
    """Returns sines and cosines of γ with frequencies from 0.01 to PACE, fp32 [B, size], for a network to read."""
    half = size // 2
    rates = torch.logspace(-2, math.log10(PACE), half, device=gamma.device)
    angles = gamma.float().clamp(-LARGEST, LARGEST)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def _squares(x: Tensor) -> Tensor:
    return x.square().flatten(1).sum(1)
