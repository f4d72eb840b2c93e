"""Networks between images and feature maps: `model.network` of the models whose latents are maps.

    image [B, C, H, W] in [−0.5, 0.5] → encoder → [B, D, H/f, W/f] → decoder → [B, out, H, W]

Each file of a kind defines its settings and two functions. `encoder` and `decoder` build modules with the attribute
`factor`, the f above; a decoder also has `last`, its last layer, a convolution.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn

from . import conv, vit, vqgan


class Kind(NamedTuple):
    config: type[Any]  # the dataclass of its settings
    encoder: Callable[[Any, int, int, bool], nn.Module]  # (settings, C, D, checkpointing) → encoder
    decoder: Callable[[Any, int, int, bool], nn.Module]  # (settings, D, out, checkpointing) → decoder


NETWORKS = {  # model.network.kind → its networks
    "conv": Kind(conv.Config, conv.encoder, conv.decoder),
    "vqgan": Kind(vqgan.Config, vqgan.Encoder, vqgan.Decoder),
    "vit": Kind(vit.Config, vit.Encoder, vit.Decoder),
}


def encoder(config: Any, channels: int, dim: int, checkpointing: bool = False) -> Any:
    """Builds the encoder for images with C = `channels`. With `checkpointing`, its blocks store only their inputs, and
    the backward pass computes the rest again. Raises ValueError for invalid settings."""
    return NETWORKS[config.kind].encoder(config, channels, dim, checkpointing)


def decoder(config: Any, dim: int, out: int, checkpointing: bool = False) -> Any:
    """Builds the decoder. Raises ValueError for invalid settings."""
    return NETWORKS[config.kind].decoder(config, dim, out, checkpointing)
