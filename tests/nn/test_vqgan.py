"""The networks are those of diffusers, whose weights fit them under other names."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, VQModel
from torch import Tensor, nn

from vaescale.interfaces import Batch, Shape
from vaescale.models.vqvae import VQVAE
from vaescale.models.vqvae import Config as VQVAEConfig
from vaescale.nn import quantize
from vaescale.nn.vqgan import Attention, Config, Decoder, Double, Encoder, Halve, Residual

LAYERS = {  # a block's layers, here and there
    Residual: {"norm1": "norm1", "conv1": "conv1", "norm2": "norm2", "conv2": "conv2", "shortcut": "conv_shortcut"},
    Attention: {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "out": "to_out.0"},
    Halve: {"conv": "conv"},
    Double: {"conv": "conv"},
}


def places(config: Config, up: bool) -> Iterator[str]:
    """Yields the names that diffusers gives to the blocks of the decoder (`up`) or encoder, in our order."""
    middle = ["mid_block.resnets.0", "mid_block.attentions.0", "mid_block.resnets.1"]
    levels = len(config.multipliers)
    yield from middle if up else []
    for number in range(levels):
        level = levels - 1 - number if up else number
        stage = f"{'up' if up else 'down'}_blocks.{number}"
        for block in range(config.blocks + up):
            yield f"{stage}.resnets.{block}"
            if 2**level in config.attention:
                yield f"{stage}.attentions.{block}"
        if number < levels - 1:
            yield f"{stage}.{'up' if up else 'down'}samplers.0"
    yield from [] if up else middle


def names(net: Encoder | Decoder, config: Config) -> dict[str, str]:
    """Returns a layer's name here → its name in diffusers."""
    up = isinstance(net, Decoder)
    side, project = ("decoder", "post_quant_conv") if up else ("encoder", "quant_conv")
    found = {"first": f"{side}.conv_in", "norm": f"{side}.conv_norm_out", "last": f"{side}.conv_out"}
    found["project"] = project
    for number, (block, place) in enumerate(zip(net.blocks, places(config, up), strict=True)):
        found |= {f"blocks.{number}.{mine}": f"{side}.{place}.{theirs}" for mine, theirs in LAYERS[type(block)].items()}
    return found


def take_over(net: Encoder | Decoder, config: Config, theirs: dict[str, Tensor]) -> set[str]:
    """Loads weights of diffusers. Returns the names that were taken."""
    theirs_of = names(net, config)
    taken = {}
    for key in net.state_dict():
        layer, _, kind = key.rpartition(".")
        taken[key] = f"{theirs_of[layer]}.{kind}"
    net.load_state_dict({key: theirs[name] for key, name in taken.items()})
    return set(taken.values())


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
SMALL = Config(channels=32, multipliers=[1, 2, 2], blocks=1, attention=[4], z_channels=12)


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


@pytest.mark.parametrize("size", [(32, 32), (24, 40)])
def test_with_the_weights_of_diffusers_codes_and_images_are_theirs(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    theirs = VQModel(**arguments(SMALL, 6), num_vq_embeddings=50, vq_embed_dim=6).eval()
    theirs.quantize.embedding.weight.data.normal_(std=0.5)
    ours = VQVAE(VQVAEConfig(network=SMALL, quantizer=quantize.Config(codebook_size=50, dim=6)), Shape(3, 32)).eval()
    weights = theirs.state_dict()
    taken = take_over(ours.encoder, SMALL, weights) | take_over(ours.decoder, SMALL, weights)
    assert taken == weights.keys() - {"quantize.embedding.weight"}
    ours.quantizer.codebook.copy_(weights["quantize.embedding.weight"])

    x = torch.randint(0, 256, (3, 3, *size), dtype=torch.uint8)
    batch = Batch(x, torch.zeros(3, dtype=torch.int64), torch.zeros(3, 0), torch.arange(3))
    with torch.no_grad():
        (codes,) = ours.encode(batch)
        images = ours.decode([codes])
        latents = theirs.encode(x / 127.5 - 1).latents
        _, _, (_, _, expected) = theirs.quantize(latents)
        decoded = theirs.decode(latents).sample
    assert len(codes.unique()) > 5
    assert torch.equal(codes.flatten(), expected)
    torch.testing.assert_close(images, (decoded + 1) / 2, rtol=0, atol=1e-5)


def test_with_the_weights_of_diffusers_the_posterior_is_theirs() -> None:
    torch.manual_seed(0)
    config = Config(channels=32, multipliers=[1, 2, 2], blocks=2, attention=[])
    theirs = AutoencoderKL(**arguments(config, 4)).eval()
    encoder, decoder = Encoder(config, 3, 8, False), Decoder(config, 4, 3, False)
    weights = theirs.state_dict()
    assert take_over(encoder, config, weights) | take_over(decoder, config, weights) == weights.keys()
    x = torch.rand(2, 3, 32, 24)
    with torch.no_grad():
        posterior = theirs.encode(2 * x - 1).latent_dist
        decoded = theirs.decode(posterior.mean).sample
        output = encoder(x - 0.5)
        images = decoder(posterior.mean) + 0.5
    torch.testing.assert_close(output, torch.cat([posterior.mean, posterior.logvar], dim=1), rtol=0, atol=1e-5)
    torch.testing.assert_close(images, (decoded + 1) / 2, rtol=0, atol=1e-5)


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
