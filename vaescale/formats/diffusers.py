"""`VQModel` and `AutoencoderKL` of diffusers: a folder with config.json and diffusion_pytorch_model.safetensors."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..config import ConfigError
from ..files import printable
from ..interfaces import Shape
from ..nn.vqgan import GROUPS
from . import keys, ours

CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"
FORMER = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # attention before version 0.18
ONLY = {"act_fn": "silu", "norm_num_groups": GROUPS, "norm_type": "group", "mid_block_add_attention": True}
SCALE = 0.18215  # scaling_factor of an AutoencoderKL whose config.json has none


def to_diffusers(model: Any, shape: Shape, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Returns the weights and the content of config.json. model: our settings; shape: of the images; tensors: our state
    dict. Raises ConfigError if diffusers has no such network."""
    net = ours.net_of(model, shape.channels)
    network = net.network
    if network.multipliers[0] != 1:
        raise ConfigError(
            f"model.network.multipliers={network.multipliers} has no counterpart in diffusers, where the first is 1"
        )
    attends = [2**level in network.attention for level in range(len(network.multipliers))]
    config = {
        "_class_name": "VQModel" if net.codes else "AutoencoderKL",
        "in_channels": net.channels,
        "out_channels": net.channels,
        "block_out_channels": [network.channels * multiplier for multiplier in network.multipliers],
        "down_block_types": [f"{'Attn' if one else ''}DownEncoderBlock2D" for one in attends],
        "up_block_types": [f"{'Attn' if one else ''}UpDecoderBlock2D" for one in reversed(attends)],
        "layers_per_block": network.blocks,
        "latent_channels": network.z_channels or net.dim,
        "sample_size": shape.size,
        **{name: only for name, only in ONLY.items() if net.codes or name != "norm_type"},
    }
    if net.codes:
        config |= {"num_vq_embeddings": net.codes, "vq_embed_dim": net.dim, "scaling_factor": 1.0}
    else:
        config |= {"use_quant_conv": True, "use_post_quant_conv": True}
        config |= _scaling(tensors["latent_mean"].double(), tensors["latent_std"].double())
    return keys.to_theirs(ours.weights_of(tensors), keys.rows(net, "diffusers")), config


def from_diffusers(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any] | None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Returns the section `model` of our settings, and our weights. config: the content of config.json; None: none is
    given. For an AutoencoderKL `latent_mean` and `latent_std` are among the weights, if the config has them.

    Raises ConfigError, one sentence, if the weights or the config do not fit.
    """
    config = config or {}
    for name, only in ONLY.items():
        if (value := config.get(name, only)) != only:
            raise ConfigError(f"{CONFIG}: {name}={printable(value, 40)} has no counterpart here, only {name}={only}")
    tensors = _current(tensors) | _identities(tensors, config)
    net = keys.inferred(tensors, "diffusers")
    name = "VQModel" if net.codes else "AutoencoderKL"
    if config.get("_class_name", name) != name:
        raise ConfigError(
            f"{CONFIG}: _class_name={printable(config['_class_name'], 40)}, but these are weights of class {name}"
        )
    weights = keys.to_ours(tensors, keys.rows(net, "diffusers"))
    return ours.settings_of(net), weights | ({} if net.codes else _statistics(config, net.dim))


def _scaling(mean: Tensor, std: Tensor) -> dict[str, Any]:
    """Returns the settings that normalise latents. mean, std: [D], infinite if they are not measured.

    Code of diffusers computes z · scaling_factor, (z − shift_factor) · scaling_factor, or if these are given,
    (z − latents_mean) · scaling_factor / latents_std. After the first two the variance over all channels is 1, after
    the third that of each channel; hence the factor in latents_std.
    """
    if not (mean.isfinite() & std.isfinite() & (std > 0)).all():
        return {"scaling_factor": 1.0}
    centre = mean.mean()
    scale = 1 / (std.square() + (mean - centre).square()).mean().sqrt()
    return {
        "scaling_factor": scale.item(),
        "shift_factor": centre.item(),
        "latents_mean": mean.tolist(),
        "latents_std": (std * scale).tolist(),
    }


def _statistics(config: Mapping[str, Any], dim: int) -> dict[str, Tensor]:
    """Returns the mean and deviation by which diffusers normalises latents, fp32 [D] each; {} if it does not."""
    scale = _numbers(config, "scaling_factor", SCALE, 1)
    if config.get("latents_mean") is not None and config.get("latents_std") is not None:
        mean, std = (_numbers(config, name, None, dim) for name in ("latents_mean", "latents_std"))
    elif scale == 1 and config.get("shift_factor") is None:
        return {}
    else:
        mean, std = _numbers(config, "shift_factor", 0.0, 1), torch.ones(1, dtype=torch.float64)
    if not (scale > 0 and (std > 0).all()):
        raise ConfigError(f"{CONFIG}: scaling_factor and latents_std must be above 0")
    return {"latent_mean": mean.expand(dim).float(), "latent_std": (std / scale).expand(dim).float()}


def _numbers(config: Mapping[str, Any], name: str, default: Any, count: int) -> Tensor:
    """Returns a number of the config, or `count` of them, fp64 [count]. Raises ConfigError."""
    value = default if (given := config.get(name)) is None else given
    values = value if isinstance(value, list) else [value]
    if len(values) != count or not all(type(one) in (int, float) and math.isfinite(one) for one in values):
        raise ConfigError(f"{CONFIG}: {name}={printable(value, 60)} must be {count} finite number(s)")
    return torch.tensor(values, dtype=torch.float64)


def _current(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors with today's names of attention."""
    current = {}
    for name, tensor in tensors.items():
        place, _, part = name.rpartition(".")
        block, _, layer = place.rpartition(".")
        new = f"{block}.{FORMER[layer]}.{part}" if layer in FORMER and ".attentions." in place else name
        current[name if new in tensors else new] = tensor
    return current


def _identities(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Returns identities for the 1×1 convolutions that the config omits."""
    found: dict[str, Tensor] = {}
    for layer, used, neighbour, axis in (
        ("quant_conv", "use_quant_conv", "encoder.conv_out.weight", 0),
        ("post_quant_conv", "use_post_quant_conv", "decoder.conv_in.weight", 1),
    ):
        if config.get(used) is False and neighbour in tensors and f"{layer}.weight" not in tensors:
            channels = tensors[neighbour].shape[axis]
            found |= {f"{layer}.weight": torch.eye(channels)[..., None, None], f"{layer}.bias": torch.zeros(channels)}
    return found
