"""Indexes from an untrusted source, or edited: every field is checked when it is read, before it is used."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import samples
from tests.data.test_tar import PICTURE, tar
from vaescale import files
from vaescale.data import DataError, index, shards, stream
from vaescale.data.index import Index
from vaescale.data.tar import Fields
from vaescale.files import is_plain

Array = np.ndarray[Any, Any]
HASH = "0123456789abcdef"


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """Eleven samples with labels 0 to 6 in three shards, and one attribute."""
    folder = tmp_path / "data" / "train"
    folder.mkdir(parents=True)
    for number, part in enumerate((range(4), range(4, 8), range(8, 11))):
        members = [((f"{i}.jpg", PICTURE), (f"{i}.json", b'{"a": %d, "label": %d}' % (i, i % 7))) for i in part]
        tar(folder / f"{number}.tar", *(one for pair in members for one in pair))
    (folder / "classes.json").write_text(json.dumps([f"class {i}" for i in range(7)]))
    shards.index(str(folder), folder, "*.tar", Fields(label_field="label", attributes=("a",)), 1)
    return folder


def refused(folder: Path, message: str) -> None:
    """Opening or checking the index raises DataError with one plain sentence."""
    before = sorted(folder.parent.parent.rglob("*"))
    with pytest.raises(DataError, match=message) as caught:
        Index(folder).check()
    assert is_plain(str(caught.value))
    assert sorted(folder.parent.parent.rglob("*")) == before


def test_a_sound_index_passes(made: Path) -> None:
    Index(made).check()


ESCAPE = "\x1b]0;owned\x07"
SHARD: list[tuple[int, object, str]] = [
    *((3, xxh3, "hash") for xxh3 in ("../../precious/backup", "", HASH[1:], HASH + "0", HASH.upper(), HASH[1:] + "\n")),
    *((3, xxh3, "hash|kind") for xxh3 in (7, None, [HASH], "０" * 16, f"{HASH[:8]}/{HASH[:7]}", f"{HASH[:15]}*")),
    *((1, count, "samples|do not match|kind") for count in (-1, True, 1.0, "4", None, 2**40, 2**62, 3, 5)),
    *((2, size, "bytes|kind") for size in (-1, True, 1e6, "9", None, 2**50)),
    *((0, name, "not a valid shard name") for name in ("../x.tar", "/x.tar", "a/../../x", f"{ESCAPE}.tar", "")),
    *((0, name, "not a valid shard name") for name in ("pipe:x", "a\n.tar", "\u202ex.tar", "a#b", "a?b", "%2e")),
    *((0, name, "name|kind") for name in (7, None, ["0.tar"])),
    (0, "1.tar", "two shards have the same name"),
]


@pytest.mark.parametrize(("field", "value", "message"), SHARD, ids=range(len(SHARD)))
def test_a_hostile_shard(made: Path, field: int, value: object, message: str) -> None:
    head = json.loads((made / "index.json").read_text())
    head["shards"][0][field] = value
    (made / "index.json").write_text(json.dumps(head))
    refused(made, message)


FILES = ["samples.npy", "attributes.npy"]
HEAD: list[tuple[str, object, str]] = [
    *(("root", root, "root") for root in (5, None, "", ["."], f"a{ESCAPE}")),
    *(
        ("root", root, "not supported|not a supported protocol|credentials")
        for root in ("pipe:touch x", "file:///etc", "http://a:b@c/d")
    ),
    *(("classes", classes, "classes") for classes in (None, 7, {"a": 1}, "abcdefg", [1] * 7, [ESCAPE] * 7, [["a"]])),
    ("classes", ["one"], "label outside -1 to 0"),
    *(("attributes", names, "kind|attributes") for names in (None, 7, ["a", "a"], [ESCAPE], [1], {"a": 1})),
    ("attributes", [f"a{i}" for i in range(257)], "attributes"),
    ("attributes", ["a", "b"], "do not match"),
    ("attributes", [], "hashes"),
    *(("hashes", hashes, "hash|kind") for hashes in (None, [], {}, "samples.npy", {"samples.npy": HASH}, FILES)),
    ("hashes", {"samples.npy": HASH, "attributes.npy": HASH, "../../etc/passwd": HASH}, "hashes"),
    ("hashes", {"samples.npy": "../x", "attributes.npy": HASH}, "hash"),
    ("hashes", {"samples.npy": HASH, "attributes.npy": HASH}, "samples.npy does not match its hash"),
    *(("shards", rows, "kind|range|damaged") for rows in (None, 7, [], [[]], [7], ["abcd"], {"abcd": 1}, [{}])),
]


@pytest.mark.parametrize(("field", "value", "message"), HEAD, ids=range(len(HEAD)))
def test_a_hostile_head(made: Path, field: str, value: object, message: str) -> None:
    head = json.loads((made / "index.json").read_text())
    (made / "index.json").write_text(json.dumps({**head, field: value}))
    refused(made, message)
    del head[field]
    (made / "index.json").write_text(json.dumps(head))
    refused(made, r"index\.json is damaged \(fields are missing or of the wrong type\)")


def test_damaged_json(made: Path) -> None:
    text = (made / "index.json").read_bytes()
    for odd in (b"", text[:-9], text + b"\0" * 512, b"\xff" + text, b"[" * 10**6, text.replace(b"[0-9]", b"1e400")):
        (made / "index.json").write_bytes(odd)
        if odd != text:
            refused(made, r"index\.json is damaged \(it is n")
    (made / "index.json").write_bytes(b'{"format": 3, ' + text[1:])
    refused(made, "contains the key 'format' twice")


def put(place: str, value: int, where: int | slice) -> Callable[[Array], Array]:
    def edit(records: Array) -> Array:
        records[place][where] = value
        return records

    return edit


LIES = "sample 5 of 1.tar lies outside its shard"
RECORDS: dict[str, tuple[Callable[[Array], Array], str]] = {
    "offset -1": (put("offset", -1, 5), LIES),
    "offset in header": (put("offset", 511, 5), LIES),
    "offset beyond": (put("offset", 2**60, 5), LIES),
    "offset max": (put("offset", 2**63 - 1, 5), LIES),
    "offset min": (put("offset", -(2**63), 5), LIES),
    "length": (put("length", 2**32 - 1, 5), LIES),
    "head": (put("head", 2**32 - 1, 5), LIES),
    "last": (put("offset", -5, 10), "sample 10 of 2.tar lies outside its shard"),
    "every": (put("offset", -5, slice(None)), "sample 0 of 0.tar lies outside its shard"),
    "label -2": (put("label", -2, 5), "sample 5 of 1.tar has a label outside -1 to 6"),
    "label 7": (put("label", 7, 5), "sample 5 of 1.tar has a label outside -1 to 6"),
    "one column": (lambda records: np.ascontiguousarray(records["offset"]), "do not match"),
    "two dimensions": (lambda records: np.stack([records, records], 1), "do not match"),
    "other names": (lambda records: records.astype([(f"f{i}", records.dtype[i]) for i in range(5)]), "do not match"),
    "big-endian": (lambda records: records.astype(records.dtype.newbyteorder()), "do not match"),
    "one less": (lambda records: records[1:], "do not match"),
    "none": (lambda records: records[:0], "do not match|damaged"),
    "objects": (lambda records: np.array([1, "a", None], object), "Python objects"),
}


def edited(folder: Path, name: str, edit: Callable[[Array], Array], forge: bool) -> None:
    """With `forge`, index.json contains the hash of the edited file."""
    array = edit(np.load(folder / name))
    np.save(folder / name, array, allow_pickle=True)
    if forge:
        head = json.loads((folder / "index.json").read_text())
        head["hashes"][name] = files.file_hash(folder / name)
        (folder / "index.json").write_text(json.dumps(head))


@pytest.mark.parametrize("forge", [True, False])
@pytest.mark.parametrize("name", RECORDS)
def test_hostile_records(made: Path, name: str, forge: bool) -> None:
    edit, message = RECORDS[name]
    edited(made, "samples.npy", edit, forge)
    opened = "do not match" in message or "objects" in message
    refused(
        made,
        message if forge or opened else r"samples\.npy does not match its hash in index\.json\): .*shards\.py index",
    )


def test_exchanged_labels_are_found(made: Path) -> None:
    def exchange(records: Array) -> Array:
        records["label"] = records["label"][::-1].copy()
        return records

    edited(made, "samples.npy", exchange, forge=False)
    with pytest.raises(DataError, match=r"samples\.npy does not match its hash"):
        index.check_files(Index(made))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda values: np.where(values == 3, np.inf, values), "contains infinite values"),
        (lambda values: values.astype(np.float64), "do not match"),
        (lambda values: values[:-1], "do not match"),
        (lambda values: values[:, 0], "do not match"),
        (lambda values: np.concatenate([values, values], 1), "do not match"),
        (lambda values: values.astype(object), "Python objects"),
    ],
)
def test_hostile_attributes(made: Path, edit: Callable[[Array], Array], message: str) -> None:
    edited(made, "attributes.npy", edit, forge=True)
    refused(made, message)


@pytest.mark.parametrize("name", ["samples.npy", "attributes.npy"])
def test_what_is_no_array(made: Path, name: str) -> None:
    data = (made / name).read_bytes()
    shape = data.index(b"'shape': (11")
    for odd in (
        *(b"", b"\x93NUMPY", data[:60], data[:-1], b"PK\x03\x04" + data, data[:6] + b"\x09" + data[7:]),
        data.replace(b"'shape': (11", b"'shape': (-1"),
        data[: shape + 10] + b"9" * 9 + data[shape + 19 :],
        data.replace(b"descr", b"dexcr"),
        data[:10] + b"(" * 100 + data[110:],
        b"\x93NUMPY\x02\x00" + (9000).to_bytes(4, "little") + b"(" * 9000 + bytes(1000),
    ):
        (made / name).write_bytes(odd)
        refused(made, rf"{name} (is damaged|and index\.json in .* do not match)|does not match its hash")


@pytest.mark.parametrize("name", ["index.json", "samples.npy", "attributes.npy"])
@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_only_regular_files_are_opened(made: Path, name: str, kind: str) -> None:
    (made / name).unlink()
    if kind == "pipe":
        os.mkfifo(made / name)
    elif kind == "device":
        (made / name).symlink_to("/dev/zero")
    else:
        (made / name).mkdir()
    refused(made, "not a regular file")


def test_records_are_checked_across_parts(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards of 4, 4 and 3 samples in parts of 1 to 12."""
    edited(made, "samples.npy", put("offset", 0, 9), forge=True)
    for rows in range(1, 13):
        monkeypatch.setattr(index, "CHECKED", rows)
        refused(made, r"sample 9 of 2\.tar lies outside its shard")


