"""A transformer: pre-norm blocks of attention and SwiGLU, with rotary positions.

x [B, N, width] → x + attention(norm(x)) → x + mlp(norm(x)) → … → norm. The sum x has the data type of the weights: fp32
inside autocast. Attention is to all tokens, or causal: to a token and those before it.

RMSNorm: Zhang, Sennrich 2019, "Root mean square layer normalization". SwiGLU: Shazeer 2020, "GLU variants improve
transformer"; with a hidden layer of 8/3 width it has the parameters of a usual layer of 4 width. Normalised queries and
keys: Dehghani et al. 2023, "Scaling vision transformers to 22 billion parameters".
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from . import noise
from .blocks import run_block

EPSILON = 1e-6
BASE = 100.0  # 2π · BASE: above the longest wavelength of the rotary positions, in patches


class Rotation(NamedTuple):
    """The angles of the rotary positions: [N, D/2] for all images, or [B, 1, N, D/2]. D: channels of a head."""

    cos: Tensor
    sin: Tensor


class Dropout(NamedTuple):
    """Sets a share of numbers to 0 and divides the others by 1 − share. Which ones depends only on each image's
    sample number, the keys and the place in the network."""

    share: float
    sample: Tensor  # int64 [B]
    keys: tuple[int, ...]

    def __call__(self, x: Tensor, place: int) -> Tensor:
        """x: [B, …]."""
        kept = noise.kept(self.sample, tuple(x.shape[1:]), self.share, *self.keys, place)
        return x * kept * (1 / (1 - self.share))


class Cache:
    """The keys and values of the tokens that a block has read, for at most `length` tokens."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.filled = 0
        self._held: Tensor | None = None  # [2, B, heads, length, D]

    def extended(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Adds the keys and values of the next tokens, [B, heads, n, D]. Returns those of all tokens so far, so that
        attention reads no more than is filled."""
        if self._held is None:
            self._held = k.new_empty(2, *k.shape[:2], self.length, k.shape[3])
        start, self.filled = self.filled, self.filled + k.shape[2]
        self._held[0, :, :, start : self.filled] = k
        self._held[1, :, :, start : self.filled] = v
        return self._held[0, :, :, : self.filled], self._held[1, :, :, : self.filled]


class Block(nn.Module):
    """x [B, N, width] → same shape. Without a rotation attention knows no positions."""

    def __init__(self, width: int, heads: int, qk_norm: bool = False) -> None:
        super().__init__()
        hidden = 8 * math.ceil(width / 3)
        self.heads = heads
        self.norm1 = nn.RMSNorm(width, EPSILON)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.norm_q = nn.RMSNorm(width // heads, EPSILON) if qk_norm else None
        self.norm_k = nn.RMSNorm(width // heads, EPSILON) if qk_norm else None
        self.mix = nn.Linear(width, width, bias=False)
        self.norm2 = nn.RMSNorm(width, EPSILON)
        self.gate = nn.Linear(width, 2 * hidden, bias=False)
        self.out = nn.Linear(hidden, width, bias=False)

    def forward(
        self,
        x: Tensor,
        rotation: Rotation | None,
        causal: bool = False,
        dropout: Dropout | None = None,
        place: int = 0,
        cache: Cache | None = None,
        turned: Rotation | None = None,
    ) -> Tensor:
        """rotation: of keys, and of queries unless `turned` is theirs. place: of the block's dropout, which uses this
        number and the next one. cache: of the tokens before x, which is then one token."""
        branch = self.attention(self.norm1(x), rotation, causal, cache, turned)
        x = x + (dropout(branch, place) if dropout else branch)
        branch = self.mlp(self.norm2(x))
        return x + (dropout(branch, place + 1) if dropout else branch)

    def attention(
        self,
        x: Tensor,
        rotation: Rotation | None,
        causal: bool = False,
        cache: Cache | None = None,
        turned: Rotation | None = None,
    ) -> Tensor:
        q, k, v = rearrange(self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.heads)
        q, k = normalised(q, self.norm_q), normalised(k, self.norm_k)
        if rotation is not None:
            q, k = rotated(q, turned or rotation), rotated(k, rotation)
        if cache is not None:
            k, v = cache.extended(k, v)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        return self.mix(rearrange(mixed, "b h n d -> b n (h d)"))

    def mlp(self, x: Tensor) -> Tensor:
        gate, value = self.gate(x).chunk(2, dim=-1)
        return self.out(F.silu(gate) * value)


class Transformer(nn.Module):
    """x [B, N, width], angles [N, width/heads/2] or [B, N, width/heads/2] → same shape as x."""

    def __init__(self, width: int, depth: int, heads: int, checkpointing: bool = False, qk_norm: bool = False) -> None:
        super().__init__()
        self.checkpointing = checkpointing
        self.blocks = nn.ModuleList(Block(width, heads, qk_norm) for _ in range(depth))
        self.norm = nn.RMSNorm(width, EPSILON)
        initialise_(self.blocks)

    def forward(
        self,
        x: Tensor,
        angles: Tensor | None,
        causal: bool = False,
        dropout: Dropout | None = None,
        caches: list[Cache] | None = None,
        queries: Tensor | None = None,
    ) -> Tensor:
        """angles: None for a network without positions. dropout: of x and of all branches. caches: one of each block,
        of the tokens before x, which is then one token. queries: their angles, if they are not those of the keys."""
        x = x.to(self.norm.weight.dtype)
        rotation = None if angles is None else turning(angles)
        turned = None if queries is None else turning(queries)
        if dropout:
            x = dropout(x, 0)
        for number, block in enumerate(self.blocks):
            cache = caches[number] if caches else None
            recompute = self.checkpointing and self.training
            x = run_block(block, recompute, x, rotation, causal, dropout, 2 * number + 1, cache, turned)
        return self.norm(x)


def initialise_(blocks: nn.ModuleList) -> None:
    """Draws the weights of linear layers. Those that end a branch start smaller, so that the variance of x does not
    grow with depth."""
    for name, weight in blocks.named_parameters():
        if weight.ndim == 2:
            last = name.endswith(("mix.weight", "out.weight"))
            nn.init.normal_(weight, std=0.02 / math.sqrt(2 * len(blocks)) if last else 0.02)


def normalised(x: Tensor, norm: nn.RMSNorm | None) -> Tensor:
    """Applies a norm in the data type of x, in which it is one kernel also inside autocast."""
    return x if norm is None else F.rms_norm(x, norm.normalized_shape, norm.weight.to(x.dtype), norm.eps)


def turning(angles: Tensor) -> Rotation:
    """Returns the rotation by angles [N, D/2], or [B, N, D/2] if they differ between images."""
    if angles.ndim == 3:
        angles = angles[:, None]
    return Rotation(angles.cos(), angles.sin())


def head_channels(width: int, heads: int, where: str) -> int:
    """Returns the channels of a head: pairs for each of two coordinates. Raises ValueError if they cannot be that.

    where: the section of the settings `width` and `heads`."""
    if width % (4 * heads):
        raise ValueError(f"{where}.width={width} must be a multiple of 4 times {where}.heads={heads}")
    return width // heads


def grid(height: int, width: int, dim: int, device: torch.device) -> Tensor:
    """Returns the angles of the places of a grid, in the order of its rows, for heads of `dim` channels: fp32
    [height · width, dim/2]. One half of them turns with the row, the other with the column. Attention depends on the
    distances only, so the grid may have any size."""
    rates = BASE ** -(torch.arange(dim // 4, device=device) / (dim // 4))
    rows = torch.arange(height, device=device)[:, None, None] * rates
    columns = torch.arange(width, device=device)[None, :, None] * rates
    both = torch.cat([rows.expand(-1, width, -1), columns.expand(height, -1, -1)], dim=-1)
    return both.flatten(0, 1)


def rotated(x: Tensor, rotation: Rotation) -> Tensor:
    """Turns each pair of channels of x, [B, heads, N, D], by an angle (Su et al. 2021, "RoFormer", equation 34)."""
    one, other = x.float().chunk(2, dim=-1)
    cos, sin = rotation
    return torch.cat([one * cos - other * sin, other * cos + one * sin], dim=-1).to(x.dtype)
