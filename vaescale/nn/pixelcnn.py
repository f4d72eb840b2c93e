"""The gated PixelCNN: van den Oord et al. 2016, "Conditional image generation with PixelCNN decoders", section 2.

    codes → vertical stack: all rows above │ horizontal stack: the codes to the left, and the vertical stack → h

Each layer is tanh(a) · σ(b) of the two halves of a convolution's output, to which the condition adds a vector.
"""

from collections.abc import Callable

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .transformer import Dropout

KERNEL = 5  # codes per side of the field that a layer sees; odd


class Layer(nn.Module):
    """(v, x) → (v, x), both [B, width, h, w]. v at a place may depend on its own and all earlier rows, x on the codes
    before it in the order of rows, and after the first layer on the place's own input, too."""

    def __init__(self, width: int, first: bool) -> None:
        super().__init__()
        self.first = first
        self.vertical = nn.Conv2d(width, 2 * width, (KERNEL // 2 + 1, KERNEL))
        self.horizontal = nn.Conv2d(width, 2 * width, (1, KERNEL // 2 + (not first)))
        self.down = nn.Conv2d(2 * width, 2 * width, 1)
        self.condition = nn.Linear(width, 4 * width)
        self.out = nn.Conv2d(width, width, 1)

    def forward(
        self, v: Tensor, x: Tensor, condition: Tensor, dropout: Dropout | None, place: int
    ) -> tuple[Tensor, Tensor]:
        side = KERNEL // 2
        for_v, for_x = self.condition(condition)[..., None, None].chunk(2, dim=1)
        rows = self.vertical(F.pad(v, (side, side, side, 0)))
        above = F.pad(rows, (0, 0, 1, -1))  # what a row may see of it: the rows above
        left = F.pad(x, (side, -1 if self.first else 0))
        branch = self.out(gated(self.horizontal(left) + self.down(above) + for_x))
        if dropout:
            branch = dropout(branch, place)
        return gated(rows + for_v), branch if self.first else x + branch


class PixelCNN(nn.Module):
    """height, length: of the map, in codes. depth: layers."""

    def __init__(self, height: int, length: int, width: int, depth: int) -> None:
        super().__init__()
        self.shape = (height, length)
        self.layers = nn.ModuleList(Layer(width, first=not number) for number in range(depth))
        self.out = nn.Linear(width, width)

    def forward(
        self, embedded: Tensor, condition: Tensor, order: None = None, dropout: Dropout | None = None
    ) -> Tensor:
        """Returns h [B, N, width], of which each depends on the condition and the codes before it.

        embedded: codes in the order of rows, the only one that it has, [B, N, width], or those of the first rows;
        condition: [B, width]."""
        x = rearrange(embedded, "b (h w) c -> b c h w", w=self.shape[1])
        if dropout:
            x = dropout(x, 0)
        v = x
        for place, layer in enumerate(self.layers, start=1):
            v, x = layer(v, x, condition, dropout, place)
        return F.relu(self.out(F.relu(rearrange(x, "b c h w -> b (h w) c"))))

    def reader(self, condition: Tensor, order: None = None) -> Callable[[int, Tensor | None], Tensor]:
        """Returns a function that computes h one by one: (i, embedded code i − 1) → h of code i, [B, width]. It must be
        called for i = 0 (without a code), 1, 2, … Each call computes all rows up to that of code i."""
        height, length = self.shape
        embedded = condition.new_zeros(len(condition), height * length, condition.shape[1])

        def read(i: int, last: Tensor | None) -> Tensor:
            if last is not None:
                embedded[:, i - 1] = last
            return self(embedded[:, : (i // length + 1) * length], condition)[:, i]

        return read


def gated(x: Tensor) -> Tensor:
    """[B, 2C, h, w] → [B, C, h, w]."""
    a, b = x.chunk(2, dim=1)
    return a.tanh() * b.sigmoid()
