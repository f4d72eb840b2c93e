"""LlamaGen's tokenizer, a VQGAN whose codes and encoder outputs have length 1: one file with a state dict.

Sun et al. 2024, "Autoregressive model beats diffusion: Llama for scalable image generation", section 2.1. Its metadata
holds as `network` the arguments of the network.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import ConfigError
from ..interfaces import Shape
from . import keys, ours

USED = "quantize.codebook_used"  # the last 65,536 codes of a training, for its statistics
WIDTH, BLOCKS = 128, 2  # `channels` and `blocks` of its networks, which are not among their arguments


def to_llamagen(model: Any, shape: Shape, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Returns the weights and the arguments of the network. model: our settings; shape: of the images; tensors: our
    state dict. Raises ConfigError if LlamaGen has no such network."""
    net = ours.net_of(model, shape.channels)
    network = net.network
    needed = {"model.kind": (model.kind, "vqvae"), "data.channels": (shape.channels, 3)}
    needed |= {"model.network.channels": (network.channels, WIDTH), "model.network.blocks": (network.blocks, BLOCKS)}
    needed["model.network.attention"] = network.attention, [2 ** (len(network.multipliers) - 1)]
    if net.codes:
        needed["model.quantizer.metric"] = model.quantizer.metric, "cosine"
    for name, (given, only) in needed.items():
        if given != only:
            raise ConfigError(f"{name}={given} has no counterpart in LlamaGen: only {name}={only} has one")
    arguments = {
        "codebook_size": net.codes,
        "codebook_embed_dim": net.dim,
        "encoder_ch_mult": list(network.multipliers),
        "decoder_ch_mult": list(network.multipliers),
        "z_channels": network.z_channels,
    }
    return {**keys.to_theirs(ours.weights_of(tensors), keys.rows(net, "llamagen")), USED: torch.zeros(65536)}, arguments


def from_llamagen(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Returns the section `model` of our settings, and our weights. Raises ConfigError, one sentence, if the weights do
    not fit. The codes in LlamaGen's files need not have length 1; here they do."""
    tensors = {name: tensor for name, tensor in tensors.items() if name != USED}
    net = keys.inferred(tensors, "llamagen")
    if not net.codes:
        raise ConfigError(f"these are not the weights of a tokenizer of LlamaGen: {keys.CODEBOOK} is missing")
    weights = keys.to_ours(tensors, keys.rows(net, "llamagen"))
    weights["quantizer.codebook"] = F.normalize(weights["quantizer.codebook"], dim=-1)
    return ours.settings_of(net, "cosine"), weights
