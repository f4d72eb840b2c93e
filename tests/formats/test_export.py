"""The exported files: what is in them, who loads them, and what is refused."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib import metadata as packages
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from launch import export
from tests.conftest import ROOT
from tests.formats.references import LLAMAGEN, TAMING, Tokenizer, images, perturb
from vaescale import config as mechanics
from vaescale import settings
from vaescale.formats import write
from vaescale.interfaces import Codec, Model
from vaescale.lifecycle import checkpoint

Call = Callable[..., tuple[int, str, str]]
NETWORK = {"kind": "vqgan", "channels": 32, "multipliers": [1, 1], "blocks": 1, "attention": [2]}
VQ = {"kind": "vqvae", "network": NETWORK, "quantizer": {"codebook_size": 24, "dim": 4}}
KL = {"kind": "kl", "latent_dim": 3, "network": NETWORK}
UNIT = {
    "kind": "vqvae",
    "network": {**NETWORK, "channels": 128, "blocks": 2},
    "quantizer": {"codebook_size": 24, "dim": 4, "metric": "cosine"},
}
BATCH = images(2, 16, 16)
MORE_RANKS = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
WEIGHTS = "diffusion_pytorch_model.safetensors"


def make_run(run: Path, section: dict[str, Any], critic: bool = False) -> Model:
    """Saves a run with random weights, evaluated at its step. Returns its model."""
    run.mkdir()
    file = run / "config.yaml"
    file.write_text(json.dumps({"model": section, "data": {"size": 16, "root": "d"}, "version": settings.VERSION}))
    given = ["adversarial.weight=0.1", "adversarial.width=4", "adversarial.layers=1"] if critic else []
    config = settings.load(file, [f"run={run}", *given])
    mechanics.save(config, file)
    model = settings.build(config).eval().requires_grad_(False)
    perturb(model)
    tensors = {"ema": model.state_dict()}
    if judge := settings.build_critic(config):
        tensors["critic"] = judge.state_dict()
    state = {"step": 7, "noise": 1, "order": {"data": "f1n9e2"}}
    checkpoint.save(run / "checkpoints", 7, tensors, state, keep=1)
    (run / "evaluation.json").write_text(json.dumps({"step": 7, "psnr": 30.5, "protocol": {"crop": "center"}}))
    return model


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Runs the command in this process. Returns its exit code and output."""

    def call(*words: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["export", *map(str, words)])
        return export.main(export.parse()), *capsys.readouterr()

    return call


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


FRESH = """
import socket, sys

def refuse(*_, **__):
    raise SystemExit("used the network")

socket.socket.connect = socket.getaddrinfo = refuse
import torch
from diffusers import AutoencoderKL, VQModel
folder = sys.argv[1]
x = torch.load(f"{folder}/x.pt", weights_only=True)
with torch.no_grad():
    for cls in (VQModel, AutoencoderKL):
        net = cls.from_pretrained(f"{folder}/{cls.__name__}", local_files_only=True)
        found = net.encode(x)
        latents = found.latents if cls is VQModel else found.latent_dist.mean
        torch.save((latents, net.decode(latents).sample), f"{folder}/{cls.__name__}.pt")
"""


