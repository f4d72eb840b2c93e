from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conftest import samples
from vaescale.data import stream
from vaescale.data.shards import write
from vaescale.evaluation import reference
from vaescale.evaluation.compare import Gathering, Refused
from vaescale.evaluation.feature_statistics import Statistics
from vaescale.evaluation.metrics.frechet import frechet
from vaescale.nn import features
from vaescale.nn.features import Features

IMAGES = {"data": "x/val", "fingerprint": "0123456789", "size": 16, "channels": 3}


def damage(folder: Path, number: int) -> None:
    """Changes an image of `samples` in the first shard."""
    shard, image = folder / "000000.tar", samples(number + 1)[number].image
    whole = shard.read_bytes()
    assert whole.count(image) == 1
    shard.write_bytes(whole.replace(image, bytes(len(image))))


@pytest.fixture
def net() -> Features:
    return features.drawn("random")


@pytest.fixture
def known(pictures: Path, net: Features) -> Statistics:
    slices = stream.ValidationSlices(stream.Config(root=str(pictures), size=16, workers=0))
    return reference.gather(slices, net, torch.device("cpu"), micro=4)


def test_all_images_are_gathered_once(pictures: Path, net: Features, known: Statistics) -> None:
    x = stream.ValidationSlices(stream.Config(root=str(pictures), size=16, workers=0))[range(11)].batch.x
    gathering = Gathering([net], 11, x[:1])
    gathering.add(torch.arange(11), x)
    expected = gathering.result()[net.words]
    assert known.count == 11
    assert torch.equal(known.rows, expected.rows)
    assert torch.equal(known.covariance, expected.covariance)


def test_a_file_holds_the_statistics(tmp_path: Path, net: Features, known: Statistics) -> None:
    path = tmp_path / "folder" / "x.safetensors"
    reference.write(path, known, net, IMAGES)
    read, words = reference.read(path, [net], 16, 3)
    found = read[net.words]
    assert found.count == 11
    for name in ("mean", "covariance", "rows"):
        assert torch.equal(getattr(found, name), getattr(known, name))
    assert frechet(found, known) < 1e-12
    assert words.startswith("x.safetensors, xxh3 ")
    assert words.endswith(" (11 images of x/val at 16 px, index 01234567)")


def test_a_file_of_other_images_or_features_is_refused(tmp_path: Path, net: Features, known: Statistics) -> None:
    path = tmp_path / "x.safetensors"
    reference.write(path, known, net, IMAGES)
    with pytest.raises(Refused, match=r"of 16 px and 3 channel\(s\), and the model's have 32 px and 3"):
        reference.read(path, [net], 32, 3)
    with pytest.raises(Refused, match="and the model's have 16 px and 1 channel"):
        reference.read(path, [net], 16, 1)
    with pytest.raises(Refused, match=r"other features \(FD \(random\), weights drawn, seed 0\)"):
        reference.read(path, [features.drawn("random", 1)], 16, 3)
    with pytest.raises(Refused, match="give one --features"):
        reference.read(path, [net, net], 16, 3)
    damaged = path.read_bytes()[:-1]
    path.write_bytes(damaged)
    with pytest.raises(Refused, match="neither a file that"):
        reference.read(path, [net], 16, 3)
    with pytest.raises(Refused, match=r"none cannot be read \(No such file"):
        reference.read(tmp_path / "none", [net], 16, 3)


def test_moments_of_others_are_read_without_running_code(tmp_path: Path, net: Features) -> None:
    """As in VIRTUAL_imagenet256_labeled.npz, which has other arrays, too."""
    mean, covariance = np.arange(64.0), np.eye(64)
    path = tmp_path / "x.npz"
    np.savez(path, mu=mean, sigma=covariance, mu_s=np.zeros(3))
    with pytest.raises(Refused, match=r"is of Inception's features, not of FD \(random\)"):
        reference.read(path, [net], 16, 3)
    net.words = "FID"
    read, words = reference.read(path, [net], 16, 3)
    assert read["FID"].count == 0
    assert torch.equal(read["FID"].mean, torch.arange(64, dtype=torch.float64))
    assert len(read["FID"].rows) == 0
    assert "x.npz, xxh3" in words
    np.savez(path, mu=mean[:3], sigma=covariance)
    with pytest.raises(Refused, match="are not those of 64 features"):
        reference.read(path, [net], 16, 3)
    np.savez(path, mu=np.array([print], dtype=object), sigma=covariance)
    with pytest.raises(Refused, match="neither a file"):
        reference.read(path, [net], 16, 3)


def test_a_damaged_file_of_others_is_refused(tmp_path: Path, net: Features) -> None:
    """An empty one, one of no zip, and random changes of the bytes."""
    path = tmp_path / "x.npz"
    net.words = "FID"
    generator = np.random.default_rng(0)
    for damaged in (b"", b"PK\x03\x04", b"\x93NUMPY"):
        path.write_bytes(damaged)
        with pytest.raises(Refused, match="is neither a file that"):
            reference.read(path, [net], 16, 3)
    np.savez_compressed(path, mu=np.arange(64.0), sigma=np.eye(64))
    whole = np.frombuffer(path.read_bytes(), np.uint8)
    refused = 0
    for _ in range(300):
        changed = whole.copy()
        changed[generator.integers(0, len(whole), 3)] = generator.integers(0, 256, 3)
        path.write_bytes(changed.tobytes())
        try:
            found, _ = reference.read(path, [net], 16, 3)
            assert torch.equal(found["FID"].covariance, torch.eye(64, dtype=torch.float64))
        except Refused:
            refused += 1
    assert refused > 100


def test_a_damaged_image_is_refused(tmp_path: Path, net: Features) -> None:
    for split, slices_of in (("val", stream.ValidationSlices), ("train", stream.TrainingOnce)):
        write(tmp_path / split / split, samples(5), 20, [])
        damage(tmp_path / split / split, 3)
        slices = slices_of(stream.Config(root=str(tmp_path / split), size=16, workers=0))
        with pytest.raises(Refused, match=r"0-00003 in 000000\.tar is damaged"):
            reference.gather(slices, net, torch.device("cpu"), micro=2)
