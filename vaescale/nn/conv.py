"""The networks of VQ-VAE: van den Oord, Vinyals, Kavukcuoglu 2017, section 4.1.

Strided convolutions and residual blocks. As in the authors' published code, the outermost convolutions have half of the
hidden units, and a 3×3 convolution follows them.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from ..ranges import ranged
from .blocks import ResidualBlock, downsample, run_block, upsample


@dataclass(frozen=True)
class Config:
    kind: str = "conv"
    downsample_factor: int = ranged(4, least=2, most=1024)  # f, a power of two: log2(f) strided convolutions
    # hidden units; the outermost convolution of each side has half of them
    width: int = ranged(256, least=2, most=2**16)
    residual_blocks: int = ranged(2, least=0, most=4096)
    residual_width: int = ranged(32, least=1, most=2**16)


class Layers(nn.Sequential):
    """Layers one after the other. With `checkpointing`, residual blocks are computed again in the backward pass."""

    def __init__(self, layers: list[nn.Module], factor: int, checkpointing: bool) -> None:
        super().__init__(*layers)
        self.factor, self.checkpointing = factor, checkpointing

    def forward(self, x: Tensor) -> Tensor:
        for layer in self:
            x = run_block(layer, self.checkpointing and self.training and isinstance(layer, ResidualBlock), x)
        return x

    @property
    def last(self) -> Any:
        return self[-1]


def encoder(config: Config, channels: int, out: int, checkpointing: bool) -> Layers:
    widths = [channels, *_widths(config)]
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [downsample(before, after), nn.ReLU()]
    layers += [
        nn.Conv2d(widths[-1], config.width, 3, padding=1),
        *_residual_stack(config),
        nn.Conv2d(config.width, out, 1),
    ]
    return Layers(layers, config.downsample_factor, checkpointing)


def decoder(config: Config, dim: int, out: int, checkpointing: bool) -> Layers:
    layers: list[nn.Module] = [nn.Conv2d(dim, config.width, 3, padding=1), *_residual_stack(config)]
    for before, after in pairwise([config.width, *reversed(_widths(config)[:-1]), out]):
        layers += [upsample(before, after), nn.ReLU()]
    return Layers(layers[:-1], config.downsample_factor, checkpointing)  # no ReLU after the last convolution


def _widths(config: Config) -> list[int]:
    """Returns the channels after each halving. Raises ValueError for a factor that is not a power of two."""
    halvings = config.downsample_factor.bit_length() - 1
    if config.downsample_factor != 2**halvings:
        raise ValueError(
            f"model.network.downsample_factor={config.downsample_factor} must be a power of two, at least 2"
        )
    return [config.width // 2, *[config.width] * (halvings - 1)]


def _residual_stack(config: Config) -> list[nn.Module]:
    blocks = [ResidualBlock(config.width, config.residual_width) for _ in range(config.residual_blocks)]
    return [*blocks, nn.ReLU()]
