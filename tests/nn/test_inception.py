import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.nn.fidelity import published, torchvision
from tests.nn.test_features import SOURCE, images
from vaescale.nn import features, inception
from vaescale.nn.features import Features

pytestmark = pytest.mark.unit


@pytest.fixture
def fidelity(monkeypatch: pytest.MonkeyPatch) -> Any:
    """torch-fidelity's module of the Inception."""
    for name, module in torchvision().items():
        monkeypatch.setitem(sys.modules, name, module)
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
