"""Codecs of others: networks of diffusers, and the Python file of the page."""

import re
import sys
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import scipy.fft
import torch
from safetensors.torch import load, save_file
from torch import Tensor

from vaescale.data import stream
from vaescale.evaluation import codecs
from vaescale.evaluation.compare import Refused
from vaescale.evaluation.evaluate import evaluate
from vaescale.interfaces import Batch, Codebooks, Codec

CPU = torch.device("cpu")
PAGE = Path(codecs.__file__).parent / "README.md"

BLOCKS = {"block_out_channels": (8, 8), "layers_per_block": 1, "norm_num_groups": 2}
LEVELS = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
BOTH = ("encoder", "decoder")
NETWORKS: dict[str, dict[str, Any]] = {
    "VQModel": {**BLOCKS, **LEVELS, "latent_channels": 3, "num_vq_embeddings": 16, "vq_embed_dim": 4},
    "AutoencoderKL": {**BLOCKS, **LEVELS, "latent_channels": 4},
    "AutoencoderTiny": {
        **{f"{side}_block_out_channels": (8, 8) for side in BOTH},
        **{f"num_{side}_blocks": (1, 1) for side in BOTH},
        "latent_channels": 4,
    },
    "AutoencoderDC": {
        **{f"{side}_block_out_channels": (8, 8) for side in BOTH},
        **{f"{side}_layers_per_block": (1, 1) for side in BOTH},
        **{f"{side}_qkv_multiscales": ((), ()) for side in BOTH},
        **{f"{side}_block_types": "ResBlock" for side in BOTH},
        "latent_channels": 4,
        "attention_head_dim": 4,
    },
}


def saved(name: str, folder: Path, **changed: Any) -> Any:
    """Saves a small network with random weights. Returns it."""
    torch.manual_seed(0)
    net = getattr(diffusers, name)(**(NETWORKS[name] | changed)).eval()
    if name == "VQModel":
        net.quantize.embedding.weight.data.normal_(std=0.3)
    net.save_pretrained(folder)
    return net


def page_file(path: Path) -> Path:
    """Writes the Python file that the page shows."""
    (text,) = re.findall(r"^    # lowest\.py\n((?:    .*\n|\n)+)", PAGE.read_text(), re.MULTILINE)
    path.write_text("".join(line.removeprefix("    ") for line in text.splitlines(keepends=True)))
    return path


@pytest.fixture
def slices(pictures: Path) -> stream.ValidationSlices:
    return stream.ValidationSlices(stream.Config(root=str(pictures), size=16, workers=0))


def rounded(y: Tensor) -> np.ndarray:
    """[−1, 1] → 8 bits, in fp64."""
    return ((y.double().numpy().clip(-1, 1) + 1) * 127.5).round()


def psnr(y: np.ndarray, x: Tensor) -> float:
    error = ((y - x.double().numpy()) / 255) ** 2
    return float(np.mean(-10 * np.log10(error.mean(axis=(1, 2, 3)))))


@torch.no_grad()
def direct(net: Any, x: Tensor) -> Tensor:
    """What diffusers makes of images in [−1, 1]."""
    if isinstance(net, diffusers.AutoencoderTiny):  # its `forward` also rounds the latents to 8 bits
        return net.decode(net.encode(x).latents).sample
    return net(x).sample


@pytest.mark.parametrize("name", NETWORKS)
def test_numbers_are_those_of_direct_calls(slices: stream.ValidationSlices, tmp_path: Path, name: str) -> None:
    net = saved(name, tmp_path)
    foreign = codecs.read(f"diffusers:{tmp_path}", CPU)
    assert foreign.model == f"diffusers {name}"
    assert foreign.name == f"diffusers:{tmp_path}"
    assert not any(module.training for module in foreign.codec.modules())
    x = slices[range(11)].batch.x
    found = evaluate(foreign.codec, slices, CPU, micro=4)
    expected = rounded(direct(net, x.float() / 127.5 - 1))
    assert expected.std() > 2  # of 255: the reconstructions are not constant
    assert found["psnr"] == pytest.approx(psnr(expected, x), abs=2e-3)
    assert ("usage" in found) == isinstance(foreign.codec, Codebooks) == (name == "VQModel")


