"""Trained networks that are only applied: models of other runs, and published networks, whose weights are a dict of
tensors, without modules, with each batch norm as part of the convolution before it."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import xxhash
from torch import Tensor, nn

from ..interfaces import Batch, Calibrated, Codec, LatentStatistics, Model, Shape

Tensors = dict[str, Tensor]


class Frozen:
    """A trained model that another model is built on. It is not a module: no parameter, state dict, checkpoint,
    optimiser or average has its weights, and copies of the other model share it."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model.eval().requires_grad_(False)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Frozen":
        return self

    def on(self, device: torch.device) -> nn.Module:
        """Returns the model, moved to the device if it is elsewhere."""
        if next(self.model.parameters()).device != device:
            self.model.to(device)
        return self.model


def blank_latents(codec: Codec, shape: Shape) -> list[Tensor]:
    """Returns the latents of one blank image without a condition, for their shapes. codec: a module."""
    assert isinstance(codec, nn.Module)
    device = next(codec.parameters()).device
    x = torch.zeros(1, shape.channels, shape.size, shape.size, dtype=torch.uint8, device=device)
    label = torch.full((1,), -1, device=device)
    with torch.no_grad():
        return codec.encode(Batch(x, label, torch.full((1, shape.attributes), torch.nan, device=device), label))


def weights_hash(model: nn.Module) -> str:
    """Returns the hash of all parameters and buffers, 64-bit xxh3 in hexadecimal. Statistics of Calibrated, which are
    measured later and change neither latents nor images, are left out."""
    digest, measured = xxhash.xxh3_64(), model.calibration().values() if isinstance(model, Calibrated) else ()
    later = {name for name, buffer in model.named_buffers() if any(buffer is one for one in measured)}
    for name, tensor in sorted(model.state_dict().items()):
        if name in later:
            continue
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def latents_hash(codec: Model) -> str:
    """Returns the hash by which latents are known to be those of a codec: that of its weights. Codecs that differ only
    in a decoder that was trained alone have the same."""
    return codec.latents_of or weights_hash(codec)


def base_hash(codec: Model) -> str:
    """Returns the hash by which a model that is built on a codec knows it again: that of its latents, and of the
    statistics by which they are standardised, if it has any."""
    return "-".join([latents_hash(codec), *statistics_hash(codec)])


def statistics_hash(codec: Model) -> list[str]:
    """Returns the hash of the codec's latent statistics, if it has any."""
    if not isinstance(codec, LatentStatistics):
        return []
    statistics = torch.cat(codec.latent_statistics()).detach().cpu().numpy()
    return [xxhash.xxh3_64(statistics.data).hexdigest()]


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
