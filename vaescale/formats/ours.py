"""Our side of a conversion: what of a model other libraries can have, and the settings of a model made from theirs."""

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from torch import Tensor

from ..config import ConfigError
from .keys import Net

# What no other library has: statistics of the training, and a likelihood's scale.
LEFT_OUT = (
    *("quantizer.tally.", "quantizer.learner.", "quantizer.inner.tally.", "quantizer.inner.learner."),
    *("error_std", "rates", "latent_mean", "latent_std", "likelihood.exponent"),
)
SINGLE = {"kind": "vq", "groups": 1, "depth": 1}  # the quantisers that other libraries have


def net_of(model: Any, channels: int) -> Net:
    """Returns the network of a model. model: its settings; channels: C of its images. Raises ConfigError, with a
    sentence that names the setting, if other libraries have no such network."""
    kind = model.kind
    if kind not in ("vqvae", "kl"):
        raise ConfigError(f"model.kind={kind} has no counterpart in another library: only vqvae and kl have one")
    network = model.network
    if network.kind != "vqgan":
        raise ConfigError(
            f"model.network.kind={network.kind} has no counterpart in another library: only vqgan has one"
        )
    if kind == "kl":
        if network.z_channels:
            raise ConfigError(
                f"model.network.z_channels={network.z_channels} has no counterpart in a KL autoencoder of another "
                f"library: only z_channels=0 has one"
            )
        likelihood = model.likelihood.kind
        if likelihood != "gaussian" and not model.reconstruction.configured:
            raise ConfigError(
                f"model.likelihood.kind={likelihood} has no counterpart in another library, whose decoders return "
                f"images: only gaussian has one"
            )
        return Net(network, channels, model.latent_dim)
    quantizer = model.quantizer
    for name, only in SINGLE.items():
        if (given := getattr(quantizer, name)) != only:
            raise ConfigError(
                f"model.quantizer.{name}={given} has no counterpart in another library: only {name}={only} has one"
            )
    network = replace(network, z_channels=network.z_channels or quantizer.dim)
    return Net(network, channels, quantizer.codebook_dim or quantizer.dim, quantizer.codebook_size)


def weights_of(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the weights of a model, with the names of `keys.rows`. tensors: its state dict.

    The linear maps of `codebook_dim` are multiplied into the 1×1 convolutions next to them.
    """
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(LEFT_OUT)}
    if "quantizer.inner.codebook" in kept:
        kept["quantizer.codebook"] = kept.pop("quantizer.inner.codebook")
        down, up = _popped(kept, "quantizer.down"), _popped(kept, "quantizer.up")
        before, after = _popped(kept, "encoder.project"), _popped(kept, "decoder.project")
        for side, (weight, bias) in {"encoder": _composed(before, down), "decoder": _composed(up, after)}.items():
            kept |= {f"{side}.project.weight": weight, f"{side}.project.bias": bias}
    return kept


def settings_of(net: Net, metric: str = "euclidean") -> dict[str, Any]:
    """Returns the section `model` of the settings of a model with this network."""
    if net.codes:
        quantizer = {"codebook_size": net.codes, "dim": net.dim, "metric": metric}
        return {"kind": "vqvae", "network": asdict(net.network), "quantizer": quantizer}
    # Others train without a likelihood; 2 is the weight 1 of the absolute error of pixels in [−1, 1].
    return {"kind": "kl", "latent_dim": net.dim, "network": asdict(net.network), "reconstruction": {"l1": 2.0}}


def _popped(tensors: dict[str, Tensor], layer: str) -> tuple[Tensor, Tensor]:
    """Removes a linear map or a 1×1 convolution. Returns its weight, [out, in], and its bias, [out], in float64."""
    weight, bias = (tensors.pop(f"{layer}.{part}").double() for part in ("weight", "bias"))
    return weight.flatten(1), bias


def _composed(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Returns the weight and the bias of the 1×1 convolution that applies both maps."""
    weight, bias = second[0] @ first[0], second[0] @ first[1] + second[1]
    return weight[..., None, None].float(), bias.float()