@pytest.mark.parametrize(
    "changed",
    [{}, {"lookup_from_codebook": True}, {"norm_type": "spatial", "block_out_channels": (32, 32), "vq_embed_dim": 3}],
)
def test_codes_are_those_of_diffusers(slices: stream.ValidationSlices, tmp_path: Path, changed: dict[str, Any]) -> None:
    net = saved("VQModel", tmp_path, **changed)
    codec = codecs.read(f"diffusers:{tmp_path}", CPU).codec
    batch = slices[range(11)].batch
    with torch.no_grad():
        (codes,) = codec.encode(batch)
        y = codec.decode([codes])
        z = net.encode(batch.x.float() / 127.5 - 1).latents
        distances = (z[:, None].double() - net.quantize.embedding.weight[None, :, :, None, None].double()).norm(dim=2)
        entries = net.quantize.embedding.weight[codes].permute(0, 3, 1, 2)
        quantised = net.decode(entries).sample
    assert codes.dtype == torch.int64
    assert torch.equal(codes, distances.argmin(1))
    assert torch.allclose(y, (quantised + 1) / 2, atol=1e-5)
    found = evaluate(codec, slices, CPU, micro=4)
    share = np.bincount(codes.flatten().numpy(), minlength=16) / codes.numel()
    assert (share > 0).sum() > 3
    assert found["usage"] == (share > 0).mean()
    assert found["perplexity"] == pytest.approx(np.exp(-np.sum(share[share > 0] * np.log(share[share > 0]))))


def test_latents_are_means_or_draws_with_their_deviation(slices: stream.ValidationSlices, tmp_path: Path) -> None:
    net = saved("AutoencoderKL", tmp_path)
    codec = codecs.read(f"diffusers:{tmp_path}", CPU).codec
    batch = slices[range(4)].batch
    with torch.no_grad():
        posterior = net.encode(batch.x.float() / 127.5 - 1).latent_dist
        (mean,) = codec.encode(batch)
        draws = torch.stack([codec.encode(batch, 0.5)[0] for _ in range(400)])
    assert torch.equal(mean, posterior.mean)
    ratio = (draws - mean).square().mean(0).sqrt() / posterior.std
    assert float(ratio.mean()) == pytest.approx(0.5, abs=0.01)
    with pytest.raises(ValueError, match="no prior"):
        codec.decode([], batch.condition)


def test_the_hash_changes_with_weights_and_settings(tmp_path: Path) -> None:
    saved("VQModel", tmp_path)
    text = f"diffusers:{tmp_path}"
    hashes = [codecs.read(text, CPU).weights, codecs.read(text, CPU).weights]
    assert hashes[0] == hashes[1]
    saved("VQModel", tmp_path, norm_num_groups=4)  # as many weights
    hashes.append(codecs.read(text, CPU).weights)
    weights = load((tmp_path / codecs.WEIGHTS).read_bytes())
    weights["quantize.embedding.weight"][3, 2] += 1
    save_file(weights, tmp_path / codecs.WEIGHTS)
    hashes.append(codecs.read(text, CPU).weights)
    assert len(set(hashes)) == 3


def test_the_file_of_the_page_keeps_the_lowest_frequencies(slices: stream.ValidationSlices, tmp_path: Path) -> None:
    """Compared with scipy's DCT in fp64."""
    file = page_file(tmp_path / "lowest.py")
    assert len(file.read_text().splitlines()) <= 24
    foreign = codecs.read(f"python:{file}:LowestFrequencies", CPU)
    assert (foreign.model, foreign.weights) == ("LowestFrequencies", None)
    x = slices[range(11)].batch.x
    blocks = x.double().numpy().reshape(11, 3, 2, 8, 2, 8)
    waves = scipy.fft.dctn(blocks, axes=(3, 5), norm="ortho")
    v, u = np.mgrid[:8, :8]
    kept = (u + v < 4)[:, None, :]  # 10 of 64
    y = scipy.fft.idctn(waves * kept, axes=(3, 5), norm="ortho").reshape(x.shape)
    found = evaluate(foreign.codec, slices, CPU, micro=4)
    assert found["psnr"] == pytest.approx(psnr(y.clip(0, 255).round(), x), abs=2e-3)
    latents = foreign.codec.encode(slices[range(2)].batch)
    assert [one.shape for one in latents] == [(2, 30, 2, 2)]


