"""Encoders and decoders as programs, compared with the models that they are of."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch.export import ExportedProgram

import vaescale
from tests.formats.test_export import KL, NETWORK, VQ, Call, call, make_run
from vaescale.formats.program import Encoder, programs, write_onnx
from vaescale.interfaces import Batch
from vaescale.library import Trained

__all__ = ["call"]  # a fixture
CONV = {"width": 8, "residual_width": 4}
VIT = {"kind": "vit", "patch": 4, "width": 16, "depth": 1, "heads": 2, "head_channels": 4}
BLOCKS = {"width": 4, "halvings": 2, "hidden": 24}
QUANTIZER = {"codebook_size": 24, "dim": 4}
RESIDUAL = {"kind": "vqvae", "network": CONV, "quantizer": {**QUANTIZER, "depth": 2}}
MORE = {
    "conv-groups": {"kind": "vqvae", "network": CONV, "quantizer": {**QUANTIZER, "groups": 2, "metric": "cosine"}},
    "vqgan-fsq": {**VQ, "quantizer": {"kind": "fsq", "levels": [4, 3, 3], "codebook_size": 36, "dim": 3}},
    "vit-lfq": {"kind": "vqvae", "network": VIT, "quantizer": {"kind": "lfq", "codebook_size": 16, "dim": 4}},
    "kl": {**KL, "network": {**NETWORK, "attention": []}},
    "autoencoder": {"kind": "autoencoder", "latent_dim": 6, "network": BLOCKS},
    "vae": {"kind": "vae", "latent_dim": 6, "network": BLOCKS, "likelihood": {"kind": "bernoulli"}},
    "hvae": {"kind": "hvae", "latent_dim": 6, "top_latent_dim": 3, "network": BLOCKS},
}


def eager(model: Trained, count: int) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]:
    """(images in [0, 1], their latents, reconstructions)."""
    x = torch.randint(0, 256, (count, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(count))
    batch = Batch(x, torch.full((count,), -1), torch.zeros(count, 0), torch.arange(count))
    with torch.no_grad():
        latents = model.codec.encode(batch)
        return x / 255, latents, model.codec.decode(latents).clamp(0, 1)


def close(found: Any, wanted: torch.Tensor) -> None:
    """Codes are equal, other numbers within 1e-4."""
    found = torch.as_tensor(found)
    assert found.dtype == wanted.dtype
    tolerance = 1e-4 if wanted.is_floating_point() else 0
    torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance)


def check_onnx(model: Trained, out: Path) -> dict[str, str]:
    """Returns the metadata."""
    encoder, decoder = (onnxruntime.InferenceSession(str(out / f"{part}.onnx")) for part in ("encoder", "decoder"))
    assert [given.name for given in encoder.get_inputs()] == ["images"]
    assert encoder.get_inputs()[0].shape == ["batch", 3, 16, 16]
    names = [made.name for made in encoder.get_outputs()]
    assert [given.name for given in decoder.get_inputs()] == names
    for count in (1, 5):
        images, latents, reconstructions = eager(model, count)
        for found, wanted in zip(encoder.run(None, {"images": images.numpy()}), latents, strict=True):
            close(found, wanted)
        given = {name: level.numpy() for name, level in zip(names, latents, strict=True)}
        close(decoder.run(None, given)[0], reconstructions)
    return encoder.get_modelmeta().custom_metadata_map


def check_torch(model: Trained, encoder: ExportedProgram, decoder: ExportedProgram) -> None:
    for part in (encoder, decoder):  # no operation of this package, and nothing that is drawn
        assert not [node for node in part.graph.nodes if "vaescale" in str(node.target) or "rand" in str(node.target)]
    for count in (1, 5):
        images, latents, reconstructions = eager(model, count)
        for found, wanted in zip(encoder.module()(images), latents, strict=True):
            close(found.detach(), wanted)
        close(decoder.module()(*latents).detach(), reconstructions)


def test_programs_are_the_model(tmp_path: Path, call: Call) -> None:
    """With batches of 1 and 5. The other kinds of models are below. An earlier export is replaced, another is not."""
    run, out = tmp_path / "run", tmp_path / "out"
    make_run(run, RESIDUAL)
    model = vaescale.load(run)
    code, _, error = call("onnx", run, out)
    assert code == 0, error
    about = json.loads((out / "metadata.json").read_text())
    assert check_onnx(model, out) == about
    assert (about["library"], about["step"], about["data"]) == ("onnx", "7", "f1n9e2")
    code, _, error = call("torch", run, out)
    assert code == 0, error
    assert sorted(file.name for file in out.iterdir()) == ["decoder.pt2", "encoder.pt2", "metadata.json"]
    extra = {"metadata.json": ""}
    check_torch(model, *(torch.export.load(out / f"{part}.pt2", extra_files=extra) for part in ("encoder", "decoder")))
    assert json.loads(extra["metadata.json"])["library"] == "torch"
    (out / "metadata.json").write_text("[]")
    code, _, error = call("torch", run, out)
    assert code == 2
    assert "out exists and is not an earlier export: give another name" in error


@pytest.mark.long
@pytest.mark.parametrize("name", MORE)
def test_programs_of_each_kind_are_the_model(tmp_path: Path, name: str) -> None:
    make_run(tmp_path / "run", MORE[name])
    model = vaescale.load(tmp_path / "run")
    encoder, decoder, names = programs(model.codec, torch.zeros(2, 3, 16, 16))
    check_torch(model, encoder, decoder)
    write_onnx(encoder, tmp_path / "encoder.onnx", ["images"], names, {})
    write_onnx(decoder, tmp_path / "decoder.onnx", names, ["images"], {})
    check_onnx(model, tmp_path)


def test_float_images_are_rounded_to_8_bits(tmp_path: Path) -> None:
    """As those that `vaescale.load(…).encode` is given."""
    make_run(tmp_path / "run", RESIDUAL)
    model = vaescale.load(tmp_path / "run")
    x = np.random.default_rng(0).random((3, 3, 16, 16), np.float32)
    with torch.no_grad():
        found = Encoder(model.codec)(torch.from_numpy(x))
    assert all(torch.equal(one, other) for one, other in zip(found, model.encode(x), strict=True))


def test_what_needs_more_than_images_and_latents_is_refused(
    tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_run(tmp_path / "classes", {**MORE["vae"], "classes": 7})
    code, _, error = call("torch", tmp_path / "classes", tmp_path / "out")
    assert code == 2
    assert "model.classes=7: exported programs take images and latents, but no condition" in error
    make_run(tmp_path / "diffusion", {"kind": "diffusion", "width": 24, "depth": 1, "heads": 2})
    code, _, error = call("torch", tmp_path / "diffusion", tmp_path / "out")
    assert code == 2
    assert "model.kind=diffusion has no encoder and decoder of its own" in error
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    code, _, error = call("onnx", tmp_path / "classes", tmp_path / "out")
    assert code == 2
    assert "ONNX needs onnxscript: pip install 'vaescale[onnx]'" in error
    assert not (tmp_path / "out").exists()
