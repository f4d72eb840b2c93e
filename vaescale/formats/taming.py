"""taming-transformers' VQGAN, and the first stages of latent diffusion: one file with a state dict.

Its metadata holds as `network` the part of their YAML file that builds the network, without its losses.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..interfaces import Shape
from . import keys, ours


def to_taming(model: Any, shape: Shape, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Returns the weights and the section of their YAML file that builds the network. model: our settings; shape: of
    the images; tensors: our state dict. Raises ConfigError if they have no such network."""
    net = ours.net_of(model, shape.channels)
    network = net.network
    config = {
        "embed_dim": net.dim,
        "lossconfig": {"target": "torch.nn.Identity"},
        "ddconfig": {
            "double_z": not net.codes,
            "z_channels": network.z_channels or net.dim,
            "resolution": shape.size,
            "in_channels": net.channels,
            "out_ch": net.channels,
            "ch": network.channels,
            "ch_mult": list(network.multipliers),
            "num_res_blocks": network.blocks,
            "attn_resolutions": [shape.size // factor for factor in network.attention],
            "dropout": 0.0,
        },
    }
    if net.codes:
        config = {"target": "taming.models.vqgan.VQModel", "params": {"n_embed": net.codes, **config}}
    else:
        config = {"target": "ldm.models.autoencoder.AutoencoderKL", "params": config}
    return keys.to_theirs(ours.weights_of(tensors), keys.rows(net, "taming")), config


def from_taming(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Returns the section `model` of our settings, and our weights. tensors: the weights of the network, without those
    of its losses. Raises ConfigError, one sentence, if they do not fit."""
    net = keys.inferred(tensors, "taming")
    return ours.settings_of(net), keys.to_ours(tensors, keys.rows(net, "taming"))
