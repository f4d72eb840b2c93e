import io
import json
import math
import os
import signal
import time
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image

from tests.conftest import jpeg, samples
from vaescale import distributed
from vaescale.data import DataError, stream, workers
from vaescale.data.decode import validation_image
from vaescale.data.index import Index
from vaescale.data.order import Order
from vaescale.data.shards import index, name, write, write_shard
from vaescale.data.tar import Fields


def config(root: Path, **changes: object) -> stream.Config:
    return stream.Config(**{"root": str(root), "size": 16, "columns": 8, "workers": 0, **changes})


def take(
    root: Path, steps: int, images: int = 0, batch: int = 12, accumulation: int = 1, world: int = 1, **changes: object
) -> list[stream.Batch]:
    """Returns the global batches of `steps` steps, joined over ranks and micro-batches."""
    slices = stream.TrainSlices(config(root, **changes), seed=7)
    loaders = [
        stream.train_loader(slices, images, batch, accumulation, rank, world, pin=False) for rank in range(world)
    ]
    joined = []
    for _ in range(steps):
        parts = [part.batch for loader in loaders for part in islice(loader, accumulation)]
        joined.append(stream.Batch(*(torch.cat(tensors) for tensors in zip(*parts, strict=True))))
    return joined


def same(a: list[stream.Batch], b: list[stream.Batch]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(one, two) for x, y in zip(a, b, strict=True) for one, two in zip(x, y, strict=True)
    )


@pytest.mark.parametrize(
    ("world", "workers", "accumulation"), [(1, 2, 1), (2, 0, 1), (2, 1, 3), (4, 0, 1), (3, 2, 2), (12, 0, 1)]
)
def test_pixels_and_order_do_not_depend_on_ranks_and_workers(
    pictures: Path, world: int, workers: int, accumulation: int
) -> None:
    """16 steps of 12 are a little more than two epochs of 90 images in 5 shards; 12 ranks are more than shards."""
    assert same(take(pictures, 16), take(pictures, 16, world=world, workers=workers, accumulation=accumulation))


def test_each_epoch_holds_each_sample_once(pictures: Path) -> None:
    slices = stream.TrainSlices(config(pictures), seed=7)
    gs = torch.cat([batch.sample for batch in take(pictures, 15, world=2, workers=1)])
    keys = [slices.samples.name(sample)[1] for sample in slices.order(gs.numpy()).tolist()]
    every = sorted(f"0-{i:05d}" for i in range(90))
    assert sorted(keys[:90]) == every
    assert sorted(keys[90:]) == every
    assert keys[:90] != keys[90:]


UNEVEN = [1, 50, 3, 17, 1, 29]


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of these sizes; a sample's label is its number, so that a batch tells which samples it holds."""
    root = tmp_path_factory.mktemp("uneven")
    every = [one._replace(label=i, image=jpeg(i, 12, 10)) for i, one in enumerate(samples(sum(UNEVEN)))]
    (root / "train").mkdir()
    for number, size in enumerate(UNEVEN):
        write_shard(root / "train" / name(number), [every.pop(0) for _ in range(size)])
    index(str(root / "train"), root / "train", "*.tar", Fields(), 1)
    return root


