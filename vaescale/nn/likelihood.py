"""p(x|z): the likelihood of an image given the decoder's output.

Shapes: B images, C channels, K mixture components. The decoder's output is [B, `channels`, H, W] of any float type. It
is converted to fp32 even inside autocast, because the 8 significant bits of bf16 are too few for the log-probability of
a whole image. Probabilities are those of 8-bit values, so −log p is never negative for the discrete likelihoods. Sums
are in nats per image.
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
UNIFORM = DELTA**2 / 12  # variance of the uniform distribution in a bin
# Adam moves a parameter by about its learning rate per step, and log c has several units to go: move it faster.
PACE = 10.0
FAR = 1e6  # outer edge of the first and last bin, in standard deviations
LEAST_LOG_SCALE = -7.0  # of a logistic on [−1, 1], as in the authors' implementation


@dataclass(frozen=True)
class Config:
    kind: Literal["gaussian", "discretised-gaussian", "logistic-mixture", "bernoulli"] = "gaussian"
    # For the Gaussians: c, the variance of a pixel in [0, 1] given the latents. The squared error has weight 1/(2c).
    variance: float = ranged(0.06, above=0)
    learned_variance: bool = True  # learn one c for all pixels, starting at `variance`
    components: int = ranged(10, least=1, most=1024)  # K of the mixture


class Likelihood(nn.Module, ABC):
    channels: int  # of the decoder's output

    @abstractmethod
    def log_prob(self, output: Tensor, x: Tensor) -> Tensor:
        """Returns log p(x|z) in nats, fp32 [B], for x uint8 [B, C, H, W]."""

    @abstractmethod
    def mean(self, output: Tensor) -> Tensor:
        """Returns the mean of p(x|z), fp32 [B, C, H, W] in [0, 1]."""

    @abstractmethod
    def draw(self, output: Tensor) -> Tensor:
        """Draws from p(x|z) with torch's default generator: fp32 [B, C, H, W] in [0, 1]."""


