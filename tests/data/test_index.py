import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset

from tests.conftest import jpeg, samples
from vaescale.data import DataError, index, shards
from vaescale.data.index import Index, key_of, scan
from vaescale.data.stream import Samples


def test_webdataset_reads_what_we_write(tmp_path: Path) -> None:
    written = samples(23)
    made = shards.write(tmp_path, written, 10, ["a"] * 7)
    assert made.sizes.tolist() == [10, 10, 3]
    urls = [str(path) for path in sorted(tmp_path.glob("*.tar"))]
    read = list(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False))
    assert [(one["__key__"], one["jpg"], int(one["cls"])) for one in read] == [tuple(one) for one in written]


def test_we_read_what_webdataset_writes(tmp_path: Path) -> None:
    """Keys with folders, long names (GNU headers), other extensions in between, a sample without an image."""
    keys = [f"class/n{i:02d}" for i in range(5)] + ["long/" + "x" * 150]
    expected = {}
    with webdataset.ShardWriter(str(tmp_path / "other-%04d.tar"), maxcount=4, verbose=0) as writer:
        for i, key in enumerate(keys):
            expected[key] = (jpeg(i), i % 3)
            writer.write({"__key__": key, "json": {"i": i}, "jpeg": jpeg(i), "cls": i % 3, "txt": "words"})
        writer.write({"__key__": "text-only", "txt": "no picture"})
    folder = tmp_path / "index"
    made = shards.index(folder, tmp_path, "other-*.tar")
    source = Samples(folder)
    assert len(made) == len(expected)
    for sample in range(len(made)):
        _, key = source.name(sample)
        found = [full for full in expected if full.startswith(key)]  # a header holds at most 100 bytes of a name
        assert source.read(sample) == expected[found[0]]


def test_the_same_samples_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        shards.write(tmp_path / name, samples(5), 3, [])
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()
    assert Index(tmp_path / "a").fingerprint() == Index(tmp_path / "b").fingerprint()


def test_the_index_knows_shards_hashes_and_classes(tmp_path: Path) -> None:
    import xxhash

    made = shards.write(tmp_path, samples(9), 4, [])
    for shard in made.shards:
        data = (tmp_path / shard.name).read_bytes()
        assert (len(data), xxhash.xxh3_64_hexdigest(data)) == (shard.bytes, shard.xxh3)
    assert made.classes == [str(label) for label in range(7)]
    path, offset, length, label = made.locate(5)
    assert path == tmp_path / "000001.tar"
    assert key_of(path, offset) == "0-00005"
    assert path.read_bytes()[offset : offset + length] == samples(9)[5].jpg
    assert label == 5


@pytest.mark.parametrize("damage", ["cut", "cut at a member", "header"])
def test_a_damaged_shard_is_named(tmp_path: Path, damage: str) -> None:
    """webdataset and tarfile end quietly at each of these."""
    shards.write(tmp_path, samples(6), 6, [])
    path = tmp_path / "000000.tar"
    data = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
        member = tar.getmembers()[6]
    if damage == "header":
        data[member.offset] ^= 1
    else:
        del data[member.offset + (700 if damage == "cut" else 0) :]
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"000000\.tar is damaged or cut"):
        list(scan(path))


def test_a_label_that_is_no_number_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        member = tarfile.TarInfo("k.cls")
        member.size = 3
        tar.addfile(member, io.BytesIO(b"cat"))
    with pytest.raises(DataError, match=r"k\.cls holds b'cat', not a class number"):
        list(scan(path))


def test_a_picture_without_a_class_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        tar.addfile(tarfile.TarInfo("k.jpg"), io.BytesIO())
    with pytest.raises(DataError, match="the sample k has a picture but no class"):
        list(scan(path))


@pytest.mark.parametrize("data", [b"", b"\x1f\x8b compressed" * 100])
def test_what_is_no_tar_is_named(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.tar").write_bytes(data)
    with pytest.raises(DataError, match=r"a\.tar is no plain tar"):
        list(scan(tmp_path / "a.tar"))


def test_missing_things_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"shards\.py demo"):
        Index(tmp_path / "none")
    shards.write(tmp_path, samples(2), 2, [])
    (tmp_path / "index.json").unlink()
    with pytest.raises(DataError, match=r"holds shards but no index: .*shards\.py index"):
        Index(tmp_path)
    with pytest.raises(DataError, match="no file in"):
        shards.index(tmp_path, pattern="*.zip")


def test_index_and_records_must_belong_together(tmp_path: Path) -> None:
    shards.write(tmp_path, samples(4), 2, [])
    head = json.loads((tmp_path / "index.json").read_text())
    head["shards"].pop()
    (tmp_path / "index.json").write_text(json.dumps(head))
    with pytest.raises(DataError, match="do not belong together"):
        Index(tmp_path)


def test_the_index_is_never_unpickled(tmp_path: Path) -> None:
    shards.write(tmp_path, samples(2), 2, [])
    np.save(tmp_path / "samples.npy", np.array([object()] * 2), allow_pickle=True)
    with pytest.raises(DataError, match="Python objects"):
        Index(tmp_path)


def test_records_are_mapped_not_read(tmp_path: Path) -> None:
    shards.write(tmp_path, samples(2), 2, [])
    assert isinstance(Index(tmp_path).records, np.memmap)
    assert index.RECORD.itemsize == 16