@pytest.mark.parametrize(
    ("world", "workers", "batch"),
    [(1 << i, (0, 1, 2, 4)[j], (8, 40)[(i + j) % 2]) for i in range(4) for j in range(4)],  # all pairs
)
def test_three_epochs_are_exact_at_any_world_and_workers(uneven: Path, world: int, workers: int, batch: int) -> None:
    """Every sample once per epoch, in the order of the formula, across epochs and with more ranks than shards."""
    total = len(Index(uneven / "train"))
    steps = -(-3 * total // batch)
    seen = torch.cat([one.label for one in take(uneven, steps, batch=batch, world=world, workers=workers, size=8)])
    for epoch in range(3):
        assert sorted(seen[epoch * total : (epoch + 1) * total].tolist()) == list(range(total))
    assert seen.tolist() == Order(Index(uneven / "train").sizes, 8, 7)(np.arange(steps * batch)).tolist()


def test_a_run_keeps_the_older_order_that_it_began_with(uneven: Path) -> None:
    slices = stream.TrainSlices(config(uneven, size=8), seed=7)
    slices.follow(1)
    batches = islice(stream.train_loader(slices, 20, 10, 1, 0, 1, pin=False), 9)
    seen = torch.cat([decoded.batch.label for decoded in batches])
    sizes = Index(uneven / "train").sizes
    assert seen.tolist() == Order(sizes, 8, 7, version=1)(np.arange(20, 110)).tolist()
    assert seen.tolist() != Order(sizes, 8, 7)(np.arange(20, 110)).tolist()
    for version in (3, 0, "2", None):
        with pytest.raises(
            DataError, match="knows only 1, 2: continue with the version of vaescale that started the run"
        ):
            slices.follow(version)  # type: ignore[arg-type]


def test_one_integer_resumes(pictures: Path) -> None:
    whole = take(pictures, 16)
    assert same(whole[5:], take(pictures, 11, images=5 * 12, workers=2))


def test_labels_belong_to_their_pictures(pictures: Path) -> None:
    slices = stream.TrainSlices(config(pictures), seed=7)
    batch = take(pictures, 1)[0]
    for sample, label in zip(slices.order(batch.sample.numpy()), batch.label, strict=True):
        assert int(label) == int(slices.samples.name(int(sample))[1][2:]) % 7


def test_batches_are_uint8_and_channels_last(pictures: Path) -> None:
    x = take(pictures, 1)[0].x
    assert (x.dtype, x.shape) == (torch.uint8, (12, 3, 16, 16))
    assert x.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("world", [1, 2, 3, 8, 16])
@pytest.mark.parametrize("micro", [1, 4, 100])
def test_validation_counts_each_sample_once(
    pictures: Path, world: int, micro: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In equally many turns on all ranks."""
    slices, cpu = stream.ValidationSlices(config(pictures)), torch.device("cpu")
    monkeypatch.setattr(distributed, "world", lambda: world)
    turns = []
    for rank in range(world):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        turns.append(list(stream.once(slices, micro, cpu, "", watched=False)))
    seen = [sample for rank in turns for part in rank if part for sample in part.batch.sample.tolist()]
    assert sorted(seen) == list(range(11))
    assert {len(rank) for rank in turns} == {math.ceil(math.ceil(11 / world) / micro)}


class Watched(stream.TrainSlices):
    """Records in each sample's report which worker decoded it."""

    def __getitem__(self, gs: range) -> stream.Decoded:
        info = torch.utils.data.get_worker_info()
        batch, _ = super().__getitem__(gs)
        keys = [self.samples.name(sample)[1] for sample in self.order(np.arange(gs.start, gs.stop)).tolist()]
        worker = str(info.id if info else 0)
        return stream.Decoded(batch, [stream.Damage(g, "", key, worker) for g, key in zip(gs, keys, strict=True)])


@pytest.mark.parametrize(("world", "workers", "accumulation"), [(1, 0, 1), (2, 3, 2), (1, 4, 3)])
def test_the_schedule_is_what_the_loaders_do(pictures: Path, world: int, workers: int, accumulation: int) -> None:
    """Compares step, rank, worker and key of a run resumed at step 3."""
    first, steps = 3, 4
    slices = Watched(config(pictures, workers=workers), seed=7)
    loaders = [stream.train_loader(slices, 12 * first, 12, accumulation, rank, world, False) for rank in range(world)]
    done = []
    for step in range(first, first + steps):
        for rank, loader in enumerate(loaders):
            for part in islice(loader, accumulation):
                done += [(step, rank, int(one.cause), one.key) for one in part.damage]
    assert done == list(stream.schedule(slices.samples, 7, 8, 12, accumulation, world, workers, first, steps))


def kill_worker_zero(_: int, number: int) -> None:
    if number == 0:
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_worker_is_named_at_once(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker is killed, as by the kernel when memory runs out; without a check, the others would wait forever."""
    monkeypatch.setattr(workers, "_begin", kill_worker_zero)
    begun = time.monotonic()
    with pytest.raises(DataError, match=r"DataLoader worker \(pid.*if memory ran out, lower data\.workers"):
        take(pictures, 5, workers=2)
    assert time.monotonic() - begun < 10


def test_a_damaged_sample_is_replaced_named_and_the_same_everywhere(tmp_path: Path) -> None:
    whole = samples(40)
    broken = [one._replace(image=one.image[:-200]) if i in (3, 17) else one for i, one in enumerate(whole)]
    write(tmp_path / "train", broken, 10, [])
    slices = stream.TrainSlices(config(tmp_path), seed=7)
    found = [slices[range(start, start + 10)] for start in range(0, 80, 10)]
    damage = [one for part in found for one in part.damage]
    assert {one.key for one in damage} == {"0-00003", "0-00017"}
    assert len(damage) >= 4  # two epochs; a replacement may be damaged itself
    assert {one.shard for one in damage} == {"000000.tar", "000001.tar"}
    assert all(one.cause for one in damage)
    assert all(len(part.batch.x) == 10 for part in found)
    assert same(take(tmp_path, 6, batch=12), take(tmp_path, 6, batch=12, world=4, workers=1))


def test_training_stops_if_all_samples_are_damaged(tmp_path: Path) -> None:
    write(tmp_path / "train", [one._replace(image=one.image[:-200]) for one in samples(5)], 10, [])
    with pytest.raises(DataError, match=r"100 samples in a row are damaged.*cut or corrupt.*verify"):
        take(tmp_path, 1, batch=2)


def test_damage_in_validation_stops(tmp_path: Path) -> None:
    write(tmp_path / "val", [one._replace(image=one.image[:-200]) for one in samples(1)], 10, [])
    with pytest.raises(DataError, match=r"validation sample 0-00000 in 000000\.tar is damaged"):
        stream.ValidationSlices(config(tmp_path))[range(1)]


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    write(tmp_path / "train", samples(5), 10, [])
    (tmp_path / "train" / "000000.tar").unlink()
    with pytest.raises(DataError, match=r"000000\.tar of the index cannot be read"):
        take(tmp_path, 1, batch=2)


def test_a_shard_that_changed_after_indexing_is_named(tmp_path: Path) -> None:
    write(tmp_path / "train", samples(5), 10, [])
    with (tmp_path / "train" / "000000.tar").open("ab") as file:
        file.write(b"more")
    with pytest.raises(DataError, match=r"000000\.tar has changed since it was indexed"):
        take(tmp_path, 1, batch=2)


def test_validation_pictures_are_the_centre(tmp_path: Path) -> None:
    pixels = np.zeros((20, 40, 3), np.uint8)
    pixels[:, 10:30] = 200
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    write(tmp_path / "val", [samples(1)[0]._replace(image=file.getvalue())], 1, [])
    x = stream.ValidationSlices(config(tmp_path, size=20))[range(1)].batch.x
    assert (x == 200).all()


def test_grey_batches_are_pillows_luma(pictures: Path) -> None:
    colour, grey = take(pictures, 2)[1].x, take(pictures, 2, channels=1)[1].x
    assert grey.shape == (12, 1, 16, 16)
    assert grey.is_contiguous(memory_format=torch.channels_last)
    for one, luma in zip(colour, grey, strict=True):
        assert np.array_equal(np.asarray(Image.fromarray(one.permute(1, 2, 0).numpy()).convert("L")), luma[0])
    validation = stream.ValidationSlices(config(pictures, channels=1))
    assert validation[range(3)].batch.x.shape == stream.fixed_images(validation).x[:3].shape == (3, 1, 16, 16)


AGES = {"train": [10.0, 20.0, None, 30.0, 60.0], "val": [30.0, None, 75.0]}
BROKEN = 1  # a training sample


@pytest.fixture(scope="module")
def aged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Samples with numbers in their JSON: `age` as above, `weight` is 100 times the sample's number, `same` is 4."""
    root = tmp_path_factory.mktemp("aged")
    for split, ages in AGES.items():
        (root / split).mkdir()
        with webdataset.TarWriter(str(root / split / name(0))) as tar:
            for i, age in enumerate(ages):
                numbers = {"weight": 100 * i, "same": 4} | ({} if age is None else {"age": age})
                image = jpeg(i)[:-200] if (split, i) == ("train", BROKEN) else jpeg(i)
                tar.write({"__key__": str(i), "jpg": image, "cls": b"0", "json": json.dumps(numbers).encode()})
        index(str(root / split), root / split, "*.tar", Fields(), 1)
    return root


@pytest.mark.parametrize("split", ["train", "val"])
def test_attributes_are_standardised_by_the_training_set(aged: Path, split: str) -> None:
    """Attributes are in the requested order; missing values are NaN, constant attributes are 0."""
    names = ["weight", "same", "age"]
    if split == "train":
        slices = stream.TrainSlices(config(aged, attributes=names), seed=7)
        samples, attributes = slices.order(np.arange(5)), slices[range(5)].batch.attributes
    else:
        slices = stream.ValidationSlices(config(aged, attributes=names))
        samples, attributes = np.arange(3), slices[range(3)].batch.attributes
    assert attributes.dtype == torch.float32
    known = np.array([age for age in AGES["train"] if age is not None])
    for sample, row in zip(samples.tolist(), attributes, strict=True):
        if (split, sample) == ("train", BROKEN):
            continue
        age = np.nan if AGES[split][sample] is None else (AGES[split][sample] - known.mean()) / known.std()
        expected = [(sample - 2) / np.std(range(5)), 0, age]
        np.testing.assert_allclose(row, expected, rtol=1e-6, equal_nan=True)


def test_a_replaced_sample_has_the_attributes_of_what_replaces_it(aged: Path) -> None:
    slices = stream.TrainSlices(config(aged, attributes=["weight"]), seed=7)
    place = slices.order(np.arange(5)).tolist().index(BROKEN)
    batch, damage = slices[range(place, place + 1)]
    assert damage
    own = {float(slices[range(g, g + 1)].batch.attributes) for g in range(5) if g != place}
    assert float(batch.attributes) in own
    assert float(batch.attributes) != pytest.approx((BROKEN - 2) / np.std(range(5)))


def test_without_attributes_a_batch_has_none(aged: Path) -> None:
    assert stream.ValidationSlices(config(aged))[range(3)].batch.attributes.shape == (3, 0)


@pytest.mark.parametrize("split", ["train", "val"])
def test_an_unknown_attribute_is_named_with_those_there_are(aged: Path, pictures: Path, split: str) -> None:
    slices = {"train": lambda root: stream.TrainSlices(root, 0), "val": stream.ValidationSlices}[split]
    with pytest.raises(
        DataError, match=rf"data\.attributes: the samples in .*{split} have no hue \(available: age, sa"
    ):
        slices(config(aged, attributes=["age", "hue"]))
    with pytest.raises(DataError, match=r"have no age \(available: none\)"):
        slices(config(pictures, attributes=["age"]))


def test_without_augmentation_training_pictures_are_validation_pictures(pictures: Path) -> None:
    slices = stream.TrainSlices(config(pictures, augment=False), seed=7)
    gs = range(100, 120)  # of the second epoch
    decoded = slices[gs].batch.x
    for image, sample in zip(decoded, slices.order(np.arange(gs.start, gs.stop)).tolist(), strict=True):
        expected = validation_image(slices.samples.read(sample)[0], 16)
        assert np.array_equal(image.permute(1, 2, 0), expected)
