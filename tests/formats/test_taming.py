"""The weights of taming-transformers, latent diffusion and LlamaGen, against reference networks."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.formats.references import LLAMAGEN, TAMING, Names, Tokenizer, images, model_of, perturb, put
from vaescale.config import ConfigError
from vaescale.formats.llamagen import from_llamagen, to_llamagen
from vaescale.formats.taming import from_taming, to_taming
from vaescale.interfaces import Batch, Codec
from vaescale.settings import shape

CLOSE: dict[str, Any] = {"rtol": 0, "atol": 1e-4}
SMALL = (32, [1, 2, 2], 1, [0, 2])  # channels, multipliers, blocks, resolutions with attention
WIDE = (128, [1, 2], 2, [1])  # as LlamaGen's, but for the number of resolutions
BATCH = images(2, 16, 24)
ARGUMENTS = {
    "taming": (TAMING, SMALL, 12, 6, 50),
    "deeper codes": (TAMING, SMALL, 6, 6, 50),
    "latent diffusion": (TAMING, SMALL, 4, 4, 0),
    "LlamaGen": (LLAMAGEN, WIDE, 16, 8, 50),
}


def reference(arguments: tuple[Names, Any, int, int, int], trained: bool) -> Tokenizer:
    torch.manual_seed(0)
    theirs = Tokenizer(*arguments)
    if trained:
        perturb(theirs)
    if arguments[-1]:  # codes as far apart as what is quantised, so that many are used
        z = theirs.z(pixels(BATCH)).movedim(1, -1).flatten(0, -2)
        weight = theirs.quantize.embedding.weight
        weight.data = z.mean(0) + z.std(0) * torch.randn(weight.shape)
    return theirs


def pixels(batch: Batch) -> Tensor:
    return batch.x / 127.5 - 1


def compare(ours: Codec, theirs: Tokenizer) -> None:
    with torch.no_grad():
        (latents,) = ours.encode(BATCH)
        decoded = ours.decode([latents])
        if hasattr(theirs, "quantize"):
            codes = theirs.codes(pixels(BATCH))
            assert len(codes.unique()) > 5
            assert torch.equal(latents, codes)
            z = theirs.codebook()[codes].movedim(-1, 1)
        else:
            z = theirs.z(pixels(BATCH)).chunk(2, dim=1)[0]
            torch.testing.assert_close(latents, z, **CLOSE)
        torch.testing.assert_close(decoded, (theirs.images(z) + 1) / 2, **CLOSE)
    assert decoded.std() > 0.01


@pytest.mark.parametrize("trained", [False, True], ids=["random", "trained"])
@pytest.mark.parametrize("case", ARGUMENTS)
def test_with_their_weights_codes_latents_and_images_are_theirs(case: str, trained: bool, tmp_path: Path) -> None:
    theirs = reference(ARGUMENTS[case], trained)
    section, weights = (from_llamagen if case == "LlamaGen" else from_taming)(theirs.state_dict())
    compare(put(model_of(section, tmp_path)[1], weights), theirs)


@pytest.mark.parametrize("case", ARGUMENTS)
def test_with_our_weights_theirs_compute_what_ours_do_and_the_weights_come_back(case: str, tmp_path: Path) -> None:
    """Every tensor of theirs is given: `load_state_dict` is strict."""
    theirs = reference(ARGUMENTS[case], trained=True)
    convert, export = (from_llamagen, to_llamagen) if case == "LlamaGen" else (from_taming, to_taming)
    section, weights = convert(theirs.state_dict())
    config, ours = model_of(section, tmp_path)
    put(ours, weights)
    perturb(ours, seed=2)
    tensors, arguments = export(config.model, shape(config), ours.state_dict())
    theirs.load_state_dict(tensors)
    compare(ours, theirs)
    again, back = convert(tensors)
    assert again == section
    state = ours.state_dict()
    for name, tensor in back.items():
        torch.testing.assert_close(tensor, state[name], rtol=0, atol=1e-6 if name == "quantizer.codebook" else 0)
    names, (channels, multipliers, blocks, attention), z, dim, codes = ARGUMENTS[case]
    if names is LLAMAGEN:
        both = {"encoder_ch_mult": multipliers, "decoder_ch_mult": multipliers}
        assert arguments == {"codebook_size": codes, "codebook_embed_dim": dim, "z_channels": z, **both}
        return
    assert arguments["target"].endswith("VQModel" if codes else "AutoencoderKL")
    parameters = arguments["params"]
    assert (parameters["embed_dim"], parameters.get("n_embed", 0)) == (dim, codes)
    assert parameters["lossconfig"] == {"target": "torch.nn.Identity"}
    assert parameters["ddconfig"] == {
        **{"ch": channels, "ch_mult": multipliers, "num_res_blocks": blocks, "z_channels": z, "double_z": not codes},
        **{"resolution": 32, "attn_resolutions": [32 >> level for level in attention], "dropout": 0.0},
        **{"in_channels": 3, "out_ch": 3},
    }


def test_the_linear_maps_of_a_narrow_codebook_become_part_of_the_convolutions(tmp_path: Path) -> None:
    network = {"kind": "vqgan", "channels": 32, "multipliers": [1, 2], "blocks": 1, "attention": []}
    quantizer = {"codebook_size": 50, "dim": 16, "codebook_dim": 4, "metric": "cosine"}
    config, ours = model_of({"kind": "vqvae", "network": network, "quantizer": quantizer}, tmp_path)
    perturb(ours)
    tensors, arguments = to_taming(config.model, shape(config), ours.state_dict())
    assert (arguments["params"]["embed_dim"], arguments["params"]["ddconfig"]["z_channels"]) == (4, 16)
    theirs = Tokenizer(TAMING, (32, [1, 2], 1, []), 16, 4, 50)
    theirs.load_state_dict(tensors)
    assert isinstance(ours, Codec)
    compare(ours, theirs)  # Euclidean distances to codes of length 1 are least where the cosine is greatest


def test_a_decoder_that_changes_the_channels_of_kl_latents_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"post_quant_conv maps 4 channels to 8, but in model\.kind=kl both are"):
        from_taming(reference((TAMING, SMALL, 8, 4, 0), False).state_dict())


def test_a_kl_autoencoder_is_not_of_llamagen() -> None:
    with pytest.raises(
        ConfigError, match=r"not the weights of a tokenizer of LlamaGen: quantize\.embedding\.weight is"
    ):
        from_llamagen(reference((LLAMAGEN, (32, [1, 1], 1, [1]), 4, 4, 0), False).state_dict())


VQ = {"kind": "vqvae", "network": {"kind": "vqgan", "channels": 128, "multipliers": [1, 1], "attention": [2]}}
UNIT = {"codebook_size": 8, "dim": 4, "metric": "cosine"}


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"quantizer": {**UNIT, "metric": "euclidean"}}, "model.quantizer.metric=euclidean"),
        ({"network": {**VQ["network"], "channels": 64}}, "model.network.channels=64"),
        ({"network": {**VQ["network"], "blocks": 1}}, "model.network.blocks=1"),
        ({"network": {**VQ["network"], "attention": [1, 2]}}, r"model.network.attention=\[1, 2\]"),
    ],
)
def test_what_llamagen_cannot_have_is_refused(changed: dict[str, Any], named: str, tmp_path: Path) -> None:
    config, ours = model_of({**VQ, "quantizer": UNIT, **changed}, tmp_path)
    with pytest.raises(ConfigError, match=f"^{named} has no counterpart in LlamaGen: only "):
        to_llamagen(config.model, shape(config), ours.state_dict())
