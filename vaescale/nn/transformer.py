"""A transformer: pre-norm blocks of attention and SwiGLU, with rotary positions.

x [B, N, width] → x + attention(norm(x)) → x + mlp(norm(x)) → … → norm. The sum x has the data type of the weights: fp32
inside autocast.

RMSNorm: Zhang, Sennrich 2019, "Root mean square layer normalization". SwiGLU: Shazeer 2020, "GLU variants improve
transformer"; with a hidden layer of 8/3 width it has the parameters of a usual layer of 4 width.
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .blocks import run_block

EPSILON = 1e-6
BASE = 100.0  # 2π · BASE: above the longest wavelength of the rotary positions, in patches


class Block(nn.Module):
    """x [B, N, width], angles [N, width/heads/2] → same shape as x."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        hidden = 8 * math.ceil(width / 3)
        self.heads = heads
        self.norm1 = nn.RMSNorm(width, EPSILON)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.mix = nn.Linear(width, width, bias=False)
        self.norm2 = nn.RMSNorm(width, EPSILON)
        self.gate = nn.Linear(width, 2 * hidden, bias=False)
        self.out = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        q, k, v = rearrange(self.qkv(self.norm1(x)), "b n (three h d) -> three b h n d", three=3, h=self.heads)
        mixed = F.scaled_dot_product_attention(rotated(q, angles), rotated(k, angles), v)
        x = x + self.mix(rearrange(mixed, "b h n d -> b n (h d)"))
        gate, value = self.gate(self.norm2(x)).chunk(2, dim=-1)
        return x + self.out(F.silu(gate) * value)


class Transformer(nn.Module):
    """x [B, N, width], angles [N, width/heads/2] → same shape as x."""

    def __init__(self, width: int, depth: int, heads: int, checkpointing: bool = False) -> None:
        super().__init__()
        self.checkpointing = checkpointing
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.RMSNorm(width, EPSILON)
        for name, weight in self.named_parameters():
            if weight.ndim == 2:  # the last layers start smaller, so that the variance of x does not grow with depth
                last = name.endswith(("mix.weight", "out.weight"))
                nn.init.normal_(weight, std=0.02 / math.sqrt(2 * depth) if last else 0.02)

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        x = x.to(self.norm.weight.dtype)
        for block in self.blocks:
            x = run_block(block, self.checkpointing and self.training, x, angles)
        return self.norm(x)


def grid(height: int, width: int, dim: int, device: torch.device) -> Tensor:
    """Returns the angles of the places of a grid, in the order of its rows, for heads of `dim` channels: fp32
    [height · width, dim/2]. One half of them turns with the row, the other with the column. Attention depends on the
    distances only, so the grid may have any size."""
    rates = BASE ** -(torch.arange(dim // 4, device=device) / (dim // 4))
    rows = torch.arange(height, device=device)[:, None, None] * rates
    columns = torch.arange(width, device=device)[None, :, None] * rates
    both = torch.cat([rows.expand(-1, width, -1), columns.expand(height, -1, -1)], dim=-1)
    return both.flatten(0, 1)


def rotated(x: Tensor, angles: Tensor) -> Tensor:
    """Turns each pair of channels of x, [B, heads, N, D], by an angle of [N, D/2] (Su et al. 2021, "RoFormer", equation
    34)."""
    one, other = x.float().chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([one * cos - other * sin, other * cos + one * sin], dim=-1).to(x.dtype)