def test_a_python_file_imports_its_neighbours_and_may_hold_an_object(
    slices: stream.ValidationSlices, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.path", ["", *sys.path])
    (tmp_path / "beside_own.py").write_text("FACTOR = 255\n")
    (tmp_path / "own.py").write_text(
        "from __future__ import annotations\n"
        "from dataclasses import dataclass\n"
        "from beside_own import FACTOR\n"
        "@dataclass\n"
        "class Own:\n"
        "    factor: float\n"
        "    def encode(self, batch, temperature=0.0):\n"
        "        return [batch.x.float()]\n"
        "    def decode(self, latents, condition=None, **others):\n"
        "        return latents[0] / self.factor\n"
        "codec = Own(FACTOR)\n"
        "nothing = 3\n"
    )
    foreign = codecs.read(f"python:{tmp_path / 'own.py'}:codec", CPU)
    assert isinstance(foreign.codec, Codec)
    assert foreign.model == "Own"
    assert evaluate(foreign.codec, slices, CPU)["mse"] == 0
    with pytest.raises(Refused, match="has no nothing with the methods encode and decode"):
        codecs.read(f"python:{tmp_path / 'own.py'}:nothing", CPU)


def test_what_is_no_codec_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = page_file(tmp_path / "lowest.py")
    other, damaged, empty = tmp_path / "other", tmp_path / "damaged", tmp_path / "empty"
    for folder in (other, damaged, empty):
        folder.mkdir()
    (other / codecs.CONFIG).write_text('{"_class_name": "UNet2DModel"}')
    (damaged / codecs.CONFIG).write_text("{")
    (empty / codecs.CONFIG).write_text('{"_class_name": "VQModel"}')
    cases = {
        "x": "is neither diffusers:FOLDER nor python:FILE.py:NAME",
        f"python:{file}": "is neither diffusers:FOLDER nor python:FILE.py:NAME",
        f"python:{tmp_path / 'none.py'}:A": "none.py is not a Python file",
        f"python:{file}:absent": "has no absent with the methods encode and decode",
        f"diffusers:{tmp_path / 'none'}": "config.json cannot be read (No such file or directory): give a local folder",
        f"diffusers:{other}": "holds a network of class UNet2DModel, not VQModel, AutoencoderKL",
        f"diffusers:{damaged}": "config.json is damaged (it is not JSON",
        f"diffusers:{empty}": "cannot be read (Error no file named diffusion_pytorch_model.safetensors",
    }
    for text, words in cases.items():
        assert words in refusal(text)
    monkeypatch.setitem(sys.modules, "diffusers", None)
    assert "pip install 'vaescale[diffusers]'" in refusal(f"diffusers:{empty}")


def test_damaged_weights_are_one_sentence(slices: stream.ValidationSlices, tmp_path: Path) -> None:
    """Weights that are cut off, lack a tensor, have other shapes, or are pickled."""
    net = saved("AutoencoderTiny", tmp_path)
    text, file = f"diffusers:{tmp_path}", tmp_path / codecs.WEIGHTS
    tensors = load(whole := file.read_bytes())
    with pytest.raises(Refused, match=r"takes images of 3 channel\(s\), not of 1: give data.channels=3"):
        codecs.read(text, CPU).codec.encode(grey(slices))
    first = min(tensors)
    file.write_bytes(whole[: len(whole) // 2])
    assert "cannot be read (" in refusal(text)
    save_file({name: tensor for name, tensor in tensors.items() if name != first}, file)
    assert f"lacks {first}: copy the folder again" in refusal(text)
    save_file(tensors | {first: torch.zeros(1)}, file)
    assert "cannot be read (" in refusal(text)
    file.unlink()
    torch.save(net.state_dict(), tmp_path / "diffusion_pytorch_model.bin")
    assert "cannot be read (" in refusal(text)


def grey(slices: stream.ValidationSlices) -> Batch:
    batch = slices[range(2)].batch
    return batch._replace(x=batch.x[:, :1])


def refusal(text: str) -> str:
    """Returns the sentence with which a codec is refused."""
    with pytest.raises(Refused) as caught:
        codecs.read(text, CPU)
    assert "\n" not in str(caught.value)
    return str(caught.value)
