"""A small U-Net, modulated by a vector of each image: Ho, Jain, Abbeel 2020, "Denoising diffusion probabilistic
models".

z [B, C, h, w] → conv → at each resolution residual blocks, halving in between → residual block, attention, residual
block → at each resolution residual blocks, doubling in between, which also read what the first half computed → conv

The vector scales and shifts the second norm of each residual block (Dhariwal, Nichol 2021, "Diffusion models beat GANs
on image synthesis", adaptive group normalisation).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .blocks import run_block
from .dit import zero_
from .transformer import Dropout
from .vqgan import EPSILON, GROUPS, Attention, Double, Halve


class Residual(nn.Module):
    """x [B, channels, h, w], vector [B, size] → [B, out, h, w]; the identity or a linear map at first."""

    def __init__(self, channels: int, out: int, size: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(GROUPS, channels, EPSILON)
        self.conv1 = nn.Conv2d(channels, out, 3, padding=1)
        self.norm2 = nn.GroupNorm(GROUPS, out, EPSILON)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1)
        self.modulation = nn.Linear(size, 2 * out)
        self.shortcut = nn.Conv2d(channels, out, 1) if channels != out else nn.Identity()
        zero_(self.modulation)
        zero_(self.conv2)

    def forward(self, x: Tensor, vector: Tensor, dropout: Dropout | None, place: int) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.modulation(F.silu(vector))[:, :, None, None].chunk(2, dim=1)
        h = F.silu(self.norm2(h) * (1 + scale) + shift)
        return self.shortcut(x) + self.conv2(dropout(h, place) if dropout else h)


class UNet(nn.Module):
    """z [B, channels, h, w], vector [B, size] → [B, out, h, w], zeros at first."""

    def __init__(
        self, channels: int, out: int, width: int, depth: int, halvings: int, size: int, checkpointing: bool
    ) -> None:
        """width: channels at full resolution, twice as many after the first halving; depth: residual blocks at each
        resolution. Raises ValueError for a width that is no multiple of the groups of the normalisation."""
        super().__init__()
        if width % GROUPS:
            raise ValueError(f"model.width={width} must be a multiple of the {GROUPS} groups of the normalisation")
        self.checkpointing = checkpointing
        widths = [width * min(2**level, 2) for level in range(halvings + 1)]
        self.first = nn.Conv2d(channels, width, 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        kept, before = [width], width  # channels of what the second half reads
        for level, here in enumerate(widths):
            if level:
                self.down.append(Halve(before))
                kept.append(before)
            for _ in range(depth):
                self.down.append(Residual(before, here, size))
                kept.append(before := here)
        self.middle = nn.ModuleList([Residual(before, before, size), Attention(before), Residual(before, before, size)])
        for level, here in reversed(list(enumerate(widths))):
            for _ in range(depth + 1):
                self.up.append(Residual(before + kept.pop(), here, size))
                before = here
            if level:
                self.up.append(Double(before))
        self.norm = nn.GroupNorm(GROUPS, before, EPSILON)
        self.last = nn.Conv2d(before, out, 3, padding=1)
        zero_(self.last)

    def forward(self, z: Tensor, vector: Tensor, dropout: Dropout | None = None) -> Tensor:
        place = 0  # of the dropout

        def run(block: nn.Module, x: Tensor) -> Tensor:
            nonlocal place
            place += 1
            given = (vector, dropout, place) if isinstance(block, Residual) else ()
            return run_block(block, self.checkpointing and self.training, x, *given)

        x = self.first(z)
        kept = [x]
        for block in self.down:
            x = run(block, x)
            kept += [x]
        for block in self.middle:
            x = run(block, x)
        for block in self.up:
            x = run(block, x if isinstance(block, Double) else torch.cat([x, kept.pop()], dim=1))
        return self.last(F.silu(self.norm(x)))
