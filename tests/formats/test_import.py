"""Weights of others become runs, and nothing in a file of theirs can run code."""

import argparse
import json
import os
import pickle
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, VQModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from launch import weights as command
from tests.formats.references import LLAMAGEN, TAMING, Tokenizer, images, perturb
from vaescale import trained
from vaescale.config import ConfigError
from vaescale.data import stream
from vaescale.formats.imported import LIBRARIES, import_run
from vaescale.formats.read import PICKLED, read
from vaescale.interfaces import Calibrated, Codebooks, Codec, LatentStatistics, calibrated
from vaescale.lifecycle import checkpoint

BATCH = images(2, 32, 32)
SMALL = (32, [1, 2], 1, [1])
NETS: dict[str, Callable[[], Tokenizer]] = {
    "taming": lambda: Tokenizer(TAMING, SMALL, 6, 4, 20),
    "ldm": lambda: Tokenizer(TAMING, SMALL, 3, 3, 0),
    "llamagen": lambda: Tokenizer(LLAMAGEN, SMALL, 8, 4, 20),
}
BLOCKS = {
    "block_out_channels": (32, 64),
    "down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
    "up_block_types": ("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
    "layers_per_block": 1,
    "sample_size": 32,
}


def net_of(library: str) -> nn.Module:
    torch.manual_seed(0)
    net = NETS[library]()
    perturb(net)
    return net


@pytest.fixture(scope="module")
def states() -> dict[str, dict[str, Tensor]]:
    return {library: net_of(library).state_dict() for library in NETS}


def imported(library: str, source: Path, run: Path, *overrides: str) -> tuple[Any, list[str]]:
    """Returns the averaged model of a new run, and the remarks."""
    remarks = import_run(library, source, run, overrides)
    config = trained.read_config(run, [])
    model, step = trained.read_model(run, config, torch.device("cpu"))
    assert step == 0
    assert isinstance(model, Codec)
    return model, remarks


def same(ours: Any, library: str, net: Any) -> None:
    """The run computes what the network of others does."""
    with torch.no_grad():
        (latents,) = ours.encode(BATCH)
        if library == "ldm":
            z = net.z(BATCH.x / 127.5 - 1).chunk(2, 1)[0]
            torch.testing.assert_close(latents, z, rtol=0, atol=1e-4)
        else:
            assert torch.equal(latents, net.codes(BATCH.x / 127.5 - 1))
            z = net.codebook()[latents].movedim(-1, 1)
        torch.testing.assert_close(ours.decode([latents]), (net.images(z) + 1) / 2, rtol=0, atol=1e-4)


def lightning(state: dict[str, Tensor]) -> dict[str, Any]:
    return {"epoch": 3, "state_dict": state, "optimizer_states": [{"state": {0: {"step": torch.ones(())}}}]}


@pytest.mark.parametrize(
    ("library", "name", "wrapped"),
    [
        ("taming", "last.ckpt", lightning),
        ("ldm", "model.pth", lambda state: state),
        ("llamagen", "vq.pt", lambda state: {"model": state}),
        ("llamagen", "vq.pt", lambda state: {"ema": state, "model": {"x": torch.ones(1)}, "steps": 7}),
        ("taming", "model.safetensors", None),
    ],
)
def test_a_run_computes_what_the_network_of_others_does(
    library: str, name: str, wrapped: Any, states: dict[str, dict[str, Tensor]], tmp_path: Path
) -> None:
    state, file = states[library], tmp_path / name
    torch.save(wrapped(state), file) if wrapped else save_file(state, file)
    model, remarks = imported(library, file, tmp_path / "new" / "run", "data.size=32", "data.root=images")
    same(model, library, net_of(library))
    config = trained.read_config(tmp_path / "new" / "run", [])
    assert (config.data.root, config.data.size, config.data.channels) == ("images", 32, 3)
    assert isinstance(model, Calibrated)
    assert not calibrated(model)
    assert remarks[-1].startswith("what the file lacks (")
    found = checkpoint.newest(tmp_path / "new" / "run" / "checkpoints").path
    assert found is not None
    origin = json.loads((found / "state.json").read_text())["order"]
    assert (origin["imported"], origin["file"]) == (library, name)
    assert (found / "model.safetensors").read_bytes() == (found / "ema.safetensors").read_bytes()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["run"]


@pytest.mark.parametrize("name", ["model.safetensors", "model.bin"])
@pytest.mark.parametrize("kind", ["codes", "latents"])
def test_a_folder_of_diffusers(kind: str, name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = (
        VQModel(**BLOCKS, latent_channels=6, num_vq_embeddings=20, vq_embed_dim=4)
        if kind == "codes"
        else AutoencoderKL(**BLOCKS, latent_channels=3, scaling_factor=0.25, shift_factor=0.5)
    ).eval()
    perturb(net)
    net.save_pretrained(tmp_path / "theirs", safe_serialization=name == "model.safetensors")
    ours, remarks = imported("diffusers", tmp_path / "theirs", tmp_path / "run")
    assert trained.read_config(tmp_path / "run", []).data.size == 32
    with torch.no_grad():
        (latents,) = ours.encode(BATCH)
        theirs = net.encode(BATCH.x / 127.5 - 1)
        if kind == "codes":
            codes = net.quantize(theirs.latents)[2][2].view(latents.shape)
            assert torch.equal(latents, codes)
            decoded = net.decode(theirs.latents).sample
        else:
            assert remarks == []
            assert isinstance(ours, LatentStatistics)
            mean, std = ours.latent_statistics()
            assert torch.equal(mean, torch.full((3,), 0.5))
            assert torch.equal(std, torch.full((3,), 4.0))
            torch.testing.assert_close(latents, theirs.latent_dist.mean, rtol=0, atol=1e-4)
            decoded = net.decode(latents).sample
        torch.testing.assert_close(ours.decode([latents]), (decoded + 1) / 2, rtol=0, atol=1e-4)


@pytest.mark.parametrize("library", ["taming", "ldm"])
def test_what_a_file_lacks_is_measured_if_asked_for(
    library: str,
    states: dict[str, dict[str, Tensor]],
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Over the training images, for the averages alone: a training that goes on from the run changes it."""
    torch.save(states[library], tmp_path / "x.pt")
    words = ["--run", tmp_path / "run", "--data", pictures, "data.size=16", "data.workers=0", "--measure"]
    assert called(monkeypatch, "import", library, tmp_path / "x.pt", *words) == 0
    config = trained.read_config(tmp_path / "run", [])
    model: Any = trained.read_model(tmp_path / "run", config, torch.device("cpu"))[0]
    batch = stream.TrainingOnce(config.data)[range(90)].batch
    x = batch.x.double() / 255
    with torch.no_grad():
        if library == "taming":
            errors = (model.decode(model.encode(batch)).double() - x).square().mean((0, 2, 3)).sqrt()
            torch.testing.assert_close(model.error_std.double(), errors, rtol=1e-5, atol=0)
        else:
            mean, std = (part.double() for part in model.posterior(batch))
            torch.testing.assert_close(model.latent_mean.double(), mean.mean((0, 2, 3)), rtol=1e-5, atol=1e-6)
            deviation = (std.square() + (mean - mean.mean((0, 2, 3), keepdim=True)).square()).mean((0, 2, 3)).sqrt()
            torch.testing.assert_close(model.latent_std.double(), deviation, rtol=1e-5, atol=0)
    saved = load_file(tmp_path / "run" / "checkpoints" / "step-00000000" / "model.safetensors")
    assert all(saved[name].isinf().all() for name in checkpoint.LATER if name in saved)
    words[1] = tmp_path / "other"
    words[3] = tmp_path / "nowhere"
    assert called(monkeypatch, "import", library, tmp_path / "x.pt", *words) == 2
    assert not (tmp_path / "other").exists()


def test_a_file_of_diffusers_without_its_config(tmp_path: Path) -> None:
    net = AutoencoderKL(**BLOCKS, latent_channels=3)
    net.save_pretrained(tmp_path / "theirs")
    (tmp_path / "theirs" / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"theirs has no config\.json: give the folder of one"):
        import_run("diffusers", tmp_path / "theirs", tmp_path / "run")
    file = tmp_path / "theirs" / "diffusion_pytorch_model.safetensors"
    model, remarks = imported("diffusers", file, tmp_path / "run", "data.size=16")
    assert remarks[0] == "there is no config.json beside the file"
    assert not calibrated(model)  # not the scaling_factor that diffusers would assume
    (tmp_path / "theirs" / "config.json").write_text("[1")
    with pytest.raises(ConfigError, match=r"config\.json cannot be read"):
        import_run("diffusers", file, tmp_path / "other")


def test_of_latent_diffusion_only_the_first_stage_and_its_averages_are_used(
    states: dict[str, dict[str, Tensor]], tmp_path: Path
) -> None:
    """As its EMA names them, those of losses included."""
    own = {**states["ldm"], "loss.logvar": torch.zeros(()), "loss.discriminator.main.0.weight": torch.zeros(4, 3, 4, 4)}
    raw = {name: torch.zeros_like(tensor) for name, tensor in own.items()}
    averages = {f"model_ema.{name.replace('.', '')}": tensor for name, tensor in own.items()}
    averages |= {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(7)}
    whole = {f"first_stage_model.{name}": tensor for name, tensor in {**raw, **averages}.items()}
    whole |= {"betas": torch.zeros(10), "model.diffusion_model.out.weight": torch.zeros(2, 2)}
    torch.save(lightning(whole), tmp_path / "model.ckpt")
    model, remarks = imported("ldm", tmp_path / "model.ckpt", tmp_path / "run", "data.size=32")
    same(model, "ldm", net_of("ldm"))
    assert remarks[:4] == [
        "the weights are those of state_dict in the file, without epoch, optimizer_states",
        "2 tensors of a diffusion model were left out",
        "the weights are the averages (model_ema.*)",
        "2 tensors of the losses (loss.*) were left out: no critic here has such layers",
    ]
    torch.save({**own, "model_ema.unknown": torch.zeros(1)}, tmp_path / "model.ckpt")
    with pytest.raises(ConfigError, match=r"no weights have the averages model_ema\.unknown: give the whole state"):
        import_run("ldm", tmp_path / "model.ckpt", tmp_path / "other")


@pytest.mark.parametrize("library", NETS)
def test_tensors_that_do_not_fit_are_named(library: str, states: dict[str, dict[str, Tensor]], tmp_path: Path) -> None:
    state = dict(states[library])
    norm = state.pop("encoder.norm_out.weight")
    for more, words in (
        ({}, r"encoder\.norm_out\.weight .* is missing"),
        ({"encoder.norm_out.weight": norm[1:]}, r"encoder\.norm_out\.weight .* is 63 instead of 64"),
        ({"encoder.norm_out.weight": norm, "extra.\n": norm}, r"extra\.\\n has no counterpart here"),
    ):
        torch.save({**state, **more}, tmp_path / "x.pt")
        with pytest.raises(ConfigError, match=words) as caught:
            import_run(library, tmp_path / "x.pt", tmp_path / "run")
        assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["x.pt"]


class Poison:
    """Writes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return os.system, (f"touch {self.marker}",)


PLACES: dict[str, Callable[[Any, dict[str, Tensor]], Any]] = {
    "alone": lambda poison, state: poison,
    "among the weights": lambda poison, state: {**state, "poison": poison},
    "in Lightning's state_dict": lambda poison, state: lightning({**state, "poison": poison}),
    "beside Lightning's state_dict": lambda poison, state: {**lightning(state), "callbacks": {"x": [poison]}},
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("library", LIBRARIES)
def test_poisoned_files_run_no_code(library: str, place: str, tmp_path: Path) -> None:
    """In every format of torch.save and with every ending, in a folder of diffusers, too."""
    marker = tmp_path / "marker"
    poisoned = PLACES[place](Poison(marker), {"encoder.conv_in.weight": torch.ones(2, 3, 3, 3)})
    folder = tmp_path / "theirs"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    names = [f"diffusion_pytorch_model{ending}" for ending in PICKLED]
    for name in names:
        for zipped in (True, False):
            torch.save(poisoned, folder / name, _use_new_zipfile_serialization=zipped)
            for source in [folder / name] + ([folder] if library == "diffusers" and name.endswith(".bin") else []):
                with pytest.raises(
                    ConfigError, match=r"holds posix\.system besides tensors, which could run"
                ) as caught:
                    import_run(library, source, tmp_path / "run")
                assert "\n" not in str(caught.value)
    assert not marker.exists()
    assert not (tmp_path / "run").exists()
    torch.load(folder / names[0], weights_only=False)  # the poison works
    assert marker.exists()


def test_a_pickle_of_another_program_runs_no_code(tmp_path: Path) -> None:
    marker, file = tmp_path / "marker", tmp_path / "x.ckpt"
    for protocol in range(6):
        file.write_bytes(pickle.dumps({"state_dict": Poison(marker)}, protocol))
        with pytest.raises(ConfigError, match=r"x\.ckpt (holds|is not a file of weights)"):
            read(file)
    assert not marker.exists()


def test_foreign_objects_are_stripped_as_the_sentence_says(
    states: dict[str, dict[str, Tensor]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The arguments that a training saves with its weights."""
    monkeypatch.chdir(tmp_path)
    old, weights = {"x": torch.ones(1)}, states["llamagen"]
    for name, new, key, content in (
        ("last.ckpt", "last.pt", "state_dict", {"state_dict": weights}),
        ("vq.pt", "vq_weights.pt", "model", {"model": weights}),
        ("it's $HOME.pth", "it's $HOME.pt", "ema", {"model": old, "ema": weights}),
        ("flat.ckpt", "flat.pt", "flat", weights),
    ):
        torch.save({**content, "args": argparse.Namespace(lr=1.0)}, tmp_path / name)
        with pytest.raises(ConfigError, match=r"holds argparse\.Namespace besides tensors") as caught:
            import_run("llamagen", tmp_path / name, tmp_path / "run")
        code = re.search(r"`(python -c .*)` where it was made, and give (.+)$", str(caught.value))
        assert code is not None
        exec(shlex.split(code[1])[2], {})
        assert code[2] == str(tmp_path / new)
        model, _ = imported("llamagen", tmp_path / new, tmp_path / key, "data.size=32")
        same(model, "llamagen", net_of("llamagen"))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("none.pt", None, "cannot be read (No such file or directory): give a file of weights"),
        ("none.safetensors", None, "cannot be read"),
        ("x.safetensors", b"hello", "cannot be read"),
        ("x.zip", b"hello", "does not end in .safetensors or .ckpt, .pt, .pth, .bin: give a file of weights"),
        ("x.pt", b"hello", "is not a file of weights"),
        ("x.pt", b"", "is not a file of weights"),
        ("x.pt", [1, 2], "holds no state dict: give a file with tensors by name"),
        ("x.pt", {}, "holds no state dict: give a file with tensors by name"),
        ("x.pt", {"state_dict": {"a": "b"}}, "holds str a among its weights: give a file with tensors by name"),
        ("x.pt", {"a": torch.ones(2)}, "these are not weights of such a network"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, name: str, content: Any, words: str) -> None:
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    elif content is not None:
        torch.save(content, tmp_path / name)
    with pytest.raises(ConfigError, match=re.escape(words)):
        import_run("taming", tmp_path / name, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.size=33", r"data\.size=33 does not fit the model"),
        ("model.network.channels=64", "the settings of model do not fit encoder.* leave out those that follow"),
        ("model.quantizer.codebook_dim=2", r"the settings of model do not fit quantizer\.codebook: leave out"),
        ("model.network.nothing=1", "model.network.nothing"),
    ],
)
def test_settings_that_do_not_fit_leave_no_run(
    override: str, words: str, states: dict[str, dict[str, Tensor]], tmp_path: Path
) -> None:
    torch.save(states["taming"], tmp_path / "x.pt")
    with pytest.raises(ConfigError, match=words):
        import_run("taming", tmp_path / "x.pt", tmp_path / "run", ["data.size=32", override])
    assert [path.name for path in tmp_path.iterdir()] == ["x.pt"]


@pytest.mark.parametrize("override", ["run=elsewhere", "init_from=other", "train=decoder"])
def test_an_import_is_no_training(override: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"{override} is not a setting of an import"):
        import_run("taming", tmp_path / "x.pt", tmp_path / "run", [override])


ODD: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "nan": (lambda one: one.fill_(torch.nan), "has values that are not finite in fp32"),
    "large": (lambda one: one.double().fill_(1e300), "has values that are not finite in fp32"),
    "complex": (lambda one: one.to(torch.complex64), "is of type complex64"),
    "integer": (lambda one: one.to(torch.int8), "is of type int8"),
    "sparse": (lambda one: one.to_sparse(), "is sparse"),
    "quantised": (lambda one: torch.quantize_per_tensor(one, 0.1, 0, torch.qint8), "is quantised"),
    "meta": (lambda one: one.to("meta"), "has no values"),
}


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.filterwarnings("ignore")  # of torch, on quantised tensors
def test_tensors_that_are_no_weights_are_named(kind: str, states: dict[str, dict[str, Tensor]], tmp_path: Path) -> None:
    made, words = ODD[kind]
    name = "encoder.conv_in.bias"
    torch.save({**states["taming"], name: made(states["taming"][name].clone())}, tmp_path / "x.pt")
    with pytest.raises(ConfigError, match=rf"^{name} {words}"):
        import_run("taming", tmp_path / "x.pt", tmp_path / "run", ["data.size=32"])
    assert [path.name for path in tmp_path.iterdir()] == ["x.pt"]


def test_a_full_disk_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(command, "convert", full)
    assert called(monkeypatch, "convert", tmp_path / "x.pth", tmp_path / "out") == 2
    assert capsys.readouterr().err == f"error: {tmp_path}/out: No space left on device\n"


@pytest.mark.parametrize("learning", ["gradient", "ema"])
def test_codes_are_in_use(learning: str, states: dict[str, dict[str, Tensor]], tmp_path: Path) -> None:
    """A training that starts from them moves them, and neither initialises them nor takes them for dead."""
    torch.save(states["taming"], tmp_path / "x.pt")
    given = ["data.size=32"] if learning == "gradient" else ["data.size=32", "model.quantizer.learning=ema"]
    model, _ = imported("taming", tmp_path / "x.pt", tmp_path / "run", *given)
    assert isinstance(model, Codebooks)
    before = model.state_dict()["quantizer.codebook"].clone()
    model.train()
    model(BATCH, 0)
    model.update(0, 1e-3)
    moved = (model.state_dict()["quantizer.codebook"] - before).norm() / before.norm()
    assert 0 < float(moved) < (0.01 if learning == "gradient" else 0.2)
    (usage,) = model.usage(clear=False).values()
    assert not usage.resets


def called(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["weights.py", *map(str, words)])
    return command.main(command.parse())


def test_the_command(
    states: dict[str, dict[str, Tensor]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    torch.save(states["taming"], tmp_path / "x.pt")
    words = ["import", "taming", tmp_path / "x.pt", "data.size=32", "--run", tmp_path / "run"]
    assert called(monkeypatch, *words, "--data", "images") == 0
    said = capsys.readouterr().out
    assert f"(root mean square error of the channels) is measured when a training with init_from={tmp_path}/run" in said
    assert f"--run {tmp_path}/run`" in said
    assert trained.read_config(tmp_path / "run", []).data.root == "images"
    assert called(monkeypatch, *words) == 2
    assert capsys.readouterr().err == f"error: {tmp_path}/run exists: give a --run that does not\n"
