import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.nn.test_features import SOURCE, images
from vaescale.nn import features, inception
from vaescale.nn.features import Features
from vaescale.nn.frozen import random_weights

pytestmark = pytest.mark.unit


def published() -> dict[str, Tensor]:
    """Random weights in the format of the published file: torchvision's names, each batch norm on its own."""
    state = {"fc.bias": torch.zeros(inception.CLASSES)}
    generator = torch.Generator().manual_seed(1)
    for name, tensor in random_weights(inception.shapes(), 0).items():
        layer, _, part = name.rpartition(".")
        if layer == "fc":
            state[name] = tensor
        elif part == "weight":
            count = len(tensor)
            state |= {
                f"{layer}.conv.weight": tensor,
                f"{layer}.bn.weight": 1 + 0.2 * torch.randn(count, generator=generator),
                f"{layer}.bn.bias": 0.2 * torch.randn(count, generator=generator),
                f"{layer}.bn.running_mean": 0.2 * torch.randn(count, generator=generator),
                f"{layer}.bn.running_var": 0.5 + torch.rand(count, generator=generator),
                f"{layer}.bn.num_batches_tracked": torch.tensor(1),
            }
    return state


@pytest.fixture
def fidelity(monkeypatch: pytest.MonkeyPatch) -> Any:
    """torch-fidelity's module of the Inception. torchvision, which does not import beside the CPU build of torch, is
    replaced: the module does not use it, but others of the package import it."""
    for name in ("", ".datasets", ".transforms", ".transforms.functional"):
        module = ModuleType(f"torchvision{name}")
        monkeypatch.setitem(sys.modules, module.__name__, module)
    vision: Any = sys.modules
    vision["torchvision"].transforms = vision["torchvision.transforms"]
    vision["torchvision.transforms"].functional = vision["torchvision.transforms.functional"]
    for name in ("CIFAR10", "CIFAR100", "STL10"):
        setattr(vision["torchvision.datasets"], name, object)
    return pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")


def test_features_and_logits_are_those_of_torch_fidelity(
    fidelity: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features, "CHUNK", 2)  # to save time
    state = published()
    torch.save(state, tmp_path / "published.pth")
    theirs = fidelity.FeatureExtractorInceptionV3("x", ["2048", "logits_unbiased"], str(tmp_path / "published.pth"))
    ours = Features("inception", inception.own(state), SOURCE, "FID")
    for height, width in ((32, 32), (64, 64), (299, 299), (512, 512), (200, 350)):
        x = images(2, height, width)
        with torch.no_grad():
            expected, classes = theirs(x)
        found, logits = ours(x)
        assert found.std(0).mean() > 0.05 * found.std()  # the images differ
        assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
        assert logits is not None
        assert (logits - classes).abs().max() < 1e-5 * classes.abs().max()


def test_resizing_is_tensorflows(fidelity: Any) -> None:
    """With the bits of torch-fidelity's implementation, which has those of TensorFlow 1."""
    for size in ((32, 32), (1, 7), (299, 299), (500, 300)):
        x = images(2, *size).float()
        expected = fidelity.interpolate_bilinear_2d_like_tensorflow1x(x, size=(299, 299), align_corners=False)
        assert torch.equal(inception.resized(x, 299), expected)
