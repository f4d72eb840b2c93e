from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conftest import samples
from tests.evaluation.test_metrics import Halves
from vaescale.data import stream
from vaescale.data.shards import write
from vaescale.evaluation import nearest as module
from vaescale.evaluation.compare import Refused
from vaescale.evaluation.generation import Generated
from vaescale.evaluation.nearest import compare_with_training, require_enough, search, share_nearer
from vaescale.nn import features

CPU = torch.device("cpu")


def test_the_share_is_that_of_all_pairs() -> None:
    generator = torch.Generator().manual_seed(0)
    ours, others = (torch.randint(0, 9, (count,), generator=generator).double() for count in (13, 17))
    expected = np.mean([1.0 if a < b else 0.5 if a == b else 0.0 for a in ours for b in others])
    assert share_nearer(ours, others) == pytest.approx(expected, abs=1e-12)
    assert share_nearer(torch.zeros(3), torch.ones(4)) == 1


def test_neighbours_are_those_of_brute_force(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MICRO", 7)
    training = stream.TrainingOnce(stream.Config(root=str(pictures), size=16, workers=0))
    net = features.drawn("random")
    rows = net(training[range(90)].batch.x)[0]
    queries = rows[[5, 50]] + 0.01
    distances, numbers = search(queries, net, training, CPU)
    expected = torch.cdist(queries.double(), rows.double(), compute_mode="donot_use_mm_for_euclid_dist").sort(1)
    assert torch.equal(numbers, expected.indices[:, :3])
    assert distances.numpy() == pytest.approx(expected.values[:, :3].numpy(), rel=1e-12)
    assert numbers[:, 0].tolist() == [5, 50]


def test_fewer_training_images_than_are_shown_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "train", samples(2), 20, [])
    training = stream.TrainingOnce(stream.Config(root=str(tmp_path), size=16, workers=0))
    net = features.drawn("random")
    with pytest.raises(Refused, match="train has fewer than the 3 images"):
        search(net(training[range(2)].batch.x)[0], net, training, CPU)  # as if another one were damaged
    with pytest.raises(Refused, match="train has fewer than the 3 images"):
        require_enough(training)


def test_copies_are_nearer_than_held_out_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copied training images are always nearer, other images of the same distribution as often as not."""
    monkeypatch.setattr(module, "QUERIES", 60)
    write(tmp_path / "train", samples(60), 20, [])
    write(tmp_path / "val", samples(60, seed=1), 20, [])
    write(tmp_path / "other" / "val", samples(60, seed=2), 20, [])
    data = stream.Config(root=str(tmp_path), size=16, workers=0)
    copies = stream.TrainingOnce(data)[range(60)].batch.x
    others = stream.ValidationSlices(stream.Config(root=str(tmp_path / "other"), size=16, workers=0))[range(60)].batch.x

    def of(images: torch.Tensor) -> module.Generate:
        def generate(count: int, rank: int, world: int) -> Iterator[Generated]:
            number = torch.arange(count)
            yield Generated(number, number, images[:count])

        return generate

    net = features.drawn("random")
    picture, found = compare_with_training(Halves(), data, net, CPU, of(copies), False)  # type: ignore[arg-type]
    assert found["nearer"] == 1
    _, found = compare_with_training(Halves(), data, net, CPU, of(others), False)  # type: ignore[arg-type]
    assert 0.35 < found["nearer"] < 0.65
    alone, found = compare_with_training(Halves(), data, net, CPU, None, False)  # type: ignore[arg-type]
    assert found.keys() == {"nearer_reconstruction"}
    assert picture.shape[1] > 1.8 * alone.shape[1]


class Memory(Halves):
    """Decodes to a training image, or to the image itself."""

    def __init__(self, known: torch.Tensor | None) -> None:
        self.known = known

    def encode(self, batch: stream.Batch, temperature: float = 0.0) -> list[torch.Tensor]:
        return [batch.x / 255 if self.known is None else self.known[batch.sample] / 255]

    def decode(self, latents: list[torch.Tensor], *_: object, **__: object) -> torch.Tensor:
        return latents[0]


def test_reconstructions_of_held_out_images_may_be_copies(tmp_path: Path) -> None:
    write(tmp_path / "train", samples(40), 20, [])
    write(tmp_path / "val", samples(40, seed=1), 20, [])
    data = stream.Config(root=str(tmp_path), size=16, workers=0)
    known = stream.TrainingOnce(data)[range(40)].batch.x
    for images, share in ((known, 1.0), (None, 0.5)):
        _, found = compare_with_training(Memory(images), data, features.drawn("random"), CPU, None, False)  # type: ignore[arg-type]
        assert found == {"nearer_reconstruction": share}
