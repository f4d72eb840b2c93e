"""Shards damaged after indexing: verify names them; training replaces their samples or stops."""

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import samples
from tests.data.test_stream import config
from vaescale.data import DataError, shards, stream
from vaescale.data.index import Index

PER_SHARD = 10


def fifth(path: Path) -> tuple[tarfile.TarInfo, tarfile.TarInfo]:
    """Returns (class, image) of the fifth sample, in the order in which webdataset writes them."""
    with tarfile.open(path) as tar:
        first, second = tar.getmembers()[8:10]
    assert (first.name[-3:], second.name[-3:]) == ("cls", "jpg")
    return first, second


def cut_in_picture(data: bytearray, label: tarfile.TarInfo, picture: tarfile.TarInfo) -> bytearray:
    return data[: picture.offset_data + 100]


def cut_at_member(data: bytearray, label: tarfile.TarInfo, picture: tarfile.TarInfo) -> bytearray:
    return data[: label.offset]


def cut_between_class_and_picture(data: bytearray, label: tarfile.TarInfo, picture: tarfile.TarInfo) -> bytearray:
    return data[: picture.offset]


def cut_in_header(data: bytearray, label: tarfile.TarInfo, picture: tarfile.TarInfo) -> bytearray:
    return data[: picture.offset + 200]


def flip_header(data: bytearray, label: tarfile.TarInfo, picture: tarfile.TarInfo) -> bytearray:
    data[label.offset + 3] ^= 1
    return data


def flip_size_in_header(data: bytearray, label: tarfile.TarInfo, picture: tarfile.TarInfo) -> bytearray:
    data[picture.offset + 130] ^= 1
    return data


def flip_picture(data: bytearray, label: tarfile.TarInfo, picture: tarfile.TarInfo) -> bytearray:
    data[picture.offset_data + 300] ^= 0x10
    return data


# damage → samples of ten that are lost; a broken header loses none, because the index knows where the pictures lie
DAMAGE = {
    cut_in_picture: 6,
    cut_at_member: 6,
    cut_between_class_and_picture: 6,
    cut_in_header: 6,
    flip_header: 0,
    flip_size_in_header: 0,
    flip_picture: 1,
}
NAMES = [damage.__name__ for damage in DAMAGE]


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """Shard k has the k-th damage; one more shard is intact."""
    made = shards.write(tmp_path / "train", samples(PER_SHARD * (len(DAMAGE) + 1)), PER_SHARD, [])
    for shard, damage in zip(made.shards, DAMAGE, strict=False):
        path = tmp_path / "train" / shard.name
        path.write_bytes(damage(bytearray(path.read_bytes()), *fifth(path)))
    return tmp_path


def test_verify_names_every_damaged_shard_and_its_losses(damaged: Path) -> None:
    found = {finding.shard: finding for finding in shards.verify(damaged / "train", False, 1)}
    assert sorted(found) == [shards.name(number) for number in range(len(DAMAGE))]
    for number, lost in enumerate(DAMAGE.values()):
        assert (found[shards.name(number)].lost, found[shards.name(number)].samples) == (lost, PER_SHARD), NAMES[number]
    for number in (4, 5):
        assert "changed bytes; " in found[shards.name(number)].cause
        assert "is damaged or cut off at byte" in found[shards.name(number)].cause


def test_verify_finds_nothing_in_whole_shards(pictures: Path) -> None:
    for decoding, processes in ((False, 1), (True, 2)):
        assert list(shards.verify(pictures / "train", decoding, processes)) == []


def test_verify_decodes_when_asked(tmp_path: Path) -> None:
    """The images were damaged before they were indexed."""
    written = [one._replace(image=one.image[:-200]) if i in (2, 5) else one for i, one in enumerate(samples(8))]
    shards.write(tmp_path, written, 4, [])
    assert list(shards.verify(tmp_path, False, 1)) == []
    found = list(shards.verify(tmp_path, True, 1))
    assert [(one.shard, one.lost) for one in found] == [("000000.tar", 1), ("000001.tar", 1)]


def test_verify_names_a_missing_shard(tmp_path: Path) -> None:
    shards.write(tmp_path, samples(8), 4, [])
    (tmp_path / "000001.tar").unlink()
    (found,) = shards.verify(tmp_path, False, 1)
    assert (found.shard, found.lost, found.cause) == ("000001.tar", 4, "No such file or directory")


def test_training_stops_at_a_shard_of_another_size(damaged: Path) -> None:
    slices = stream.TrainSlices(config(damaged), seed=7)
    with pytest.raises(DataError, match=r"000000\.tar has changed since it was indexed"):
        slices.samples.read(0)


def test_training_replaces_what_has_changed_and_gives_no_half_sample(damaged: Path) -> None:
    """Two epochs over shards of the right sizes: every image is one that was written, with its own label."""
    index = Index(damaged / "train")
    whole = [shards.name(number) for number in range(4, len(DAMAGE) + 1)]
    kept = damaged / "kept"
    original = {one.key: one for one in samples(PER_SHARD * (len(DAMAGE) + 1))}
    flipped = f"0-{6 * PER_SHARD + 4:05d}"
    keep_only(index, kept / "train", whole)
    slices = stream.TrainSlices(config(kept, columns=3), seed=7)
    gs = np.arange(2 * len(slices.samples.index))
    decoded = slices[range(len(gs))]
    assert {one.key for one in decoded.damage} == {flipped}
    assert {one.cause for one in decoded.damage} == {"changed since it was indexed"}
    replaced = {one.g for one in decoded.damage}
    for g, sample in zip(gs.tolist(), slices.order(gs).tolist(), strict=True):
        if g not in replaced:
            one = original[f"0-{4 * PER_SHARD + sample:05d}"]
            assert int(decoded.batch.label[g]) == one.label
            assert slices.samples.read(sample) == (one.image, one.label)
    assert slices.samples.name(PER_SHARD + 4)[1] == f"sample {PER_SHARD + 4} (its header is damaged)"


def keep_only(index: Index, folder: Path, names: list[str]) -> None:
    """Returns an index of some of the shards, made before they were damaged."""
    folder.mkdir(parents=True)
    head = json.loads((index.folder / "index.json").read_text())
    rows = [number for number, shard in enumerate(index.shards) if shard.name in names]
    head["shards"] = [head["shards"][number] for number in rows]
    head["root"] = str(index.folder)
    (folder / "index.json").write_text(json.dumps(head))
    records = [index.records[index.first[n] : index.first[n] + index.sizes[n]] for n in rows]
    np.save(folder / "samples.npy", np.concatenate(records))
