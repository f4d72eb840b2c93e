"""The properties that the demo data promise, checked on the written shards."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vaescale.data import DataError, demo, stream
from vaescale.data.index import Index


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("demo")
    demo.write_demo(path)
    return path


def test_enough_tiles_of_ten_classes(root: Path) -> None:
    train, val = Index(root / "train"), Index(root / "val")
    assert len(train) >= 1500
    assert len(train.classes) == 10
    for index in (train, val):
        assert set(index.records["label"]) == set(range(10))


def test_tiles_are_160_px_and_not_flat(root: Path) -> None:
    samples = stream.Samples(root / "val")
    for number in range(len(samples.index)):
        pixels = demo.Image.open(demo.io.BytesIO(samples.read(number)[0])).convert("L")
        assert pixels.size == (160, 160)
        assert np.asarray(pixels, float).std() > 0.8 * demo.FLAT  # resizing and JPEG take a little of it


def test_training_and_validation_share_no_pixel() -> None:
    """The two parts of a photograph are painted, so a training tile with a validation pixel would show its colour."""
    painted = {}
    for name in ("a", "b"):
        photograph = Image.fromarray(np.random.default_rng(0).integers(0, 100, (400, 1000, 3), np.uint8))
        photograph.paste((255, 255, 255), demo.part_box(photograph.size, "val"))
        painted[name] = photograph
    tiles = list(demo.tiles(painted, "train"))
    assert len(tiles) > 20
    for tile in tiles:
        assert np.asarray(Image.open(demo.io.BytesIO(tile.image))).max() < 180


def test_missing_photographs_are_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(demo.PHOTOGRAPHS, "none", "no_such_package/data/none.png")
    with pytest.raises(DataError, match=r"pip install 'vaescale\[demo\]'"):
        demo.find_photographs()
