import copy
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conftest import samples
from vaescale.data import stream
from vaescale.data.decode import validation_image
from vaescale.data.shards import write
from vaescale.interfaces import LatentStatistics, Shape, calibrated
from vaescale.lifecycle.writer import unsound
from vaescale.models.kl import Config, build
from vaescale.nn import conv, reconstruction
from vaescale.training.calibration import calibrate

SIZE, COUNT = 16, 11
CPU = torch.device("cpu")
LOSSES = reconstruction.Config(l1=1.0)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    write(folder / "train", samples(COUNT), 4, [])
    return folder


def images(root: Path) -> stream.TrainingOnce:
    return stream.TrainingOnce(stream.Config(root=str(root), size=SIZE, workers=0))


def model(**changes: object) -> LatentStatistics:
    torch.manual_seed(0)
    found = build(Config(latent_dim=3, network=conv.Config(width=16, residual_width=8), **changes), Shape(3, SIZE))
    assert isinstance(found, LatentStatistics)
    return found.eval()


def by_numpy(of: LatentStatistics, pictures: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """The mean and the deviation of z ~ q(z|x) in fp64: z = μ + σ ζ, where ζ is −1 or 1 at equal shares, which has the
    mean and the variance of N(0, 1)."""
    encoder = copy.deepcopy(of.net.encoder).double()
    draws = []
    for data in pictures:
        x = torch.from_numpy(validation_image(data, SIZE).copy()).permute(2, 0, 1)[None].double() / 255 - 0.5
        mu, log_variance = encoder(x).detach().numpy()[0].reshape(2, 3, -1)
        draws += [mu - np.exp(log_variance / 2), mu + np.exp(log_variance / 2)]
    z = np.concatenate(draws, axis=1)
    return z.mean(1), z.std(1)


@pytest.mark.parametrize("changes", [{}, {"reconstruction": LOSSES}], ids=["likelihood", "losses"])
@pytest.mark.parametrize("micro", [1, 4, 50])
def test_they_are_those_of_draws_over_all_training_images(root: Path, changes: dict, micro: int) -> None:
    one = model(**changes)
    assert not calibrated(one)
    assert calibrate(one, images(root), CPU, micro) == 0
    assert calibrated(one)
    mean, std = by_numpy(one, [sample.image for sample in samples(COUNT)])
    for found, expected in zip(one.latent_statistics(), (mean, std), strict=True):
        assert found.dtype == torch.float32
        np.testing.assert_allclose(found.numpy(), expected, rtol=2e-6, atol=2e-7)
    torch.testing.assert_close(one.state_dict()["latent_std"], one.latent_statistics()[1])


def test_the_deviation_has_the_part_of_the_means_and_that_of_the_draws(root: Path) -> None:
    """With posteriors of deviation 2 at the same place, and with narrow ones: √(Var μ + E σ²)."""
    one = model()
    last = one.net.encoder[-1]
    with torch.no_grad():
        last.weight.zero_()
        last.bias.copy_(torch.tensor([5.0, -1.0, 0.0, *[2 * math.log(2)] * 3]))
    calibrate(one, images(root), CPU, 4)
    mean, std = one.latent_statistics()
    assert mean.tolist() == [5.0, -1.0, 0.0]
    torch.testing.assert_close(std, torch.full((3,), 2.0))


def test_a_stop_leaves_the_model_as_it_was(root: Path) -> None:
    one, calls = model(), []
    assert calibrate(one, images(root), CPU, 4, stopped=lambda: calls.append(0) or len(calls) == 2) == -1
    assert len(calls) == 2
    assert not calibrated(one)
    assert unsound({"ema": one.state_dict()}, dict(one.named_buffers())) == ""  # it can be saved


def test_damaged_images_are_left_out_and_counted(tmp_path: Path) -> None:
    """They can also be a whole batch."""
    write(tmp_path / "train", samples(COUNT), 4, [])
    slices, damaged = images(tmp_path), (0, 1, 5)
    for number in damaged:
        place = slices.samples.index.locate(number)
        with (tmp_path / "train" / slices.samples.index.shards[place.shard].name).open("r+b") as shard:
            shard.seek(place.offset + 20)
            shard.write(bytes(20))
    one = model()
    assert calibrate(one, slices, CPU, 2) == 3
    expected = by_numpy(one, [sample.image for i, sample in enumerate(samples(COUNT)) if i not in damaged])
    for found, wanted in zip(one.latent_statistics(), expected, strict=True):
        np.testing.assert_allclose(found.numpy(), wanted, rtol=2e-6, atol=2e-7)
