import json
import sys
from pathlib import Path

import numpy as np
import pytest
import webdataset
import xxhash

from tests.conftest import Start, finish, jpeg, samples
from tests.data.test_tar import tar
from vaescale.data import DataError, index, shards
from vaescale.data.index import Index
from vaescale.data.stream import Samples
from vaescale.data.tar import Fields

EVERYTHING = Fields()


def make(source: Path, folder: Path, pattern: str = "*.tar", fields: Fields = EVERYTHING, processes: int = 1) -> Index:
    return shards.index(str(source), folder, pattern, fields, processes)


def test_webdataset_reads_what_we_write(tmp_path: Path) -> None:
    written = samples(23)
    made = shards.write(tmp_path, written, 10, ["a"] * 7)
    assert made.sizes.tolist() == [10, 10, 3]
    urls = [str(path) for path in sorted(tmp_path.glob("*.tar"))]
    read = list(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False))
    assert [(one["__key__"], one["jpg"], int(one["cls"]), "jpg") for one in read] == [one[:4] for one in written]


@pytest.mark.parametrize("processes", [1, 2])
def test_we_read_what_webdataset_writes(tmp_path: Path, processes: int) -> None:
    """The shards have keys with folders, long names, other extensions in between, and a sample without an image."""
    keys = [f"class/n{i:02d}" for i in range(5)] + ["long/" + "x" * 150]
    expected = {}
    with webdataset.ShardWriter(str(tmp_path / "other-%04d.tar"), maxcount=4, verbose=0) as writer:
        for i, key in enumerate(keys):
            expected[key] = (jpeg(i), i % 3)
            writer.write({"__key__": key, "json": {"i": i}, "jpeg": jpeg(i), "cls": i % 3, "txt": "words"})
        writer.write({"__key__": "text-only", "txt": "no picture"})
    made = make(tmp_path, tmp_path / "index", "other-{0000..0001}.tar", processes=processes)
    source = Samples(tmp_path / "index")
    assert {source.name(sample)[1]: source.read(sample) for sample in range(len(made))} == expected
    assert made.attribute_names == ["i"]
    assert made.attributes is not None
    assert made.attributes[:, 0].tolist() == [int(source.name(i)[1][-2:]) if i < 5 else 5 for i in range(6)]


def test_attributes_that_a_sample_lacks_are_nan(tmp_path: Path) -> None:
    for name, record in (("a", b'{"x": 1, "z": 3}'), ("b", b'{"y": 2}'), ("c", b"{}")):
        tar(tmp_path / f"{name}.tar", (f"{name}.jpg", jpeg(0)), (f"{name}.json", record))
    made = make(tmp_path, tmp_path, fields=Fields(unlabelled=True))
    nan = float("nan")
    assert made.attribute_names == ["x", "y", "z"]
    np.testing.assert_array_equal(made.attributes, [[1, nan, 3], [nan, 2, nan], [nan] * 3])


def test_too_many_attributes_ask_which(tmp_path: Path) -> None:
    record = json.dumps({f"n{i}": i for i in range(300)}).encode()
    tar(tmp_path / "a.tar", ("a.jpg", jpeg(0)), ("a.json", record))
    with pytest.raises(DataError, match="more than 256 different numeric fields: name those to keep with --attributes"):
        make(tmp_path, tmp_path, fields=Fields(unlabelled=True))
    assert make(tmp_path, tmp_path, fields=Fields(unlabelled=True, attributes=("n7",))).attribute_names == ["n7"]


def test_the_same_samples_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        shards.write(tmp_path / name, samples(5), 3, [])
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()
    assert Index(tmp_path / "a").fingerprint() == Index(tmp_path / "b").fingerprint()


def test_the_index_knows_shards_hashes_and_classes(tmp_path: Path) -> None:
    names = [f"n0{i}" for i in range(7)]
    made = shards.write(tmp_path, samples(9), 4, names)
    for shard in made.shards:
        data = (tmp_path / shard.name).read_bytes()
        assert (len(data), xxhash.xxh3_64_hexdigest(data)) == (shard.bytes, shard.xxh3)
    assert made.classes == names
    place = made.locate(5)
    assert (place.shard, place.label) == (1, 5)
    data = (tmp_path / "000001.tar").read_bytes()
    assert data[place.offset : place.offset + place.length] == samples(9)[5].image
    assert make(tmp_path, tmp_path / "again").classes == names


def test_an_interrupted_index_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards.write(tmp_path / "shards", samples(12), 3, [])
    broken = tmp_path / "shards" / "000002.tar"
    whole = broken.read_bytes()
    broken.write_bytes(whole[:1000])
    with pytest.raises(DataError, match=r"1 of 4 shards cannot be indexed: .*000002\.tar is damaged or cut"):
        make(tmp_path / "shards", tmp_path / "index")
    broken.write_bytes(whole)
    scanned = []
    monkeypatch.setattr(index, "scan", lambda path, *rest: scanned.append(path.name) or shards.scan(path, *rest))
    assert len(make(tmp_path / "shards", tmp_path / "index")) == 12
    assert scanned == ["000002.tar"]
    assert sorted(path.name for path in (tmp_path / "index").iterdir()) == ["index.json", "samples.npy"]


