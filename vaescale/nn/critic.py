"""The critic of an adversarial loss, which learns to tell images from reconstructions, and what it is trained by.

PatchGAN: Isola, Zhu, Zhou, Efros 2017, "Image-to-image translation with conditional adversarial networks", section 3.2.
It has group norm instead of batch norm, so that a logit depends on one image only: the same at any number of ranks, and
whether images and reconstructions pass in one batch or in two.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..ranges import ranged
from . import noise

GROUPS, CHANNELS = 32, 4  # of a group norm: groups at most, channels of each at least
SLOPE = 0.2  # of leaky ReLU below zero
# LeCam's means are plain over their first 1 / RATE steps, exponentially averaged after them (Tseng et al. 2021: 0.01).
RATE = 0.01
AUGMENT = 0xA06  # purpose of the noise
# Zhao et al. 2020: largest change of brightness, for pixels in [0, 1]; shift and square, as shares of the size.
BRIGHTNESS, SHIFT, SQUARE = 0.25, 0.125, 0.5


@dataclass(frozen=True)
class Config:
    """With weight=0.1 the defaults are a usual choice, measured on no task here."""

    weight: float = ranged(0.0, least=0)  # of the adversarial term in the model's loss; 0: there is no critic
    # Multiply the weight by ‖∇ reconstruction loss‖ / ‖∇ adversarial loss‖ at the model's last layer (Esser, Rombach,
    # Ommer 2021, "Taming transformers for high-resolution image synthesis", equation 7, with a weight of 0.8).
    adaptive: bool = False
    # Share of the steps after which the critic is trained. A run that is continued with more steps starts it later.
    critic_start: float = ranged(0.2, least=0, most=1)
    start: float = ranged(0.25, least=0, most=1)  # share of the steps after which the model's loss has the term
    loss: Literal["hinge", "non-saturating"] = "hinge"
    lecam: float = ranged(0.001, least=0)  # weight of LeCam regularisation; 0: none
    r1: float = ranged(0.0, least=0)  # γ: weight of half the critic's squared gradient at images; 0: none
    augment: bool = False  # shift, cut out and recolour what the critic sees
    betas: tuple[float, float] = ranged((0.5, 0.9), least=0, below=1)  # of the critic's AdamW; the rest is `optimizer`
    width: int = ranged(64, least=1, most=2**16)  # channels of the critic's first layer
    layers: int = ranged(3, least=1, most=16)  # of stride 2

    @property
    def smallest(self) -> int:
        """The smallest size of images that the critic has a logit for."""
        return 3 * 2**self.layers


class Critic(nn.Module):
    """Maps images in [0, 1], fp32 [B, C, H, W], to logits [B, 1, h, w], each for a patch: positive for an image."""

    lecam: Tensor

    def __init__(self, config: Config, channels: int) -> None:
        super().__init__()
        widths = [config.width * min(2**number, 8) for number in range(config.layers + 1)]
        layers: list[nn.Module] = [nn.Conv2d(channels, widths[0], 4, stride=2, padding=1), nn.LeakyReLU(SLOPE)]
        for number in range(1, config.layers + 1):
            stride = 2 if number < config.layers else 1
            layers += [
                nn.Conv2d(widths[number - 1], widths[number], 4, stride=stride, padding=1),
                nn.GroupNorm(math.gcd(GROUPS, max(1, widths[number] // CHANNELS)), widths[number]),
                nn.LeakyReLU(SLOPE),
            ]
        self.layers = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 4, padding=1))
        for part in self.modules():
            if isinstance(part, nn.Conv2d) and part.bias is not None:
                nn.init.normal_(part.weight, 0.0, 0.02)
                nn.init.zeros_(part.bias)
        # Means of the logits of images and of reconstructions over past steps, and the number of these steps.
        self.register_buffer("lecam", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(2 * x - 1)

    @torch.no_grad()
    def observe(self, means: Tensor) -> None:
        """Updates the means for LeCam. means: fp32 [2], of the logits of this step's images and reconstructions, over
        all ranks."""
        seen = self.lecam[2] + 1
        rate = (1 / seen).clamp(min=RATE)
        self.lecam.copy_(torch.cat([self.lecam[:2].lerp(means, rate), seen[None]]))


def build(config: Config, channels: int, seed: int) -> Critic:
    """Returns a critic whose first weights depend only on the seed, and leaves torch's generator as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed GPUs, too
        return Critic(config, channels)


