"""The weights of diffusers' networks load here and ours there, and both compute the same."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, VQModel
from torch import Tensor

from tests.formats.references import images, model_of, perturb, put
from tests.nn.test_vqgan import KL as STABLE_DIFFUSION
from tests.nn.test_vqgan import VQGAN, arguments
from vaescale.config import ConfigError
from vaescale.formats.diffusers import from_diffusers, to_diffusers
from vaescale.formats.keys import Net, inferred, rows
from vaescale.interfaces import Codec
from vaescale.settings import shape

CLOSE: dict[str, Any] = {"rtol": 0, "atol": 1e-4}
BATCH = images(2, 16, 24)
BLOCKS: dict[str, Any] = {
    "block_out_channels": (32, 64, 64),
    "down_block_types": ("AttnDownEncoderBlock2D", "DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
    "up_block_types": ("AttnUpDecoderBlock2D", "UpDecoderBlock2D", "AttnUpDecoderBlock2D"),
}
VQ = {**BLOCKS, "layers_per_block": 1, "latent_channels": 12, "num_vq_embeddings": 50, "vq_embed_dim": 6}
KL = {**BLOCKS, "layers_per_block": 2, "latent_channels": 4}
NETWORK = {"kind": "vqgan", "channels": 32, "multipliers": [1, 2], "blocks": 1, "attention": [2]}
MODELS: dict[str, dict[str, Any]] = {
    "euclidean": {
        "kind": "vqvae",
        "network": {**NETWORK, "z_channels": 8},
        "quantizer": {"codebook_size": 50, "dim": 4},
    },
    "cosine": {
        "kind": "vqvae",
        "network": NETWORK,
        "quantizer": {"codebook_size": 50, "dim": 16, "codebook_dim": 4, "metric": "cosine"},
    },
    "kl": {"kind": "kl", "latent_dim": 3, "network": NETWORK, "reconstruction": {"l1": 1.0}},
    "likelihood": {"kind": "kl", "latent_dim": 3, "network": NETWORK},
}


def theirs_of(cls: Any, given: dict[str, Any], trained: bool) -> Any:
    torch.manual_seed(0)
    net = cls(**given).eval().requires_grad_(False)
    if trained:
        perturb(net)
    if cls is VQModel:  # codes as far apart as what is quantised, so that many are used
        z = net.encode(BATCH.x / 127.5 - 1).latents.movedim(1, -1).flatten(0, -2)
        weight = net.quantize.embedding.weight
        weight.data = z.mean(0) + z.std(0) * torch.randn(weight.shape)
    return net


def compare(ours: Codec, net: Any) -> None:
    with torch.no_grad():
        (latents,) = ours.encode(BATCH)
        decoded = ours.decode([latents])
        found = net.encode(BATCH.x / 127.5 - 1)
        if isinstance(net, VQModel):
            _, _, (_, _, codes) = net.quantize(found.latents)
            assert len(codes.unique()) > 5
            assert torch.equal(latents.flatten(), codes.flatten())
            expected = net.decode(found.latents).sample
        else:
            torch.testing.assert_close(latents, found.latent_dist.mean, **CLOSE)
            expected = net.decode(latents).sample
    torch.testing.assert_close(decoded, (expected + 1) / 2, **CLOSE)
    assert decoded.std() > 0.01


@pytest.mark.parametrize("trained", [False, True], ids=["random", "trained"])
@pytest.mark.parametrize(("cls", "given"), [(VQModel, VQ), (AutoencoderKL, KL)])
def test_with_their_weights_codes_latents_and_images_are_theirs(
    cls: Any, given: dict[str, Any], trained: bool, tmp_path: Path
) -> None:
    net = theirs_of(cls, given, trained)
    section, weights = from_diffusers(net.state_dict(), json.loads(net.to_json_string()))
    config, ours = model_of(section, tmp_path)
    compare(put(ours, weights), net)
    # And back: the same tensors and config.
    tensors, written = to_diffusers(config.model, shape(config), ours.state_dict())
    assert tensors.keys() == net.state_dict().keys()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in net.state_dict().items())
    own = json.loads(net.to_json_string())
    free = {name for name in written if name.startswith(("scaling", "shift", "latents_"))}  # tested below
    assert {name: written[name] for name in written.keys() - free} == {
        name: own[name] for name in written.keys() - free
    }


@pytest.mark.parametrize(
    ("cls", "net", "more"),
    [
        (AutoencoderKL, Net(STABLE_DIFFUSION, 3, 4), {}),
        (VQModel, Net(VQGAN, 3, 8, 16384), {"num_vq_embeddings": 16384, "vq_embed_dim": 8}),
    ],
)
def test_the_tables_name_the_weights_of_published_sizes(cls: Any, net: Net, more: dict[str, int]) -> None:
    with torch.device("meta"):
        theirs = cls(**arguments(net.network, net.dim), **more).state_dict()
    named = {row.theirs: row.their_shape for row in rows(net, "diffusers")}
    assert named == {name: tuple(tensor.shape) for name, tensor in theirs.items()}
    assert inferred(theirs, "diffusers") == net


@pytest.mark.parametrize("name", MODELS)
def test_with_our_weights_theirs_compute_what_ours_do(name: str, tmp_path: Path) -> None:
    config, ours = model_of(MODELS[name], tmp_path)
    perturb(ours)
    tensors, written = to_diffusers(config.model, shape(config), ours.state_dict())
    cls = {"VQModel": VQModel, "AutoencoderKL": AutoencoderKL}[written["_class_name"]]
    net = cls.from_config(written).eval()
    net.load_state_dict(tensors)
    assert isinstance(ours, Codec)
    compare(ours, net)


def measured(tmp_path: Path) -> tuple[Any, dict[str, Tensor], Tensor, Tensor]:
    config, ours = model_of(MODELS["kl"], tmp_path)
    mean, std = torch.tensor([0.5, -1.0, 2.0]), torch.tensor([1.0, 3.0, 0.5])
    return config, {**ours.state_dict(), "latent_mean": mean, "latent_std": std}, mean, std


def test_each_formula_of_diffusers_normalises_our_latents(tmp_path: Path) -> None:
    config, state, mean, std = measured(tmp_path)
    tensors, written = to_diffusers(config.model, shape(config), state)
    torch.manual_seed(0)
    z = mean + std * torch.randn(200_000, 3)
    scale, shift = written["scaling_factor"], written["shift_factor"]
    assert ((z - shift) * scale).std() == pytest.approx(1, abs=0.01)
    assert ((z - shift) * scale).mean() == pytest.approx(0, abs=0.01)
    each = (z - torch.tensor(written["latents_mean"])) * scale / torch.tensor(written["latents_std"])
    torch.testing.assert_close(each, (z - mean) / std)
    back = from_diffusers(tensors, written)[1]
    torch.testing.assert_close((back["latent_mean"], back["latent_std"]), (mean, std))


def test_statistics_are_those_by_which_their_code_normalises(tmp_path: Path) -> None:
    config, state, *_ = measured(tmp_path)
    tensors, written = to_diffusers(config.model, shape(config), state)
    plain = {name: value for name, value in written.items() if not name.startswith(("scal", "shift", "latents_"))}
    for given, mean, std in (
        ({}, 0, 1 / 0.18215),
        ({"scaling_factor": 0.5}, 0, 2),
        ({"scaling_factor": 0.5, "shift_factor": 0.25, "latents_mean": None}, 0.25, 2),
        ({"scaling_factor": 0.5, "latents_mean": [1, 1, 1], "latents_std": [3, 3, 3]}, 1, 6),
    ):
        weights = from_diffusers(tensors, {**plain, **given})[1]
        assert weights["latent_mean"].tolist() == pytest.approx([mean] * 3)
        assert weights["latent_std"].tolist() == pytest.approx([std] * 3)
    unmeasured = {"latent_mean": torch.full((3,), torch.inf), "latent_std": torch.full((3,), torch.inf)}
    tensors, written = to_diffusers(config.model, shape(config), {**state, **unmeasured})
    assert (written["scaling_factor"], "shift_factor" in written) == (1.0, False)
    assert "latent_mean" not in from_diffusers(tensors, written)[1]


def test_former_names_and_omitted_convolutions_are_read(tmp_path: Path) -> None:
    """Stable Diffusion's file has names from before version 0.18, and the later ones omit the 1×1 convolutions."""
    net = theirs_of(AutoencoderKL, {**KL, "use_quant_conv": False, "use_post_quant_conv": False}, trained=True)
    state = net.state_dict()
    for former, name in (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0")):
        state = {key.replace(f".{name}.", f".{former}."): tensor for key, tensor in state.items()}
    assert not state.keys() & {name for name in net.state_dict() if ".to_" in name}
    section, weights = from_diffusers(state, json.loads(net.to_json_string()))
    compare(put(model_of(section, tmp_path)[1], weights), net)


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"norm_num_groups": 16}, "norm_num_groups=16 has no counterpart here, only norm_num_groups=32"),
        ({"act_fn": "gelu"}, "act_fn=gelu has no counterpart"),
        ({"norm_type": "spatial"}, "norm_type=spatial has no counterpart"),
        ({"mid_block_add_attention": False}, "mid_block_add_attention=False has no counterpart"),
        ({"_class_name": "VQModel"}, "_class_name=VQModel, but these are weights of class AutoencoderKL"),
        ({"scaling_factor": "1"}, r"scaling_factor=1 must be 1 finite number\(s\)"),
        ({"scaling_factor": float("nan")}, "scaling_factor=nan must be"),
        ({"scaling_factor": 0}, "scaling_factor and latents_std must be above 0"),
        ({"latents_mean": [1], "latents_std": [1, 1, 1]}, r"latents_mean=\[1\] must be 3 finite"),
    ],
)
def test_a_config_that_does_not_fit_is_one_sentence(changed: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    config, ours = model_of(MODELS["kl"], tmp_path)
    tensors, written = to_diffusers(config.model, shape(config), ours.state_dict())
    with pytest.raises(ConfigError, match=f"^config.json: {sentence}"):
        from_diffusers(tensors, {**written, **changed})


@pytest.mark.parametrize(
    ("section", "named"),
    [
        ({"kind": "vae"}, "model.kind=vae"),
        ({"kind": "vqvae", "network": {"kind": "conv"}}, "model.network.kind=conv"),
        ({"kind": "kl", "network": {"kind": "vit", "patch": 8, "width": 32, "heads": 2}}, "model.network.kind=vit"),
        ({"kind": "kl", "network": {**NETWORK, "z_channels": 8}}, "model.network.z_channels=8"),
        ({"kind": "kl", "network": NETWORK, "likelihood": {"kind": "bernoulli"}}, "model.likelihood.kind=bernoulli"),
        ({"kind": "vqvae", "network": {**NETWORK, "multipliers": [2, 2]}}, r"model.network.multipliers=\[2, 2\]"),
        *(
            ({"kind": "vqvae", "network": NETWORK, "quantizer": quantizer}, f"model.quantizer.{named}")
            for quantizer, named in (
                ({"depth": 2}, "depth=2"),
                ({"groups": 2}, "groups=2"),
                ({"kind": "simvq"}, "kind=simvq"),
                ({"kind": "fsq", "codebook_size": 9, "dim": 2, "levels": [3, 3]}, "kind=fsq"),
                ({"kind": "lfq", "codebook_size": 16, "dim": 4}, "kind=lfq"),
            )
        ),
    ],
)
def test_a_model_that_diffusers_cannot_have_is_one_sentence(
    section: dict[str, Any], named: str, tmp_path: Path
) -> None:
    config, ours = model_of(section, tmp_path)
    with pytest.raises(ConfigError, match=f"^{named} has no counterpart in "):
        to_diffusers(config.model, shape(config), ours.state_dict())
