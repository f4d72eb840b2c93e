"""A transformer over the patches of an image or a map of latents, with a vector that modulates its blocks: Peebles, Xie
2023, "Scalable diffusion models with transformers" (DiT), with the blocks of nn/transformer.py.

z [B, C, h, w] → patches → tokens → blocks of attention and SwiGLU → patches → [B, out, h, w]

In each block the vector gives scale, shift and gate of both branches (adaLN-Zero, of RMSNorm); the gates start at zero.
"""

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .blocks import run_block
from .transformer import EPSILON, Block, Dropout, Rotation, grid, head_channels, initialise_, turning


class Modulation(nn.Module):
    """A vector of each image, [B, width] → `count` vectors [B, 1, width] each, zeros at first."""

    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        self.count = count
        self.linear = nn.Linear(width, count * width)
        zero_(self.linear)

    def forward(self, vector: Tensor) -> tuple[Tensor, ...]:
        return self.linear(F.silu(vector))[:, None].chunk(self.count, dim=-1)


class AdaptiveBlock(Block):
    """x [B, N, width], vector [B, width] → same shape as x."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__(width, heads, qk_norm=True)
        self.modulation = Modulation(width, 6)

    def forward(  # type: ignore[override]
        self, x: Tensor, vector: Tensor, rotation: Rotation, dropout: Dropout | None, place: int
    ) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(vector)
        branch = gate1 * self.attention(self.norm1(x) * (1 + scale1) + shift1, rotation)
        x = x + (dropout(branch, place) if dropout else branch)
        branch = gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)
        return x + (dropout(branch, place + 1) if dropout else branch)


class DiT(nn.Module):
    """z [B, channels, h, w], vector [B, width] → [B, out, h, w], zeros at first."""

    def __init__(
        self, channels: int, out: int, patch: int, width: int, depth: int, heads: int, checkpointing: bool
    ) -> None:
        """patch: pixels per side. Raises ValueError if the heads do not fit the width."""
        super().__init__()
        self.dim = head_channels(width, heads, "model")
        self.patch = patch
        self.checkpointing = checkpointing
        self.first = nn.Conv2d(channels, width, patch, stride=patch)
        self.blocks = nn.ModuleList(AdaptiveBlock(width, heads) for _ in range(depth))
        initialise_(self.blocks)
        for block in self.blocks:
            zero_(block.modulation.linear)  # type: ignore[arg-type, union-attr]
        self.norm = nn.RMSNorm(width, EPSILON)
        self.modulation = Modulation(width, 2)
        self.last = nn.Linear(width, out * patch**2)
        zero_(self.last)

    def forward(self, z: Tensor, vector: Tensor, dropout: Dropout | None = None) -> Tensor:
        tokens = self.first(z)
        height, width = tokens.shape[2:]
        rotation = turning(grid(height, width, self.dim, z.device))
        x = rearrange(tokens, "b c h w -> b (h w) c").to(self.norm.weight.dtype)
        for number, block in enumerate(self.blocks):
            x = run_block(block, self.checkpointing and self.training, x, vector, rotation, dropout, 2 * number)
        shift, scale = self.modulation(vector)
        patches = self.last(self.norm(x) * (1 + scale) + shift)
        return rearrange(patches, "b (h w) (c p q) -> b c (h p) (w q)", h=height, p=self.patch, q=self.patch)


def zero_(layer: nn.Linear | nn.Conv2d) -> None:
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
