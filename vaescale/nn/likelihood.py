"""p(x|z): how probable an image is, given what the decoder says.

Shapes: B images, C channels, K mixture components; the decoder's output is [B, `channels`, H, W] of any float type and
is read in fp32, inside autocast or not: log-probabilities of a whole image do not survive rounding to 8 bits.
Probabilities are those of 8-bit values, so −log p is never negative in the discrete ones; sums are in nats an image.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..ranges import ranged, require

DELTA = 1 / 255  # δ: the width of an 8-bit value's bin
UNIFORM = DELTA**2 / 12  # variance of what is uniform in it
PACE = 10.0  # Adam moves a parameter by its learning rate a step, and log c has some units to go: ten times as fast
FAR = 1e6  # standard deviations: the outer edge of the first and last bin
LEAST_LOG_SCALE = -7.0  # of a logistic on [−1, 1], as in the authors' implementation


@dataclass(frozen=True)
class Config:
    kind: Literal["gaussian", "discretised-gaussian", "logistic-mixture", "bernoulli"] = "gaussian"
    # The Gaussians: c, the variance of a pixel in [0, 1] given the latents. The squared error weighs 1/(2c).
    variance: float = ranged(0.06, above=0)
    learned: bool = True  # c is learned, one for all pixels, and begins at `variance`
    components: int = ranged(10, least=1, most=1024)  # K of the mixture


class Likelihood(nn.Module, ABC):
    channels: int  # that the decoder must give

    @abstractmethod
    def log_prob(self, output: Tensor, x: Tensor) -> Tensor:
        """x: uint8 [B, C, H, W] → nats, fp32 [B]."""

    @abstractmethod
    def mean(self, output: Tensor) -> Tensor:
        """fp32 [B, C, H, W] in [0, 1]."""

    @abstractmethod
    def draw(self, output: Tensor) -> Tensor:
        """fp32 [B, C, H, W] in [0, 1], from torch's default generator."""


