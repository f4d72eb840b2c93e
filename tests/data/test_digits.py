from pathlib import Path

import numpy as np
import pytest
import webdataset
from sklearn.datasets import load_digits

from vaescale.data import DataError, digits, stream
from vaescale.data.decode import Image


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("digits")
    assert digits.write_digits(path) == {"train": 1500, "val": 297}
    return path


def test_each_digit_is_scikit_learns_and_in_one_split(root: Path) -> None:
    """webdataset, without our reader, reads back their 17 grey levels and classes."""
    theirs = load_digits()
    seen = []
    for split in ("train", "val"):
        shards = sorted(str(path) for path in (root / split).glob("*.tar"))
        for sample in webdataset.WebDataset(shards, shardshuffle=False).decode("pil"):
            number = int(sample["__key__"].removeprefix("digit-"))
            assert sample["png"].size == (8, 8)
            levels = np.asarray(sample["png"].convert("L")) / 255 * 16
            assert np.abs(levels - theirs.images[number]).max() < 0.05  # half a level of 256 is 1/32 of theirs
            assert sample["cls"] == theirs.target[number]
            seen.append(number)
    assert sorted(seen) == list(range(1797))


def test_both_splits_have_ten_named_classes_in_shuffled_order(root: Path) -> None:
    for split in ("train", "val"):
        index = stream.Samples(root / split).index
        assert index.classes == list("0123456789")
        shares = np.bincount(index.records["label"], minlength=10) / len(index)
        assert shares.min() > 0.06  # in the file's order the held-out digits would be those of the last writers
        assert not (np.diff(index.records["label"]) == 1).mean() > 0.5  # the file mostly counts 0, 1, 2, …


def test_training_on_grey_digits_sees_one_channel(root: Path) -> None:
    """At 16 px, undistorted where no crop is asked for: halved again they are the stored pixels, nearly."""
    config = stream.Config(root=str(root), size=16, channels=1, min_crop_area=1.0, flip=False, workers=0)
    slices = stream.TrainSlices(config, seed=0)
    batch = slices[range(32)].batch
    assert batch.x.shape == (32, 1, 16, 16)
    for x, sample in zip(batch.x, slices.order(np.arange(32)).tolist(), strict=True):
        stored = np.asarray(Image.open(digits.io.BytesIO(slices.samples.read(sample)[0])), float)
        halved = x[0].numpy().reshape(8, 2, 8, 2).mean((1, 3))
        assert np.corrcoef(stored.ravel(), halved.ravel())[0, 1] > 0.98


def test_without_scikit_learn_one_sentence_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digits, "FILE", "no_such_package/digits.csv.gz")
    with pytest.raises(DataError, match=r"no_such_package/digits\.csv\.gz is not installed.*'vaescale\[demo\]'"):
        list(digits.read_digits())
