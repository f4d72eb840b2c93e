"""The networks have the parameters of the published ones. What they compute, tests/formats compares."""

from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, VQModel
from torch import nn

from vaescale.nn.vqgan import Config, Decoder, Encoder


def arguments(config: Config, latents: int) -> dict[str, Any]:
    """Returns the arguments of diffusers' models."""
    attends = [2**level in config.attention for level in range(len(config.multipliers))]
    return {
        "block_out_channels": tuple(config.channels * multiplier for multiplier in config.multipliers),
        "down_block_types": tuple("AttnDownEncoderBlock2D" if one else "DownEncoderBlock2D" for one in attends),
        "up_block_types": tuple("AttnUpDecoderBlock2D" if one else "UpDecoderBlock2D" for one in reversed(attends)),
        "layers_per_block": config.blocks,
        "latent_channels": config.z_channels or latents,
    }


def shapes(*modules: nn.Module) -> list[tuple[int, ...]]:
    return sorted(tuple(tensor.shape) for module in modules for tensor in module.parameters())


# diffusers' attention is linear layers where that of taming is 1×1 convolutions, with as many weights
VQGAN = Config(z_channels=256)
KL = Config(multipliers=[1, 2, 4, 4], attention=[])


@pytest.mark.parametrize("dim", [8, 256])
def test_it_has_the_parameters_of_vqgan(dim: int) -> None:
    """f16, with the 256 channels at the latents of the paper, and the 8 of LlamaGen's tokenizer, which has 72 M."""
    with torch.device("meta"):
        theirs = VQModel(**arguments(VQGAN, dim), num_vq_embeddings=16384, vq_embed_dim=dim)
        ours = Encoder(VQGAN, 3, dim, False), Decoder(VQGAN, dim, 3, False)
    count = sum(p.numel() for p in theirs.parameters())
    assert round(count / 1e6) == {8: 72, 256: 76}[dim]
    theirs.quantize = nn.Identity()  # its codes, which are a buffer here
    assert shapes(*ours) == shapes(theirs)


def test_it_has_the_parameters_of_the_autoencoder_of_stable_diffusion() -> None:
    with torch.device("meta"):
        theirs = AutoencoderKL(**arguments(KL, 4))
        ours = Encoder(KL, 3, 8, False), Decoder(KL, 4, 3, False)
    assert shapes(*ours) == shapes(theirs)
    assert sum(p.numel() for net in ours for p in net.parameters()) == 83_653_863


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (Config(channels=48), "model.network.channels=48 must be a multiple of the 32 groups"),
        (Config(multipliers=[]), "must have one number for each resolution"),
        (Config(multipliers=[1, 2]), r"attention=\[16\]: the network has no resolution 16 times smaller .* only 1, 2$"),
    ],
)
def test_settings_that_do_not_fit_are_one_sentence(config: Config, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Encoder(config, 3, 8, False)