class _Gaussian(Likelihood):
    """N(f, c) with f = output + 1/2, and c given or learned as a parameter (Rybkin, Daniilidis, Levine 2021, 4.1)."""

    def __init__(self, config: Config, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.begin = config.variance
        # Of one element, [1]: DeepSpeed cannot broadcast a parameter without dimensions.
        self.exponent = nn.Parameter(torch.zeros(1)) if config.learned else None

    def variance(self) -> Tensor:
        """c, fp32 []."""
        if self.exponent is None:
            return torch.tensor(self.begin)
        return self.begin * (PACE * self.exponent.float()).exp().squeeze()


class Gaussian(_Gaussian):
    """A density on v = x/255 + u with u uniform in the bin of width δ, the uniformly dequantised image.

    E_u log p(v) + log δ a subpixel is a bound of the 8-bit image's log-probability (Theis, van den Oord, Bethge 2016,
    section 3.1), and of a Gaussian it is known without drawing u: −[(x/255 − f)² + δ²/12] / (2c) − ½ log 2πc + log δ.
    """

    def log_prob(self, output: Tensor, x: Tensor) -> Tensor:
        c = self.variance()
        errors = (x / 255 - self.mean(output)).square() + UNIFORM
        constant = math.log(DELTA) - (2 * math.pi * c).log() / 2
        return (constant - errors / (2 * c)).sum((1, 2, 3))

    def mean(self, output: Tensor) -> Tensor:
        """In [0, 1] up to over-shoot."""
        return output.float() + 0.5

    def draw(self, output: Tensor) -> Tensor:
        """In [0, 1] up to over-shoot."""
        mean = self.mean(output)
        return mean + self.variance().sqrt() * torch.randn_like(mean)


class DiscretisedGaussian(_Gaussian):
    """The Gaussian's probability of each 8-bit value's bin; the first and the last bin reach to infinity."""

    def log_prob(self, output: Tensor, x: Tensor) -> Tensor:
        std = self.variance().sqrt()
        f = output.float() + 0.5
        # x ± ½ is exact: neighbours share their edge to the last bit, and all bins sum to one.
        low = torch.where(x == 0, -FAR, ((x - 0.5) * DELTA - f) / std)
        high = torch.where(x == 255, FAR, ((x + 0.5) * DELTA - f) / std)
        # Φ(high) − Φ(low) = Φ(−low) − Φ(−high): taken on the left, where log Φ has all its digits.
        right = low + high > 0
        low, high = torch.where(right, -high, low), torch.where(right, -low, high)
        outer, inner = torch.special.log_ndtr(low), torch.special.log_ndtr(high)
        return (inner + torch.log(-torch.expm1(outer - inner))).sum((1, 2, 3))

    def mean(self, output: Tensor) -> Tensor:
        """Of the Gaussian clamped to [0, 1]: the mean of the 8-bit values to within half of one."""
        f, std = output.float() + 0.5, self.variance().sqrt()
        return std * (_ramp(f / std) - _ramp((f - 1) / std))

    def draw(self, output: Tensor) -> Tensor:
        f = output.float() + 0.5
        drawn = f + self.variance().sqrt() * torch.randn_like(f)
        return (255 * drawn).round().clamp(0, 255) / 255


def _ramp(z: Tensor) -> Tensor:
    """∫ Φ from −∞ to z."""
    return z * torch.special.ndtr(z) + (-z.square() / 2).exp() / math.sqrt(2 * math.pi)


class LogisticMixture(Likelihood):
    """K discretised logistics on [−1, 1] a pixel; the means of green and blue move linearly with the values before
    them (Salimans, Karpathy, Chen, Kingma 2017, "PixelCNN++", sections 2.1 and 2.2).

    The output's channels: K logits, then for each component C means, C log-scales, C (C − 1) / 2 coefficients.
    """

    def __init__(self, config: Config, channels: int) -> None:
        super().__init__()
        self.components = config.components
        self.colours = channels
        self.sizes = [channels, channels, channels * (channels - 1) // 2]
        self.channels = config.components * (1 + sum(self.sizes))

    def log_prob(self, output: Tensor, x: Tensor) -> Tensor:
        logits, means, log_scales, coefficients = self._split(output)
        v = (x / 127.5 - 1)[:, None]  # [B, 1, C, H, W] beside [B, K, C, H, W]
        colours = v.unbind(2)
        means = torch.stack([_moved(means, coefficients, colours[:channel]) for channel in range(self.colours)], dim=2)
        sharpness = (-log_scales).exp()
        low, high = (v - means - DELTA) * sharpness, (v - means + DELTA) * sharpness
        # σ(high) − σ(low) = σ(high) σ(−low) (1 − exp(low − high)): a product, exact wherever the bin lies.
        below, above = F.logsigmoid(high), F.logsigmoid(-low)
        inside = below + above + torch.log(-torch.expm1(-2 * DELTA * sharpness))
        x = x[:, None]
        bins = torch.where(x == 0, below, torch.where(x == 255, above, inside))
        return (bins.sum(2) + logits).logsumexp(1).sum((1, 2))

    def mean(self, output: Tensor) -> Tensor:
        """Of logistics clamped to [−1, 1], whose means move with the means before them: that of the 8-bit values to
        within half of one, where no component is cut at the ends."""
        logits, means, log_scales, coefficients = self._split(output)
        v: list[Tensor] = []
        for scale in log_scales.exp().unbind(2):
            mean = _moved(means, coefficients, v)
            v.append(scale * (F.softplus((mean + 1) / scale) - F.softplus((mean - 1) / scale)) - 1)
        return ((logits.exp()[:, :, None] * torch.stack(v, dim=2)).sum(1) + 1) / 2

    def draw(self, output: Tensor) -> Tensor:
        logits, means, log_scales, coefficients = self._split(output)
        component = (logits - torch.empty_like(logits).exponential_().log()).argmax(1)  # Gumbel's maximum
        means, log_scales, coefficients = (
            part.take_along_dim(component[:, None, None], dim=1) for part in (means, log_scales, coefficients)
        )
        v: list[Tensor] = []
        for scale in log_scales.exp().unbind(2):
            mean = _moved(means, coefficients, v)
            drawn = mean + scale * torch.logit(torch.rand_like(mean))
            v.append(((drawn + 1) * 127.5).round().clamp(0, 255) / 127.5 - 1)
        return (torch.cat(v, dim=1) + 1) / 2

    def _split(self, output: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """fp32: log-weights [B, K, H, W]; means, log-scales and coefficients [B, K, n, H, W]."""
        logits, rest = output.float().split([self.components, self.channels - self.components], dim=1)
        rest = rearrange(rest, "b (k n) h w -> b k n h w", k=self.components)
        means, log_scales, coefficients = rest.split(self.sizes, dim=2)
        return logits.log_softmax(1), means, log_scales.clamp(min=LEAST_LOG_SCALE), coefficients.tanh()


def _moved(means: Tensor, coefficients: Tensor, before: Sequence[Tensor]) -> Tensor:
    """The next channel's means [B, K, H, W], given the values [B, K or 1, H, W] of the channels before it."""
    channel = len(before)
    first = channel * (channel - 1) // 2
    mean = means[:, :, channel]
    for place, value in enumerate(before, start=first):
        mean = mean + coefficients[:, :, place] * value
    return mean


class Bernoulli(Likelihood):
    """Of the image binarised at 127.5: its nats are those of one bit a subpixel and compare with no 8-bit bound."""

    def __init__(self, config: Config, channels: int) -> None:
        super().__init__()
        del config
        self.channels = channels

    def log_prob(self, output: Tensor, x: Tensor) -> Tensor:
        bits = (x > 127).float()
        return -F.binary_cross_entropy_with_logits(output.float(), bits, reduction="none").sum((1, 2, 3))

    def mean(self, output: Tensor) -> Tensor:
        return output.float().sigmoid()

    def draw(self, output: Tensor) -> Tensor:
        return self.mean(output).bernoulli()


KINDS: dict[str, type[Gaussian | DiscretisedGaussian | LogisticMixture | Bernoulli]] = {
    "gaussian": Gaussian,
    "discretised-gaussian": DiscretisedGaussian,
    "logistic-mixture": LogisticMixture,
    "bernoulli": Bernoulli,
}


def build(config: Config, channels: int) -> Likelihood:
    """For images of C = `channels`; raises ValueError for values that cannot be."""
    require(config, "model.likelihood")
    return KINDS[config.kind](config, channels)
