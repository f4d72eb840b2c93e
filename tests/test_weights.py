import hashlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from launch import weights as command
from tests.nn import test_dinov2, test_features, test_inception
from tests.nn.test_perceptual import pair
from vaescale import weights
from vaescale.nn import dinov2, efficientnet, features, perceptual
from vaescale.nn.frozen import random_weights
from vaescale.nn.perceptual import NETS, drawn, shapes
from vaescale.nn.published import FILES, place
from vaescale.weights import FEATURES, WeightsError, convert

Saved = Callable[[object, str], Path]  # state, kind → file


def torchvisions(net: str) -> dict[str, Tensor]:
    """A random state dict as torchvision writes it, with a part of the classifier."""
    tensors = drawn({"vgg16": "lpips_vgg", "alexnet": "lpips_alex"}[net]).tensors
    state = {"classifier.0.weight": torch.zeros(2, 2)}
    for number, feature in enumerate(FEATURES[net]):
        for part in ("weight", "bias"):
            state[f"features.{feature}.{part}"] = tensors[f"trunk.{number}.{part}"]
    return state


def declared(source: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes a file the published one of a kind."""
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    monkeypatch.setitem(FILES, kind, FILES[kind]._replace(digest=digest[:8]))


@pytest.fixture
def saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Saved:
    """Saves a file that is taken for a published one."""

    def save(state: object, kind: str) -> Path:
        source = tmp_path / "published.pth"
        torch.save(state, source)
        declared(source, kind, monkeypatch)
        return source

    return save


@pytest.mark.parametrize(("net", "kind"), [("vgg16", "lpips_vgg"), ("alexnet", "lpips_alex")])
def test_the_trunk_is_torchvisions_and_the_heads_are_those_of_lpips(
    net: str, kind: str, tmp_path: Path, saved: Saved
) -> None:
    source = saved(torchvisions(net), kind)
    out, metadata = convert(source, tmp_path / "new" / "out.safetensors")
    assert out == tmp_path / "new" / "out.safetensors"
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    assert (metadata["kind"], metadata["source"], metadata["sha256"]) == (kind, FILES[kind].file, digest)
    assert "BSD-3-Clause" in metadata["licence"]
    distance = perceptual.read(str(tmp_path / "new" / "out.safetensors"))
    assert distance.source == metadata
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out.safetensors"]

    lpips = importlib.util.find_spec("lpips")  # it does not import without torchvision
    if lpips is None or lpips.origin is None:
        pytest.skip("needs lpips")
    file = Path(lpips.origin).parent / "weights" / "v0.1" / f"{'vgg' if net == 'vgg16' else 'alex'}.pth"
    published = torch.load(file, "cpu", weights_only=True)
    expected = drawn(kind)
    for stage in range(5):
        expected.tensors[f"head.{stage}"] = published[f"lin{stage}.model.1.weight"].flatten()
    assert torch.equal(distance(*pair()), expected(*pair()))


def refused(source: Path) -> str:
    out = source.parent / "out.safetensors"
    with pytest.raises(WeightsError) as caught:
        convert(source, out)
    assert not out.exists()
    return str(caught.value)


def test_only_published_files_are_converted(tmp_path: Path, saved: Saved) -> None:
    source = saved(torchvisions("alexnet"), "lpips_alex")
    damaged = bytearray(source.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    for name in ("published.pth", "alexnet-owt-7be5be79.pth", "hed_bsds500.weights.h5"):
        (tmp_path / name).write_bytes(damaged)
        digits = hashlib.sha256(damaged).hexdigest()[:8]
        said = refused(tmp_path / name)
        assert f"{name} is damaged or another file: its SHA-256 begins with {digits}, and no file that" in said


def test_an_output_that_cannot_be_written_is_one_sentence(saved: Saved, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for out in (tmp_path / "file" / "out.safetensors", tmp_path):
        with pytest.raises(WeightsError, match="cannot be written"):
            convert(saved(torchvisions("alexnet"), "lpips_alex"), out)


class Code:
    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return print, ("code was run",)


def test_other_files_are_refused_and_run_no_code(
    tmp_path: Path, saved: Saved, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "cannot be read (No such file or directory)" in refused(tmp_path / "none.pth")
    for kind in ("lpips_vgg", "inception"):
        assert "is not a file of weights" in refused(saved(Code(), kind))
        assert "is not a state dict of tensors" in refused(saved([1, 2], kind))
    assert "code was run" not in capsys.readouterr().out
    batch_norm = torchvisions("vgg16")
    batch_norm["features.2.weight"] = torch.zeros(64)
    assert "trunk.1.weight is missing or has another shape" in refused(saved(batch_norm, "lpips_vgg"))
    assert "trunk.0.bias is missing or has another shape" in refused(saved({}, "lpips_vgg"))
    assert "does not have the weights of inception: fc.weight is missing" in refused(
        saved({"x": torch.zeros(1)}, "inception")
    )
    wrong = {**test_inception.published(), "fc.weight": torch.zeros(1000, 2048)}
    assert "weights of inception: fc.weight is missing or has another shape" in refused(saved(wrong, "inception"))


def test_torchscript_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Inception is also published in this form, which holds code."""
    source = tmp_path / "inception-2015-12-05.pt"
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), source)
    declared(source, "inception", monkeypatch)
    assert "is not a file of weights" in refused(source)
    assert "TorchScript" in refused(source)