def test_more_labels_than_names_are_not_indexed(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"000001\.tar has the label 6, but classes\.json names only the classes 0 to 5"
    ):
        shards.write(tmp_path, samples(8), 5, [str(i) for i in range(6)])
    assert not (tmp_path / "index.json").exists()


@pytest.mark.parametrize(
    "text", [b"", b'"a"', b"[1]", b'["\\u001b[2J"]', b'["\\ud800"]', b'["\xff"]', b"[" * 10**5, b'{"a": 1}']
)
def test_class_names_that_are_none(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "classes.json").write_bytes(text)
    with pytest.raises(
        DataError, match=r"classes\.json is not a list of class names( \(.*\))?: fix or remove it"
    ) as caught:
        shards.read_classes(tmp_path / "classes.json")
    assert is_plain(str(caught.value))


def test_class_names_are_checked_before_anything_is_indexed(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"is not a valid class name"):
        shards.write_classes(tmp_path, ["cat", ESCAPE])
    assert not (tmp_path / "classes.json").exists()
    (tmp_path / "classes.json").mkdir()
    with pytest.raises(DataError, match=r"classes\.json is not a list of class names \(it is not a regular file\)"):
        shards.read_classes(tmp_path / "classes.json")


def test_an_attribute_that_no_sample_has(made: Path) -> None:
    edited(made, "attributes.npy", lambda values: np.full_like(values, np.nan), forge=True)
    with pytest.raises(DataError, match=r"no sample in .*train has a value for a"):
        stream.TrainSlices(stream.Config(root=str(made.parent), attributes=["a"]), seed=0)


def test_errors_are_made_printable() -> None:
    error = DataError(f"no {ESCAPE}\nstep 12 loss 0.1 \ud800")
    assert str(error) == r"no \x1b]0;owned\x07\nstep 12 loss 0.1 \ud800"
    # As torch passes on what a loader's worker has raised.
    assert str(DataError(f"Caught it.\nTraceback:\n  line 1\nvaescale.data.DataError: {error}\n")) == str(error)