class _Gaussian(Likelihood):
    """N(f, c) with f = output + 1/2, and c fixed or learned as a parameter (Rybkin, Daniilidis, Levine 2021, 4.1)."""

    def __init__(self, config: Config, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.begin = config.variance
        # Shape [1], not []: DeepSpeed cannot broadcast a parameter without dimensions.
        self.exponent = nn.Parameter(torch.zeros(1)) if config.learned_variance else None

    def variance(self) -> Tensor:
        """c, fp32 []."""
        if self.exponent is None:
            return torch.tensor(self.begin)
        return self.begin * (PACE * self.exponent.float()).exp().squeeze()


class Gaussian(_Gaussian):
    """A density of v = x/255 + u, the dequantised image, with u uniform in the bin of width δ.

    E_u log p(v) + log δ per subpixel is a lower bound on the log-probability of the 8-bit image (Theis, van den Oord,
    Bethge 2016, section 3.1). For a Gaussian it has a closed form: −[(x/255 − f)² + δ²/12] / (2c) − ½ log 2πc + log δ.
    """

    def log_prob(self, output: Tensor, x: Tensor) -> Tensor:
        c = self.variance()
        errors = (x / 255 - self.mean(output)).square() + UNIFORM
        constant = math.log(DELTA) - (2 * math.pi * c).log() / 2
        return (constant - errors / (2 * c)).sum((1, 2, 3))

    def mean(self, output: Tensor) -> Tensor:
        """Returns f, which is not clamped and may leave [0, 1]."""
        return output.float() + 0.5

    def draw(self, output: Tensor) -> Tensor:
        """Draws from N(f, c); values are not clamped and may leave [0, 1]."""
        mean = self.mean(output)
        return mean + self.variance().sqrt() * torch.randn_like(mean)


class DiscretisedGaussian(_Gaussian):
    """The Gaussian's probability of the bin of each 8-bit value; the first and last bin extend to infinity."""

    def log_prob(self, output: Tensor, x: Tensor) -> Tensor:
        return gaussian_log_prob(output.float() + 0.5, self.variance().sqrt(), x)

    def mean(self, output: Tensor) -> Tensor:
        """Returns the mean of the Gaussian clamped to [0, 1], within half a grey level of the mean 8-bit value."""
        f, std = output.float() + 0.5, self.variance().sqrt()
        return std * (_ramp(f / std) - _ramp((f - 1) / std))

    def draw(self, output: Tensor) -> Tensor:
        f = output.float() + 0.5
        drawn = f + self.variance().sqrt() * torch.randn_like(f)
        return (255 * drawn).round().clamp(0, 255) / 255


def gaussian_log_prob(mean: Tensor, std: Tensor, x: Tensor) -> Tensor:
    """Returns the log-probability of x, uint8 [B, C, H, W], under a discretised Gaussian, in nats: fp32 [B]. mean: fp32
    [B, C, H, W], in [0, 1] up to overshoot; std: fp32, broadcast."""
    # x ± ½ is exact, so neighbouring bins share bit-identical edges and all bins sum to one.
    low = torch.where(x == 0, -FAR, ((x - 0.5) * DELTA - mean) / std)
    high = torch.where(x == 255, FAR, ((x + 0.5) * DELTA - mean) / std)
    # Φ(high) − Φ(low) = Φ(−low) − Φ(−high): use the form in the left tail, where log Φ is accurate.
    right = low + high > 0
    low, high = torch.where(right, -high, low), torch.where(right, -low, high)
    outer, inner = torch.special.log_ndtr(low), torch.special.log_ndtr(high)
    return (inner + torch.log(-torch.expm1(outer - inner))).sum((1, 2, 3))


def _ramp(z: Tensor) -> Tensor:
    """The integral of Φ from −∞ to z."""
    return z * torch.special.ndtr(z) + (-z.square() / 2).exp() / math.sqrt(2 * math.pi)


class LogisticMixture(Likelihood):
    """A mixture of K discretised logistics on [−1, 1] per pixel. The means of green and blue depend linearly on the
    values of the preceding channels (Salimans, Karpathy, Chen, Kingma 2017, "PixelCNN++", sections 2.1 and 2.2).

    The output channels are K logits, then for each component C means, C log-scales and C (C − 1) / 2 coefficients.
    """

    def __init__(self, config: Config, channels: int) -> None:
        super().__init__()
        self.components = config.components
        self.colours = channels
        self.sizes = [channels, channels, channels * (channels - 1) // 2]
        self.channels = config.components * (1 + sum(self.sizes))

    def log_prob(self, output: Tensor, x: Tensor) -> Tensor:
        logits, means, log_scales, coefficients = self._split(output)
        v = (x / 127.5 - 1)[:, None]  # [B, 1, C, H, W], broadcast against [B, K, C, H, W]
        colours = v.unbind(2)
        means = torch.stack([_moved(means, coefficients, colours[:channel]) for channel in range(self.colours)], dim=2)
        sharpness = (-log_scales).exp()
        low, high = (v - means - DELTA) * sharpness, (v - means + DELTA) * sharpness
        # σ(high) − σ(low) = σ(high) σ(−low) (1 − exp(low − high)): a product, accurate wherever the bin lies.
        below, above = F.logsigmoid(high), F.logsigmoid(-low)
        inside = below + above + torch.log(-torch.expm1(-2 * DELTA * sharpness))
        x = x[:, None]
        bins = torch.where(x == 0, below, torch.where(x == 255, above, inside))
        return (bins.sum(2) + logits).logsumexp(1).sum((1, 2))

    def mean(self, output: Tensor) -> Tensor:
        """Returns the mean of logistics clamped to [−1, 1], where each channel's mean depends on the means of the
        channels before it. Within half a grey level of the mean 8-bit value if no component is clipped."""
        logits, means, log_scales, coefficients = self._split(output)
        v: list[Tensor] = []
        for scale in log_scales.exp().unbind(2):
            mean = _moved(means, coefficients, v)
            v.append(scale * (F.softplus((mean + 1) / scale) - F.softplus((mean - 1) / scale)) - 1)
        return ((logits.exp()[:, :, None] * torch.stack(v, dim=2)).sum(1) + 1) / 2

    def draw(self, output: Tensor) -> Tensor:
        logits, means, log_scales, coefficients = self._split(output)
        component = (logits - torch.empty_like(logits).exponential_().log()).argmax(1)  # Gumbel-max trick
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
        """fp32 log-weights [B, K, H, W]; means, log-scales and coefficients [B, K, n, H, W]."""
        logits, rest = output.float().split([self.components, self.channels - self.components], dim=1)
        rest = rearrange(rest, "b (k n) h w -> b k n h w", k=self.components)
        means, log_scales, coefficients = rest.split(self.sizes, dim=2)
        return logits.log_softmax(1), means, log_scales.clamp(min=LEAST_LOG_SCALE), coefficients.tanh()


def _moved(means: Tensor, coefficients: Tensor, before: Sequence[Tensor]) -> Tensor:
    """The means [B, K, H, W] of the next channel, given the values [B, K or 1, H, W] of the channels before it."""
    channel = len(before)
    first = channel * (channel - 1) // 2
    mean = means[:, :, channel]
    for place, value in enumerate(before, start=first):
        mean = mean + coefficients[:, :, place] * value
    return mean


class Bernoulli(Likelihood):
    """The likelihood of the image binarised at 127.5, one bit per subpixel; not comparable with 8-bit bounds."""

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
    """Builds the likelihood for images with C = `channels`. Raises ValueError for invalid settings."""
    require(config, "model.likelihood")
    return KINDS[config.kind](config, channels)