def critic_loss(kind: str, real: Tensor, fake: Tensor) -> Tensor:
    """Returns the critic's loss for the logits of images and of reconstructions."""
    if kind == "hinge":  # Lim, Ye 2017, "Geometric GAN"
        return F.relu(1 - real).mean() + F.relu(1 + fake).mean()
    return F.softplus(-real).mean() + F.softplus(fake).mean()  # Goodfellow et al. 2014, equation 1


def model_loss(kind: str, fake: Tensor) -> Tensor:
    """Returns the model's loss for the logits of its reconstructions."""
    return -fake.mean() if kind == "hinge" else F.softplus(-fake).mean()


def lecam_penalty(real: Tensor, fake: Tensor, means: Tensor) -> Tensor:
    """LeCam regularisation (Tseng et al. 2021, "Regularizing generative adversarial networks under limited data",
    equation 6, one-sided as in the authors' code). means: `lecam` of the critic."""
    return F.relu(real - means[1]).square().mean() + F.relu(means[0] - fake).square().mean()


def r1_penalty(real: Tensor, x: Tensor) -> Tensor:
    """Returns the mean over images of half the squared norm of the gradient of an image's logits, summed, with respect
    to the image (Mescheder, Geiger, Nowozin 2018, "Which training methods for GANs do actually converge?", equation 9,
    with γ = 1)."""
    (gradient,) = torch.autograd.grad(real.sum(), x, create_graph=True)
    return gradient.float().square().sum(dim=(1, 2, 3)).mean() / 2


def accuracy(real: Tensor, fake: Tensor) -> Tensor:
    """Returns the share of patches that the critic tells right, half of them of images and half of reconstructions."""
    return ((real > 0).float().mean() + (fake < 0).float().mean()) / 2


def augment(x: Tensor, sample: Tensor, seed: int, draw: int) -> Tensor:
    """Recolours, shifts and cuts a square out of images in [0, 1], differentiably (Zhao et al. 2020, "Differentiable
    augmentation for data-efficient GAN training"). x: [B, C, H, W]; sample: int64 [B], the images' numbers; draws with
    other numbers are independent.

    The shift is a product with matrices of zeros and ones, since the gradient of an indexed copy is either slow or
    different from run to run on GPUs.
    """
    height, width = x.shape[2:]
    drawn = noise.uniform(sample, (7,), seed, AUGMENT, draw).float()
    brightness, saturation, contrast, *places = rearrange(drawn, "b k -> k b 1 1 1")
    x = x.float() - 0.5 + (2 * brightness - 1) * BRIGHTNESS
    grey = x.mean(dim=1, keepdim=True)
    x = grey + (x - grey) * 2 * saturation
    mean = x.mean(dim=(1, 2, 3), keepdim=True)
    x = mean + (x - mean) * (contrast + 0.5)
    down, right, top, left = (place.flatten() for place in places)
    with torch.autocast(x.device.type, enabled=False):  # the products only move pixels, in full precision
        rows = _shifts(height, down)
        columns = _shifts(width, right)
        x = torch.einsum("bij,bcjk,blk->bcil", rows, x, columns)
    kept = 1 - _inside(height, top)[:, None, :, None] * _inside(width, left)[:, None, None, :]
    return x * kept + 0.5


def _shifts(size: int, drawn: Tensor) -> Tensor:
    """Returns fp32 [B, size, size]: matrices that move by up to SHIFT · size places and fill in zeros. drawn: [B]."""
    most = int(SHIFT * size + 0.5)
    moved = (drawn * (2 * most + 1)).floor() - most
    place = torch.arange(size, device=drawn.device)
    return (place[:, None] == place[None, :] + moved[:, None, None]).float()


def _inside(size: int, drawn: Tensor) -> Tensor:
    """Returns fp32 [B, size]: 1 inside an interval of SQUARE · size, which may begin or end outside. drawn: [B]."""
    length = int(SQUARE * size + 0.5)
    begin = (drawn * (size + 1 - length % 2)).floor() - length // 2
    place = torch.arange(size, device=drawn.device)
    return ((place >= begin[:, None]) & (place < begin[:, None] + length)).float()