def efficientnets() -> dict[str, Tensor]:
    """Random weights in the format of the published file."""
    weights = random_weights(efficientnet.shapes(), 0)
    state = {f"_fc.{part}": weights[f"classes.{part}"] for part in ("weight", "bias")}
    for name, (_, convolution, norm) in efficientnet.layers().items():
        ones = torch.ones(len(weights[f"{name}.bias"]))
        state |= {f"{convolution}.weight": weights[f"{name}.weight"], f"{norm}.bias": weights[f"{name}.bias"]}
        state |= {f"{norm}.weight": ones, f"{norm}.running_mean": 0 * ones, f"{norm}.running_var": 2 * ones}
    return state


@pytest.mark.parametrize(
    ("kind", "state"),
    [
        ("inception", test_inception.published),
        ("dinov2", lambda: test_dinov2.published(64, 3)),
        ("efficientnet-lite0", efficientnets),
    ],
)
def test_features_of_a_converted_file_are_those_of_its_source(
    kind: str, state: Callable[[], dict[str, Tensor]], tmp_path: Path, saved: Saved, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is put into the folder of weights, where features are found."""
    monkeypatch.setenv("VAESCALE_WEIGHTS", str(tmp_path / "folder"))
    monkeypatch.setitem(features.NETS, "dinov2", dinov2.vit(64, 3, 4))
    monkeypatch.setattr(features, "CHUNK", 1)  # to save time
    source = saved(state(), kind)
    assert weights.found(kind) == ("package" if kind == "efficientnet-lite0" else "no")
    out, metadata = convert(source)
    assert out == place(kind)
    assert weights.found(kind) == "yes"
    net = features.read(kind)
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    assert (net.protocol["file"], net.protocol["sha256"]) == (FILES[kind].file, digest)
    assert metadata["licence"] == FILES[kind].licence
    assert convert(source.rename(tmp_path / "renamed.pth"))[1] == metadata
    assert features.read(kind).protocol == net.protocol
    assert (net.words == "FID") == (kind == "inception")
    expected = features.Features(kind, features.NETS[kind].own(state()), test_features.SOURCE, "")
    assert torch.equal(net(test_features.images(1))[0], expected(test_features.images(1))[0])


def test_a_perceptual_distance_is_found_in_the_folder(
    tmp_path: Path, saved: Saved, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VAESCALE_WEIGHTS", str(tmp_path / "folder"))
    with pytest.raises(ValueError, match=r"lpips_alex.safetensors does not exist: fetch alexnet-owt-7be5be79.pth "):
        perceptual.read("lpips_alex")
    out, _ = convert(saved(torchvisions("alexnet"), "lpips_alex"))
    assert torch.equal(perceptual.read("lpips_alex")(*pair()), perceptual.read(str(out))(*pair()))


def test_other_heads_are_refused(saved: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(weights.HEADS, "alexnet", ("vgg.pth", "0"))
    assert "vgg.pth is not the published file" in refused(saved(torchvisions("alexnet"), "lpips_alex"))


def test_the_convolutions_of_hed_are_turned_around(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From Keras's layout and B, G, R in 0 … 255: the first layer of both computes the same."""
    h5py = pytest.importorskip("h5py")
    source = tmp_path / "hed_bsds500.weights.h5"
    tensors = drawn("perceptual_hed").tensors
    number = 0
    with h5py.File(source, "w") as file:
        for stage, convolutions in enumerate(NETS["vgg16"].stages, start=1):
            for place in range(len(convolutions)):
                part = file.create_group(f"block{stage}/layers/conv2d{f'_{place}' if place else ''}/vars")
                part["0"] = tensors[f"trunk.{number}.weight"].permute(2, 3, 1, 0).numpy()
                part["1"] = tensors[f"trunk.{number}.bias"].numpy()
                number += 1
    declared(source, "perceptual_hed", monkeypatch)
    _, metadata = convert(source, tmp_path / "out.safetensors")
    assert metadata["kind"] == "perceptual_hed"
    assert "MIT" in metadata["licence"]
    found = perceptual.read(str(tmp_path / "out.safetensors")).tensors
    x = pair()[0]
    ours = torch.conv2d((x - found["mean"][:, None, None]) / found["std"][:, None, None], found["trunk.0.weight"])
    blue_first = 255 * x.flip(1) - torch.tensor([104.00699, 116.66877, 122.67892])[:, None, None]
    torch.testing.assert_close(ours, torch.conv2d(blue_first, tensors["trunk.0.weight"]), rtol=1e-4, atol=1e-2)
    assert torch.equal(found["trunk.12.weight"], tensors["trunk.12.weight"])
    assert {name: tuple(one.shape) for name, one in found.items()} == shapes(NETS["vgg16"])

    monkeypatch.setitem(sys.modules, "h5py", None)
    (tmp_path / "out.safetensors").unlink()
    assert "needs the package h5py: run `pip install -e '.[perceptual-demo]'`" in refused(source)


def test_the_command_says_what_it_made_or_why_not(
    tmp_path: Path, saved: Saved, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("VAESCALE_WEIGHTS", str(tmp_path / "folder"))
    source, out = saved(torchvisions("alexnet"), "lpips_alex"), tmp_path / "out"

    def run(*words: object) -> int:
        monkeypatch.setattr(sys, "argv", ["weights.py", *map(str, words)])
        return command.main(command.parse())

    def listed() -> dict[str, str]:
        """Returns what is here, by file."""
        assert run("list") == 0
        said = capsys.readouterr().out
        assert all(one.licence in said and one.where in said for one in FILES.values())
        assert f"folder of weights: {tmp_path / 'folder'}" in said
        rows = [line.split() for line in said.splitlines()[3 : 3 + len(FILES)]]
        return {row[0]: row[2] for row in rows}

    assert run("convert", source, out) == 0
    said = capsys.readouterr().out
    assert f"{out}: for LPIPS (AlexNet); trunk: BSD-3-Clause" in said
    assert f"perceptual.weights={out} " in said
    with safe_open(out, "numpy") as file:
        assert file.metadata()["kind"] == "lpips_alex"
    assert run("convert", tmp_path / "none.pth", out) == 2
    assert "error: " in capsys.readouterr().err

    assert listed()["alexnet-owt-7be5be79.pth"] == "no"
    assert run("convert", source) == 0
    assert "perceptual.weights=lpips_alex " in capsys.readouterr().out
    assert listed() == {one.file: weights.found(kind) for kind, one in FILES.items()}
    assert listed()["alexnet-owt-7be5be79.pth"] == "yes"
