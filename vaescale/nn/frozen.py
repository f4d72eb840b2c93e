"""Trained networks that are only applied: their weights are a dict of tensors, without modules, and each batch norm is
part of the convolution before it."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Tensors = dict[str, Tensor]


class Net(NamedTuple):
    """A network that turns images into features."""

    words: str  # for people: what the Fréchet distance of its features is called
    dim: int  # D, the number of features
    protocol: dict[str, str]  # "layer", "resize", and "range" of the pixels that it reads
    shapes: dict[str, tuple[int, ...]]  # of its weights
    own: Callable[[Tensors], Tensors]  # published state dict → weights; raises KeyError if a tensor is missing
    run: Callable[[Tensors, Tensor], tuple[Tensor, Tensor | None]]  # weights, fp32 images → features, logits
    """Images: [B, 3, H, W] in 0 … 255; features: [B, D]; logits: [B, K]."""
    classes: int = 0  # K, the number of logits; 0: none


def folded(state: Tensors, convolution: str, norm: str, epsilon: float) -> tuple[Tensor, Tensor]:
    """Returns weight and bias of a convolution without bias and the batch norm that follows it, computed in float64.

    convolution, norm: the beginnings of their names in `state`. Raises KeyError if a tensor is missing."""
    scale, shift, mean, variance = (
        state[f"{norm}.{part}"].double() for part in ("weight", "bias", "running_mean", "running_var")
    )
    scale = scale / (variance + epsilon).sqrt()
    weight = state[f"{convolution}.weight"].double() * scale[:, None, None, None]
    return weight.float(), (shift - mean * scale).float()


def resized(x: Tensor, size: int) -> Tensor:
    """Resizes images of 0 … 255 to size × size pixels as Pillow's bicubic filter does: averaging where it shrinks, and
    rounds to integers in 0 … 255, after the width and again after the height."""
    for shape in ((x.shape[2], size), (size, size)):
        if x.shape[2:] != shape:
            x = F.interpolate(x, size=shape, mode="bicubic", antialias=True).round().clamp(0, 255)
    return x


def resizing(size: int) -> str:
    """Returns what `resized` does, for protocols."""
    return f"bicubic with antialiasing to {size} × {size}, rounded to 8 bits"


def random_weights(shapes: dict[str, tuple[int, ...]], seed: int) -> Tensors:
    """Draws weights, the same on all ranks, for tests. Matrices and kernels keep the scale of their input (He et al.
    2015)."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        if len(shape) > 1:
            tensors[name] = noise * math.sqrt(2 / math.prod(shape[1:]))
        else:
            tensors[name] = 0.1 * noise + (0 if name.endswith("bias") else 1)
    return tensors
