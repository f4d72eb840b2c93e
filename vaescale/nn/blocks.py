"""Blocks that the models share, and networks between images and vectors."""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..interfaces import Shape
from ..ranges import ranged


@dataclass(frozen=True)
class Network:
    """Settings of the encoder and decoder between images and vectors."""

    kind: Literal["conv", "linear"] = "conv"  # linear: one linear map each way; the settings below do not apply
    width: int = ranged(32, least=1, most=2**16)  # channels at full resolution
    halvings: int = ranged(3, least=0, most=16)  # of height and width; each doubles the channels
    hidden: int = ranged(256, least=1, most=2**20)  # units of the layer between the feature map and the vector


def encoder(network: Network, shape: Shape, out: int, condition: int = 0) -> nn.Module:
    """Builds a network with forward(x [B, C, H, W], condition [B, E] or None) → [B, out]."""
    if network.kind == "linear":
        return LinearEncoder(shape, out, condition)
    return Encoder(shape, network.width, network.halvings, network.hidden, out, condition)


def decoder(network: Network, shape: Shape, dim: int, out: int) -> nn.Module:
    """Builds a network with forward(z [B, dim]) → [B, out, H, W]."""
    if network.kind == "linear":
        return LinearDecoder(shape, dim, out)
    return Decoder(shape, network.width, network.halvings, network.hidden, dim, out)


class ResidualBlock(nn.Module):
    """x + conv1×1(relu(conv3×3(relu(x)))), the block of VQ-VAE (section 4.1). [B, C, H, W] → same shape."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.wide = nn.Conv2d(channels, hidden, 3, padding=1)
        self.narrow = nn.Conv2d(hidden, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.narrow(F.relu(self.wide(F.relu(x))))


def downsample(channels: int, out: int) -> nn.Conv2d:
    """Builds a convolution that halves height and width."""
    return nn.Conv2d(channels, out, 4, stride=2, padding=1)


def upsample(channels: int, out: int) -> nn.ConvTranspose2d:
    """Builds a transposed convolution that doubles height and width."""
    return nn.ConvTranspose2d(channels, out, 4, stride=2, padding=1)


class Encoder(nn.Module):
    """Image [B, C, H, W] and condition [B, E] → [B, out]. Each halving doubles the channels and is followed by a
    residual block; two linear layers come last."""

    def __init__(self, shape: Shape, width: int, halvings: int, hidden: int, out: int, condition: int = 0) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(shape.channels, width, 3, padding=1)]
        for level in range(halvings):
            channels = width << level
            layers += [nn.ReLU(), downsample(channels, 2 * channels), ResidualBlock(2 * channels, channels)]
        self.image = nn.Sequential(*layers, nn.ReLU(), nn.Flatten())
        self.hidden = nn.Linear((width << halvings) * least_size(shape, halvings) ** 2 + condition, hidden)
        self.out = nn.Linear(hidden, out)

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        return self.out(F.relu(self.hidden(with_condition(self.image(x), condition))))


class Decoder(nn.Module):
    """[B, D] → [B, out, H, W], the mirror image of Encoder. A condition is passed as part of the D channels."""

    def __init__(self, shape: Shape, width: int, halvings: int, hidden: int, dim: int, out: int) -> None:
        super().__init__()
        self.least = least_size(shape, halvings)
        self.hidden = nn.Linear(dim, hidden)
        self.grid = nn.Linear(hidden, (width << halvings) * self.least**2)
        layers: list[nn.Module] = []
        for level in reversed(range(halvings)):
            channels = width << level
            layers += [ResidualBlock(2 * channels, channels), nn.ReLU(), upsample(2 * channels, channels)]
        self.image = nn.Sequential(*layers, nn.ReLU(), nn.Conv2d(width, out, 3, padding=1))

    def forward(self, z: Tensor) -> Tensor:
        grid = self.grid(F.relu(self.hidden(z)))
        return self.image(grid.unflatten(1, (-1, self.least, self.least)))


class LinearEncoder(nn.Linear):
    """Image [B, C, H, W] and condition [B, E] → [B, out] by one linear map."""

    def __init__(self, shape: Shape, out: int, condition: int = 0) -> None:
        super().__init__(shape.channels * shape.size**2 + condition, out)

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        return super().forward(with_condition(x.flatten(1), condition))


class LinearDecoder(nn.Linear):
    """[B, D] → [B, out, H, W] by one linear map."""

    def __init__(self, shape: Shape, dim: int, out: int) -> None:
        super().__init__(dim, out * shape.size**2)
        self.image = (out, shape.size, shape.size)

    def forward(self, z: Tensor) -> Tensor:
        return super().forward(z).unflatten(1, self.image)


def with_condition(features: Tensor, condition: Tensor | None) -> Tensor:
    """Concatenates [B, F] and [B, E] to [B, F + E], in the features' data type, which autocast decides."""
    if condition is None:
        return features
    return torch.cat([features, condition.to(features.dtype)], dim=1)


def run_block(block: nn.Module, recompute: bool, *inputs: Any) -> Any:
    """Returns block(*inputs). With `recompute` only the inputs are stored, and the backward pass computes the rest
    again. The noise is the same both times, because it depends only on the sample numbers."""
    if recompute:
        return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)
    return block(*inputs)


def he_(net: nn.Module, last: bool) -> None:
    """Initialises the linear layers of a net with variance 2 / fan-in (He et al. 2015, "Delving deep into rectifiers",
    equation 10). This keeps the scale of a signal through a ReLU; with torch's default it shrinks 2.4 times per layer.
    `last` includes the last layer, for a net that a ReLU follows."""
    layers = [layer for layer in net.modules() if isinstance(layer, nn.Linear)]
    for layer in layers if last else layers[:-1]:
        nn.init.normal_(layer.weight, std=math.sqrt(2 / layer.in_features))
        nn.init.zeros_(layer.bias)


def least_size(shape: Shape, halvings: int) -> int:
    """Returns the pixels per side after `halvings`. Raises ValueError if the size cannot be halved so often."""
    if shape.size % 2**halvings:
        raise ValueError(
            f"data.size={shape.size} cannot be halved {halvings} times: use a multiple of {2**halvings}, or lower "
            f"model.network.halvings"
        )
    return shape.size >> halvings
