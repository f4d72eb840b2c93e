"""The networks of VQGAN and latent diffusion.

Esser, Rombach, Ommer 2021, "Taming transformers for high-resolution image synthesis"; Rombach et al. 2022,
"High-resolution image synthesis with latent diffusion models".

    encoder: conv → at each resolution `blocks` residual blocks, halving in between → middle → conv → 1×1 conv
    decoder: 1×1 conv → conv → middle → at each resolution `blocks` + 1 residual blocks, doubling in between → conv
    middle: residual block, attention, residual block

Layer by layer these are the networks of `VQModel` and `AutoencoderKL` of diffusers, with their 1×1 convolutions at the
latents. Images are in [−½, ½] here and in [−1, 1] there; hence the factors of 2.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..ranges import ranged
from .blocks import run_block

GROUPS = 32  # of each group normalisation
EPSILON = 1e-6


@dataclass(frozen=True)
class Config:
    kind: str = "vqgan"
    channels: int = ranged(128, least=GROUPS, most=2**16)  # at full resolution, a multiple of 32
    # channels of each resolution as multiples of `channels`; each but the first halves height and width
    multipliers: list[int] = ranged(factory=lambda: [1, 1, 2, 2, 4], least=1, most=1024)  # noqa: RUF009
    blocks: int = ranged(2, least=1, most=4096)  # residual blocks at each resolution of the encoder
    # Downsampling factors of the resolutions with an attention block after each residual block, besides the middle:
    # 16 is 16 × 16 pixels of an image of 256.
    attention: list[int] = ranged(factory=lambda: [16], least=1, most=2**16)  # noqa: RUF009
    # channels between the 3×3 and the 1×1 convolutions at the latents; 0: the encoder's output's and the decoder's
    # input's
    z_channels: int = ranged(0, least=0, most=2**16)


class Residual(nn.Module):
    """[B, channels, h, w] → [B, out, h, w]."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.norm1 = _norm(channels)
        self.conv1 = _conv(channels, out)
        self.norm2 = _norm(out)
        self.conv2 = _conv(out, out)
        self.shortcut = nn.Conv2d(channels, out, 1) if channels != out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        return self.shortcut(x) + self.conv2(F.silu(self.norm2(h)))


class Attention(nn.Module):
    """Self-attention between all pixels, with one head. [B, C, h, w] → same shape."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = _norm(channels)
        self.q, self.k, self.v, self.out = (nn.Linear(channels, channels) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        pixels = rearrange(self.norm(x), "b c h w -> b 1 (h w) c")
        mixed = F.scaled_dot_product_attention(self.q(pixels), self.k(pixels), self.v(pixels))
        return x + rearrange(self.out(mixed), "b 1 (h w) c -> b c h w", h=x.shape[2])


class Halve(nn.Module):
    """[B, C, h, w] → [B, C, h/2, w/2]; padded on the right and below only."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Double(nn.Module):
    """[B, C, h, w] → [B, C, 2h, 2w]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = _conv(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0))


class Encoder(nn.Module):
    """[B, C, H, W] → [B, out, H/f, W/f]."""

    def __init__(self, config: Config, channels: int, out: int, checkpointing: bool) -> None:
        super().__init__()
        widths = _widths(config)
        self.factor = _factor(config)
        self.checkpointing = checkpointing
        self.first = _conv(channels, config.channels)
        blocks: list[nn.Module] = []
        before = config.channels
        for level, width in enumerate(widths):
            blocks += [Halve(before)] if level else []
            blocks += _stage(before, width, config.blocks, 2**level in config.attention)
            before = width
        self.blocks = nn.ModuleList([*blocks, *_middle(before)])
        self.norm = _norm(before)
        self.last = _conv(before, config.z_channels or out)
        self.project = nn.Conv2d(config.z_channels or out, out, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(2 * x)
        for block in self.blocks:
            h = run_block(block, self.checkpointing and self.training, h)
        return self.project(self.last(F.silu(self.norm(h))))


class Decoder(nn.Module):
    """[B, D, H/f, W/f] → [B, out, H, W]."""

    def __init__(self, config: Config, dim: int, out: int, checkpointing: bool) -> None:
        super().__init__()
        widths = _widths(config)
        self.factor = _factor(config)
        self.checkpointing = checkpointing
        self.project = nn.Conv2d(dim, config.z_channels or dim, 1)
        self.first = _conv(config.z_channels or dim, widths[-1])
        blocks = _middle(widths[-1])
        before = widths[-1]
        for level, width in reversed(list(enumerate(widths))):
            blocks += _stage(before, width, config.blocks + 1, 2**level in config.attention)
            blocks += [Double(width)] if level else []
            before = width
        self.blocks = nn.ModuleList(blocks)
        self.norm = _norm(before)
        self.last = _conv(before, out)

    def forward(self, z: Tensor) -> Tensor:
        h = self.first(self.project(z))
        for block in self.blocks:
            h = run_block(block, self.checkpointing and self.training, h)
        return self.last(F.silu(self.norm(h))) / 2


def _stage(channels: int, out: int, count: int, attention: bool) -> list[nn.Module]:
    blocks: list[nn.Module] = []
    for number in range(count):
        blocks.append(Residual(out if number else channels, out))
        blocks += [Attention(out)] if attention else []
    return blocks


def _middle(channels: int) -> list[nn.Module]:
    return [Residual(channels, channels), Attention(channels), Residual(channels, channels)]


def _conv(channels: int, out: int) -> nn.Conv2d:
    return nn.Conv2d(channels, out, 3, padding=1)


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(GROUPS, channels, EPSILON)


def _factor(config: Config) -> int:
    return 1 << (len(config.multipliers) - 1)


def _widths(config: Config) -> list[int]:
    """Returns the channels of each resolution. Raises ValueError for settings that do not fit together."""
    if config.channels % GROUPS:
        raise ValueError(
            f"model.network.channels={config.channels} must be a multiple of the {GROUPS} groups of the normalisation"
        )
    if not config.multipliers:
        raise ValueError("model.network.multipliers=[] must have one number for each resolution, as in [1, 2, 4]")
    factors = [2**level for level in range(len(config.multipliers))]
    for factor in config.attention:
        if factor not in factors:
            raise ValueError(
                f"model.network.attention={config.attention}: the network has no resolution {factor} times smaller "
                f"than the image, only {', '.join(map(str, factors))}"
            )
    return [config.channels * multiplier for multiplier in config.multipliers]