def test_missing_things_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none: run `python launch/shards\.py prepare"):
        Index(tmp_path / "none")
    shards.write(tmp_path, samples(2), 2, [])
    (tmp_path / "index.json").unlink()
    with pytest.raises(DataError, match=r"contains shards but no index: .*shards\.py index"):
        Index(tmp_path)
    with pytest.raises(DataError, match="no file in"):
        make(tmp_path, tmp_path, "*.zip")


@pytest.mark.parametrize("head", ["{", "[]", "{}", '{"format": 1}', '{"shards": [{"name": "a"}]}'])
def test_an_index_of_another_make_is_named(tmp_path: Path, head: str) -> None:
    (tmp_path / "index.json").write_text(head)
    with pytest.raises(DataError, match=r"index\.json (is damaged|was made by another version).*shards\.py index"):
        Index(tmp_path)


SOUND = {"root": ".", "classes": [], "attributes": [], "hashes": {"samples.npy": "0" * 16}}
ROW = ["a.tar", 1, 1, "0" * 16]


@pytest.mark.parametrize(
    "change",
    [
        {"root": 5},
        {"hashes": {}},
        {"shards": [ROW[:3]]},
        {"shards": [[*ROW, 1]]},
        {"shards": [["a.tar", -1, 1, ""], ["b.tar", 81, 1, ""]]},
        {"shards": [["a.tar", 10**30, 1, ""]]},
        {"shards": [["a.tar", "many", 1, ""]]},
        {"shards": []},
    ],
)
def test_a_hostile_index_is_one_sentence(tmp_path: Path, change: dict[str, object]) -> None:
    head = {"format": index.FORMAT, **SOUND, "shards": [ROW], **change}
    (tmp_path / "index.json").write_text(json.dumps(head))
    with pytest.raises(DataError, match=r"index\.json is damaged \(.*\): .*shards\.py index"):
        Index(tmp_path)


def test_a_deep_index_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "index.json").write_text("[" * 200_000)
    with pytest.raises(DataError, match=r"index\.json is damaged"):
        Index(tmp_path)


def test_records_of_another_kind_are_refused(tmp_path: Path) -> None:
    shards.write(tmp_path, samples(4), 2, [])
    np.save(tmp_path / "samples.npy", np.zeros(4, np.int64))
    with pytest.raises(DataError, match="do not match"):
        Index(tmp_path)


def test_records_that_changed_are_seen_by_verify(tmp_path: Path) -> None:
    made = shards.write(tmp_path, samples(4), 2, [])
    changed = np.array(made.records)
    changed["label"][1] = 6
    np.save(tmp_path / "samples.npy", changed)
    with pytest.raises(DataError, match=r"samples\.npy does not match its hash in index\.json\): .*shards\.py index"):
        shards.verify(tmp_path, False, 1)


def test_other_labels_are_another_index(tmp_path: Path) -> None:
    made = shards.write(tmp_path, samples(4), 2, [])
    assert made.fingerprint() == make(tmp_path, tmp_path / "same").fingerprint()
    assert made.fingerprint() != make(tmp_path, tmp_path / "other", fields=Fields(unlabelled=True)).fingerprint()


def test_index_and_records_must_belong_together(tmp_path: Path) -> None:
    shards.write(tmp_path, samples(4), 2, [])
    head = json.loads((tmp_path / "index.json").read_text())
    head["shards"].pop()
    (tmp_path / "index.json").write_text(json.dumps(head))
    with pytest.raises(DataError, match="do not match"):
        Index(tmp_path)


@pytest.mark.parametrize("name", ["../other.tar", "/etc/passwd", "pipe:cat x.tar", "a|b.tar", ""])
def test_a_shard_outside_its_folder_is_refused(tmp_path: Path, name: str) -> None:
    shards.write(tmp_path, samples(2), 2, [])
    head = json.loads((tmp_path / "index.json").read_text())
    head["shards"][0][0] = name
    (tmp_path / "index.json").write_text(json.dumps(head))
    with pytest.raises(DataError, match="not a valid shard name"):
        Index(tmp_path)


def test_the_index_is_never_unpickled(tmp_path: Path) -> None:
    shards.write(tmp_path, samples(2), 2, [])
    np.save(tmp_path / "samples.npy", np.array([object()] * 2), allow_pickle=True)
    with pytest.raises(DataError, match="Python objects"):
        Index(tmp_path)


MEASURE = """
import json, resource, sys, time
from pathlib import Path
import numpy as np
from vaescale.data.index import Index
from vaescale.data.order import Order
memory = lambda: int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
before, begun = memory(), time.process_time()
index = Index(Path(sys.argv[1]))
opened = time.process_time() - begun
order = Order(index.sizes, 1024, 0)
for sample in order(np.arange(10**9, 10**9 + 4096)).tolist():
    index.locate(sample)
print(json.dumps([len(index), opened, memory() - before]))
"""


def test_a_hundred_million_samples_open_at_once(tmp_path: Path, start: Start) -> None:
    """In a process of its own, under 200 MB with a batch of 4096 located at g = 10⁹. It takes 0.7 s of CPU, 1.3 on a
    busy machine; reading all the records would take 4."""
    count, per_shard = 100_000_000, 1000
    rows = [[f"{i:06d}.tar", per_shard, 10_000_000, "0123456789abcdef"] for i in range(count // per_shard)]
    head = {"format": index.FORMAT, "root": ".", "classes": [], "attributes": [], "hashes": {"samples.npy": "0" * 16}}
    head["shards"] = rows
    (tmp_path / "index.json").write_text(json.dumps(head))
    np.lib.format.open_memmap(tmp_path / "samples.npy", "w+", index.RECORD, (count,)).flush()  # holes: no disk is used
    code, output = finish(start([sys.executable, "-c", MEASURE, str(tmp_path)]))
    assert code == 0, output
    samples_, seconds, memory = json.loads(output.splitlines()[-1])
    assert samples_ == count
    assert seconds < 3
    assert memory < 200e6
