import copy
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from vaescale.nn import perceptual
from vaescale.nn.perceptual import NETS, Distance, drawn, shapes, uniform


def pair(size: int = 64, count: int = 3, channels: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(count, channels, size, size, generator=generator)
    return x, (x + 0.1 * torch.randn(x.shape, generator=generator)).clamp(0, 1)


def features(net: str) -> nn.Sequential:
    """The convolutions of torchvision's VGG16 or AlexNet, without their weights."""
    layers: list[nn.Module] = []
    before = 3
    for stage, convolutions in enumerate(NETS[net].stages):
        if stage in NETS[net].pooled:
            layers.append(nn.MaxPool2d(NETS[net].pool, 2))
        for channels, kernel, stride, padding in convolutions:
            layers += [nn.Conv2d(before, channels, kernel, stride, padding), nn.ReLU()]
            before = channels
    return nn.Sequential(*layers, nn.MaxPool2d(NETS[net].pool, 2))


@pytest.mark.parametrize(("kind", "name"), [("lpips_vgg", "vgg"), ("lpips_alex", "alex")])
def test_it_is_the_distance_of_lpips(kind: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same random trunk and the heads that lpips brings along; values, and the gradient of the first image.

    Of torchvision, which does not import beside the CPU build of torch, lpips uses only the layers of the trunk."""
    torch.manual_seed(0)
    vision = ModuleType("torchvision")
    vision.models = SimpleNamespace(  # type: ignore[attr-defined]
        vgg16=lambda pretrained: SimpleNamespace(features=features("vgg16")),
        alexnet=lambda pretrained: SimpleNamespace(features=features("alexnet")),
    )
    monkeypatch.setitem(sys.modules, "torchvision", vision)
    lpips = pytest.importorskip("lpips")
    theirs = lpips.LPIPS(net=name, pnet_rand=True, verbose=False)

    ours = drawn(kind)
    convolutions = [layer for layer in theirs.net.modules() if isinstance(layer, nn.Conv2d)]
    assert len(convolutions) == sum(map(len, ours.net.stages))
    with torch.no_grad():
        for number, layer in enumerate(convolutions):
            layer.weight.copy_(ours.tensors[f"trunk.{number}.weight"])
            layer.bias.normal_(std=0.1)
            ours.tensors[f"trunk.{number}.bias"] = layer.bias.detach().clone()
    for stage, head in enumerate(theirs.lins):
        ours.tensors[f"head.{stage}"] = head.model[-1].weight.detach().flatten()

    x, y = pair()
    x, again = x.requires_grad_(), x.detach().clone().requires_grad_()
    expected = theirs(again, y, normalize=True).flatten()
    found = ours(x, y)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    found.sum().backward()
    expected.sum().backward()
    assert x.grad is not None
    assert again.grad is not None
    assert (x.grad - again.grad).norm() < 1e-4 * again.grad.norm()
    assert found.min() > 0.01


def test_the_distance_of_an_image_to_itself_is_0() -> None:
    x, y = pair()
    distance = drawn("perceptual_random")
    assert torch.equal(distance(x, x), torch.zeros(3))
    assert (distance(x, y) > 1e-3).all()


def test_uniform_heads_give_the_mean_of_1_minus_cos() -> None:
    distance = drawn("perceptual_random")
    assert all(torch.equal(distance.tensors[name], head) for name, head in uniform(distance.net).items())
    x, y = pair()
    plain = [torch.cosine_similarity(a, b) for a, b in zip(distance._features(x), distance._features(y), strict=True)]
    expected = torch.stack([1 - one.mean((1, 2)) for one in plain]).mean(0)
    torch.testing.assert_close(distance(x, y), expected, rtol=1e-4, atol=1e-6)


def test_grey_images_are_read_as_three_equal_channels() -> None:
    x, y = pair(channels=1)
    distance = drawn("perceptual_random")
    torch.testing.assert_close(distance(x, y), distance(x.expand(-1, 3, -1, -1), y.expand(-1, 3, -1, -1)))


def test_the_gradient_is_finite_where_all_features_are_0() -> None:
    distance = drawn("perceptual_random")
    distance.tensors["trunk.0.bias"] -= 100  # all features of x are 0
    x, y = pair(size=16)
    x.requires_grad_()
    distance(x, y).sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_autocast_does_not_change_it() -> None:
    x, y = pair(size=16)
    distance = drawn("perceptual_random")
    with torch.autocast("cpu", torch.bfloat16):
        found = distance(x, y)
    assert torch.equal(found, distance(x, y))


def test_copies_share_the_weights() -> None:
    distance = drawn("perceptual_random")
    assert copy.deepcopy({"distance": distance})["distance"] is distance


@pytest.mark.parametrize("kind", ["lpips_vgg", "lpips_alex"])
def test_the_least_size_is_the_least_that_the_trunk_can_read(kind: str) -> None:
    distance = drawn(kind)
    least = distance.net.least
    assert distance(*pair(least, 1)).isfinite().all()
    with pytest.raises(RuntimeError):
        distance(*pair(least - 1, 1))
    with pytest.raises(ValueError, match=rf"data.size={least - 1} is too small for LPIPS .*, which needs {least} px"):
        perceptual.require_size(distance, least - 1)


def write(path: Path, **changes: Tensor) -> Path:
    tensors = {**drawn("perceptual_random").tensors, **changes}
    save_file({name: one for name, one in tensors.items() if len(one)}, path, {"kind": "perceptual_random"})
    return path


def test_a_file_is_read_as_written_and_under_fake_tensors(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors")
    x, y = pair(size=16)
    assert torch.equal(perceptual.read(str(path))(x, y), drawn("perceptual_random")(x, y))
    with FakeTensorMode():
        found = perceptual.read(str(path))(torch.empty(2, 3, 16, 16), torch.empty(2, 3, 16, 16))
    assert found.shape == (2,)


def test_what_is_wrong_with_a_file_is_said(tmp_path: Path) -> None:
    def said(path: Path) -> str:
        with pytest.raises(ValueError) as caught:
            perceptual.read(str(path))
        return str(caught.value)

    assert "none.safetensors cannot be read (it does not exist): convert it" in said(tmp_path / "none.safetensors")
    (tmp_path / "cut").write_bytes(write(tmp_path / "a").read_bytes()[:-1])
    assert "cut is damaged" in said(tmp_path / "cut")
    save_file({"a": torch.zeros(1)}, tmp_path / "other")
    assert "other is not a file of weights that `launch/weights.py convert` wrote" in said(tmp_path / "other")
    less = write(tmp_path / "less", **{"trunk.3.bias": torch.zeros(0)})
    assert "is not a file of perceptual distance (random trunk): trunk.3.bias is missing or has another" in said(less)


def test_weights_that_are_not_set_are_asked_for() -> None:
    with pytest.raises(ValueError, match=r"fetch vgg16-397923af.pth .*BSD-3-Clause.*weights.py convert"):
        perceptual.build(perceptual.Config(weight=1.0), 64)
    assert perceptual.build(perceptual.Config(), 64) is None


def test_shapes_are_those_of_the_published_networks() -> None:
    """14.71 M and 2.47 M parameters: those of torchvision's `features`."""
    for net, count in {"vgg16": 14_714_688, "alexnet": 2_469_696}.items():
        found = {name: shape for name, shape in shapes(NETS[net]).items() if name.startswith("trunk")}
        assert sum(torch.Size(shape).numel() for shape in found.values()) == count
    with pytest.raises(ValueError, match="is missing or has another shape"):
        Distance("lpips_vgg", drawn("lpips_alex").tensors, {})


def test_weights_that_would_not_be_used_are_refused() -> None:
    with pytest.raises(ValueError, match="is set, but its weight in the loss is 0"):
        perceptual.build(perceptual.Config(weights="vgg16.safetensors"), 64)
