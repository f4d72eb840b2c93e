"""The networks of ViT-VQGAN: Yu et al. 2022, "Vector-quantized image modeling with improved VQGAN", section 3.1.

    encoder: patches of f × f pixels → linear → transformer → linear
    decoder: linear → transformer → linear to patches of f × f pixels with a few channels → GELU → 3×3 convolution

Differences from the paper: rotary positions, RMSNorm and SwiGLU (transformer.py); linear maps at the latents and a
convolution at the end, which joins the patches, instead of layers with tanh. Sizes in the paper: small is width 512,
depth 8 and 8 heads; base 768, 12 and 12; large 1280, 32 and 16.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..ranges import ranged
from .transformer import Transformer, grid, head_channels


@dataclass(frozen=True)
class Config:
    kind: str = "vit"
    patch: int = ranged(8, least=1, most=1024)  # f, pixels per side
    width: int = ranged(512, least=4, most=2**16)
    depth: int = ranged(8, least=1, most=4096)  # blocks of the encoder, and of the decoder
    heads: int = ranged(8, least=1, most=2**14)
    head_channels: int = ranged(32, least=1, most=2**16)  # ahead of the last convolution


class Encoder(nn.Module):
    """[B, C, H, W] → [B, out, H/f, W/f]."""

    def __init__(self, config: Config, channels: int, out: int, checkpointing: bool) -> None:
        super().__init__()
        self.factor = config.patch
        self.dim = head_channels(config.width, config.heads, "model.network")
        self.patches = nn.Conv2d(channels, config.width, config.patch, stride=config.patch)
        self.transformer = Transformer(config.width, config.depth, config.heads, checkpointing)
        self.out = nn.Linear(config.width, out)

    def forward(self, x: Tensor) -> Tensor:
        h = self.patches(x)
        return _maps(self.out(_mixed(self.transformer, h, self.dim)), h)


class Decoder(nn.Module):
    """[B, D, H/f, W/f] → [B, out, H, W]."""

    def __init__(self, config: Config, dim: int, out: int, checkpointing: bool) -> None:
        super().__init__()
        self.factor = config.patch
        self.dim = head_channels(config.width, config.heads, "model.network")
        self.first = nn.Conv2d(dim, config.width, 1)
        self.transformer = Transformer(config.width, config.depth, config.heads, checkpointing)
        self.pixels = nn.Linear(config.width, config.patch**2 * config.head_channels)
        self.last = nn.Conv2d(config.head_channels, out, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = _maps(self.pixels(_mixed(self.transformer, self.first(z), self.dim)), z)
        pixels = rearrange(h, "b (c p q) h w -> b c (h p) (w q)", p=self.factor, q=self.factor)
        return self.last(F.gelu(pixels))


def _mixed(transformer: Transformer, h: Tensor, dim: int) -> Tensor:
    """[B, width, h, w] → [B, h·w, width]."""
    angles = grid(h.shape[2], h.shape[3], dim, h.device)
    return transformer(rearrange(h, "b c h w -> b (h w) c"), angles)


def _maps(x: Tensor, like: Tensor) -> Tensor:
    """[B, h·w, C] → [B, C, h, w] with the height of `like`."""
    return rearrange(x, "b (h w) c -> b c h w", h=like.shape[2])