def test_diffusers_loads_the_folders_in_a_fresh_process_without_network(tmp_path: Path, call: Call) -> None:
    models = {"VQModel": make_run(tmp_path / "vq", VQ), "AutoencoderKL": make_run(tmp_path / "kl", KL)}
    for name, run in {"VQModel": "vq", "AutoencoderKL": "kl"}.items():
        code, out, _ = call("diffusers", tmp_path / run, tmp_path / name)
        assert code == 0
        assert [Path(line.split(":")[0]).name for line in out.splitlines()] == ["config.json", WEIGHTS]
    torch.save(BATCH.x / 127.5 - 1, tmp_path / "x.pt")
    subprocess.run([sys.executable, "-c", FRESH, tmp_path], check=True, cwd=ROOT)
    for name, ours in models.items():
        assert isinstance(ours, Codec)
        latents, decoded = torch.load(tmp_path / f"{name}.pt", weights_only=True)
        with torch.no_grad():
            (own,) = ours.encode(BATCH)
            expected = ours.decode([own])
        if name == "AutoencoderKL":
            torch.testing.assert_close(own, latents, rtol=0, atol=1e-4)
        torch.testing.assert_close((decoded + 1) / 2, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("library", ["taming", "llamagen"])
def test_the_file_of_the_other_libraries_is_a_whole_state_dict(library: str, tmp_path: Path, call: Call) -> None:
    make_run(tmp_path / "run", VQ if library == "taming" else UNIT)
    code, *_ = call(library, tmp_path / "run", tmp_path / "new" / "out.safetensors")
    assert code == 0
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out.safetensors"]
    net = (32, [1, 1], 1, [1]) if library == "taming" else (128, [1, 1], 2, [1])
    theirs = Tokenizer(TAMING if library == "taming" else LLAMAGEN, net, 4, 4, 24)
    theirs.load_state_dict(load_file(tmp_path / "new" / "out.safetensors"))
    found = json.loads(metadata_of(tmp_path / "new" / "out.safetensors")["network"])
    arguments = found["params"]["ddconfig"] if library == "taming" else found
    assert arguments["z_channels"] == 4


def test_the_metadata_says_what_the_weights_are(tmp_path: Path, call: Call) -> None:
    make_run(tmp_path / "run", VQ, critic=True)
    saved = settings.load(
        tmp_path / "run" / "config.yaml",
        [
            *(f"data.root={tmp_path}/images", f"init_from={tmp_path}/base", f"data.cache={tmp_path}/cache"),
            f"model.reconstruction.perceptual.weights={tmp_path}/vgg16.safetensors",
            f"deepspeed={{zero_optimization: {{offload_optimizer: {{nvme_path: {tmp_path}}}}}}}",
        ],
    )
    mechanics.save(saved, tmp_path / "run" / "config.yaml")
    evaluation = {"step": 7, "run": f"{tmp_path}/run", "data": f"{tmp_path}/images/val", "psnr": 30.5}
    (tmp_path / "run" / "evaluation.json").write_text(json.dumps(evaluation))
    assert call("diffusers", tmp_path / "run", tmp_path / "out")[0] == 0
    found = metadata_of(tmp_path / "out" / WEIGHTS)
    assert found.pop("vaescale") == packages.version("vaescale")
    assert json.loads(found.pop("evaluation")) == {"step": 7, "run": "run", "data": "images", "psnr": 30.5}
    assert not [path for path in (tmp_path / "out").iterdir() if str(tmp_path).encode() in path.read_bytes()]
    (tmp_path / "again.yaml").write_text(found.pop("settings"))
    again = settings.load(tmp_path / "again.yaml", [])
    names = ["run=run", "data.root=images", "init_from=base", "data.cache=~/.cache/vaescale"]
    names.append("model.reconstruction.perceptual.weights=vgg16.safetensors")
    plain = settings.load(tmp_path / "run" / "config.yaml", names)
    assert again == replace(plain, deepspeed={})
    assert found == {"format": "pt", "library": "diffusers", "step": "7", "data": "f1n9e2"}
    # The critic is there, too, with our names and what builds it.
    critic = settings.build_critic(again)
    assert critic is not None
    critic.load_state_dict(load_file(tmp_path / "out" / "critic.safetensors"))
    assert metadata_of(tmp_path / "out" / "critic.safetensors")["library"] == "vaescale"
    assert call("taming", tmp_path / "run", tmp_path / "x.safetensors")[0] == 0
    critic.load_state_dict(load_file(tmp_path / "x.critic.safetensors"))
    # An evaluation at another step is not that of these weights.
    (tmp_path / "run" / "evaluation.json").write_text('{"step": 6}')
    assert call("taming", tmp_path / "run", tmp_path / "x.safetensors")[0] == 0
    assert "evaluation" not in metadata_of(tmp_path / "x.safetensors")


def test_only_an_earlier_export_is_replaced(tmp_path: Path, call: Call) -> None:
    make_run(tmp_path / "run", VQ)
    out, file = tmp_path / "out", tmp_path / "out.safetensors"
    out.mkdir()  # empty: nothing can be lost
    for _ in range(2):
        assert call("diffusers", tmp_path / "run", out)[0] == 0
        assert call("taming", tmp_path / "run", file)[0] == 0
    (out / "notes.txt").touch()
    code, _, error = call("diffusers", tmp_path / "run", out)
    assert (code, error) == (2, f"error: {out} has notes.txt, which is not of an export: give another folder\n")
    (out / "notes.txt").unlink()
    before = (out / WEIGHTS).read_bytes()
    write.save({"x": torch.zeros(1)}, out / WEIGHTS, {"format": "pt"})
    write.save({"x": torch.zeros(1)}, file, {})
    for words in (("diffusers", out), ("taming", file), ("diffusers", file)):
        code, _, error = call(words[0], tmp_path / "run", words[1])
        assert (code, error) == (2, f"error: {words[1]} exists and is not an earlier export: give another name\n")
    assert len(load_file(file)) == 1
    assert before != (out / WEIGHTS).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.safetensors", "run"]


def test_an_export_that_fails_leaves_nothing(tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run(tmp_path / "run", VQ)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", str(tmp_path / "out"))

    monkeypatch.setattr(write, "save_file", full)
    for library, out in (("diffusers", "out"), ("taming", "out.safetensors")):
        code, _, error = call(library, tmp_path / "run", tmp_path / out)
        assert (code, error) == (2, f"error: {tmp_path / 'out'}: No space left on device\n")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_weights_and_critic_are_replaced_together(tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or neither, whichever cannot be written; so is a folder."""
    make_run(tmp_path / "run", VQ, critic=True)
    words = ("taming", tmp_path / "run", tmp_path / "x.safetensors")
    assert call(*words)[0] == 0
    assert call("diffusers", tmp_path / "run", tmp_path / "out")[0] == 0
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.safetensors")}
    make_run(tmp_path / "other", VQ, critic=True)
    left, save_file = [0], write.save_file

    def full(*given: Any) -> None:
        if not left[0]:
            raise OSError(28, "No space left on device", "x")
        left[0] -= 1
        save_file(*given)

    monkeypatch.setattr(write, "save_file", full)
    for left[0] in (0, 1):
        assert call(words[0], tmp_path / "other", words[2])[0] == 2
        assert call("taming", tmp_path / "other", tmp_path / "new.safetensors")[0] == 2
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.name == ".out.partial":
            raise OSError(5, "Input/output error", str(target))
        return rename(self, target)

    left[0] = 9
    monkeypatch.setattr(Path, "rename", failing)
    assert call("diffusers", tmp_path / "other", tmp_path / "out")[0] == 2
    assert {path.name for path in tmp_path.iterdir()} == {
        "run",
        "other",
        "out",
        "x.safetensors",
        "x.critic.safetensors",
    }
    assert all(path.read_bytes() == content for path, content in before.items())


def test_what_cannot_be_exported_is_one_sentence(tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run(tmp_path / "residual", {**VQ, "quantizer": {"codebook_size": 8, "dim": 4, "depth": 2}})
    make_run(tmp_path / "run", VQ)
    for words, sentence in (
        (("diffusers", tmp_path / "residual", tmp_path / "out"), "model.quantizer.depth=2 has no counterpart in"),
        (("taming", tmp_path / "run", tmp_path / "out"), f"{tmp_path / 'out'} must end in .safetensors"),
        (("llamagen", tmp_path / "run", tmp_path / "o.safetensors"), "model.network.channels=32 has no counterpart in"),
        (("diffusers", tmp_path, tmp_path / "out"), f"{tmp_path} is not a run directory"),
        (
            ("diffusers", tmp_path / "run", tmp_path / "out", "steps=3"),
            "steps=3: an export of weights takes no settings",
        ),
    ):
        code, _, error = call(*words)
        assert code == 2
        assert error.startswith(f"error: {sentence}")
    assert not (tmp_path / "out").exists()
    for name, value in MORE_RANKS.items():
        monkeypatch.setenv(name, value)
    assert "by one process: start the command with python" in call("taming", tmp_path / "run", tmp_path / "x")[2]
