"""Tars from other sources, valid and hostile."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import jpeg, samples
from vaescale.data import DataError, shards
from vaescale.data.tar import Fields, checksum, key_in, scan

PICTURE = jpeg(0)


def tar(path: Path, *members: tuple[str, bytes] | tarfile.TarInfo, form: int = tarfile.USTAR_FORMAT) -> Path:
    with tarfile.open(path, "w", format=form) as file:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                file.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                file.addfile(info, io.BytesIO(member[1]))
    return path


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize(
    "key", ["a", "a.b.c", "deep/er.folder/a", "x" * 95, "y" * 90 + "/" + "z" * 90, "Größe/größer", "with space"]
)
def test_keys_offsets_and_bytes(tmp_path: Path, form: int, key: str) -> None:
    """All ways in which tars store names, including long names and non-ASCII letters."""
    path = tar(
        tmp_path / "a.tar", ("first.jpg", b"1"), ("first.cls", b"0"), (f"{key}.jpg", PICTURE), (f"{key}.cls", b"7")
    )
    first, second = scan(path)
    assert (first.key, second.key, second.label) == ("first", key, 7)
    data = path.read_bytes()
    assert data[second.offset : second.offset + second.length] == PICTURE
    assert second.check == checksum(PICTURE)
    assert key_in(data[second.offset - second.head : second.offset]) == key


def test_members_are_grouped_as_webdataset_groups_them(tmp_path: Path) -> None:
    path = tar(
        tmp_path / "a.tar",
        *(
            ("1.jpg", PICTURE),
            ("1.seg.png", b"mask"),
            ("1.cls", b"1"),
        ),  # a second picture under an extension of its own
        *(("2.2019.jpg", PICTURE), ("2.2019.cls", b"2"), ("2.2020.jpg", PICTURE), ("2.2020.cls", b"3")),  # dotted keys
        *(("words.txt", b"no picture"), ("4.cls", b"4"), ("4.txt", b"words"), ("4.WEBP", PICTURE)),
    )
    assert [(one.key, one.label) for one in scan(path)] == [("1", 1), ("2.2019", 2), ("2.2020", 3), ("4", 4)]


def test_labels_and_attributes_from_json(tmp_path: Path) -> None:
    record = {"label": 3, "age": 41.5, "smiling": True, "name": "x", "none": None, "box": [1, 2], "eye": {"left": 9}}
    path = tar(tmp_path / "a.tar", ("1.jpg", PICTURE), ("1.json", json.dumps(record).encode()), ("1.txt", b"words"))
    numbers = {"label": 3, "age": 41.5, "smiling": 1, "box.0": 1, "box.1": 2, "eye.left": 9}
    (one,) = scan(path, Fields(label_field="label"))
    assert (one.label, one.attributes) == (3, numbers)
    (one,) = scan(path, Fields(unlabelled=True, attributes=("age",)))
    assert (one.label, one.attributes) == (0, {"age": 41.5})
    with pytest.raises(DataError, match=r"no class \(no 1\.cls\): give --label-field NAME .*--unlabelled"):
        list(scan(path))
    with pytest.raises(DataError, match=r"field name contains 'x', not a class number"):
        list(scan(path, Fields(label_field="name")))


ODD_LABELS = [
    b"cat",
    b"-1",
    b"2147483648",
    b"9" * 5000,
    b"1.5",
    b"",
    b"0_1",
    b"+1",
    b"0x1",
    b"1 2",
    b"\x1b[2J1",
    b"1\x00",
]


@pytest.mark.parametrize("text", [*ODD_LABELS, "１２".encode(), "²".encode(), "١".encode(), b"\xff1"])
def test_a_label_that_is_no_class_number_is_named(tmp_path: Path, text: bytes) -> None:
    path = tar(tmp_path / "a.tar", ("k.jpg", PICTURE), ("k.cls", text))
    with pytest.raises(DataError, match=r"k\.cls contains .*, not a class number"):
        list(scan(path))


@pytest.mark.parametrize("value", ["0_1", "１２", True, 1.5, -1, [1], "", 2**31, float("nan"), "\ud800", "\x1b[2J"])
def test_a_json_value_that_is_no_class_number_is_named(tmp_path: Path, value: object) -> None:
    path = tar(tmp_path / "a.tar", ("k.jpg", PICTURE), ("k.json", json.dumps({"label": value}).encode()))
    with pytest.raises(DataError, match=r"k\.json, field label contains .*, not a class number") as caught:
        list(scan(path, Fields(label_field="label")))
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("text", "label"),
    [
        (b"0", 0),
        (b"007", 7),
        (b" 12\r\n", 12),
        (b"\xef\xbb\xbf3\n", 3),
        (b"2147483647", 2**31 - 1),
        (b"3.0", 3),
        (b"3.\n", 3),
    ],
)
def test_class_numbers(tmp_path: Path, text: bytes, label: int) -> None:
    assert [one.label for one in scan(tar(tmp_path / "a.tar", ("k.jpg", PICTURE), ("k.cls", text)))] == [label]


@pytest.mark.parametrize(
    ("record", "name", "label"),
    [
        ({"label": 3.0}, "label", 3),
        ({"label": "3.00"}, "label", 3),
        ({"meta": {"label": 3}}, "meta.label", 3),
        ({"meta": {"label": 3}, "meta.label": 4}, "meta.label", 4),
        ({"a": [{"b": 5}, {"b": 6}]}, "a.1.b", 6),
    ],
)
def test_labels_in_json(tmp_path: Path, record: object, name: str, label: int) -> None:
    path = tar(tmp_path / "a.tar", ("k.jpg", PICTURE), ("k.json", json.dumps(record).encode()))
    assert [one.label for one in scan(path, Fields(label_field=name))] == [label]


@pytest.mark.parametrize("name", ["meta.none", "meta.label.x", "none.label", "a.7", "a.x", "meta"])
def test_a_field_that_is_not_there_is_named(tmp_path: Path, name: str) -> None:
    record = {"meta": {"label": 3}, "a": [1]}
    path = tar(tmp_path / "a.tar", ("k.jpg", PICTURE), ("k.json", json.dumps(record).encode()))
    with pytest.raises(DataError, match=rf"k\.json, field {name}"):
        list(scan(path, Fields(label_field=name)))


def test_extensions_in_capitals(tmp_path: Path) -> None:
    record = json.dumps({"age": 5}).encode()
    path = tar(
        tmp_path / "a.tar",
        ("A.JPG", PICTURE),
        ("A.CLS", b"7"),
        ("A.JSON", record),
        ("b.v.PNG", PICTURE),
        ("b.v.Cls", b"8"),
    )
    assert [(one.key, one.label, one.attributes) for one in scan(path)] == [("A", 7, {"age": 5}), ("b.v", 8, {})]
    with pytest.raises(DataError, match="the key a occurs twice"):
        list(scan(tar(tmp_path / "b.tar", ("a.jpg", PICTURE), ("a.JPG", PICTURE), ("a.cls", b"0"))))


@pytest.mark.parametrize(
    "order", ["a.jpg b.jpg a.cls b.cls", "a.cls b.cls a.jpg b.jpg", "b.jpg b.cls a.jpg c.txt a.CLS"]
)
def test_members_that_are_not_adjacent_are_named(tmp_path: Path, order: str) -> None:
    path = tar(tmp_path / "a.tar", *((name, PICTURE if name.endswith("jpg") else b"1") for name in order.split()))
    with pytest.raises(
        DataError, match=r"sample a are not next to each other, a\.(cls|CLS) is elsewhere.*tar --sort=name"
    ):
        list(scan(path))
    path = tar(tmp_path / "b.tar", ("x.v1.jpg", PICTURE), ("y.jpg", PICTURE), ("x.v1.json", b'{"c": 1}'))
    with pytest.raises(DataError, match=r"sample x\.v1 are not next to each other, x\.v1\.json is elsewhere"):
        list(scan(path, Fields(label_field="c")))


NO_JSON = [b"[" * 200_000, b"{", b"[1]", b'{"a": 1, "a": 2}', b"\xff\xfe", b'{"a":' * 99 + b"1" + b"}" * 99]


@pytest.mark.parametrize("text", NO_JSON, ids=range(len(NO_JSON)))
def test_invalid_json_is_named(tmp_path: Path, text: bytes) -> None:
    path = tar(tmp_path / "a.tar", ("k.jpg", PICTURE), ("k.cls", b"0"), ("k.json", text))
    with pytest.raises(DataError, match=r"k\.json is not a JSON object"):
        list(scan(path))


def test_two_pictures_in_one_sample_ask_which(tmp_path: Path) -> None:
    path = tar(tmp_path / "a.tar", ("k.jpg", PICTURE), ("k.png", b"mask"), ("k.cls", b"0"))
    with pytest.raises(DataError, match=r"several images, k\.jpg and k\.png: choose one with --picture"):
        list(scan(path))
    assert [one.length for one in scan(path, Fields(extensions=("png",)))] == [4]


def special(name: str, kind: bytes, target: str = "/etc/passwd") -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member


def claim(name: str, size: int) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.size = size
    return member


def pax(name: str, headers: dict[str, str]) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.pax_headers = headers
    return member


HOSTILE = {
    "parent": ([("../k.jpg", PICTURE), ("../k.cls", b"0")], "not have a valid name"),
    "absolute": ([("/tmp/k.jpg", PICTURE)], "not have a valid name"),
    "escape": ([("k\x1b[2J.jpg", PICTURE)], "not have a valid name"),
    "right to left": ([("k\u202egpj.jpg", PICTURE)], "not have a valid name"),
    "sparse map": ([pax("k.jpg", {"GNU.sparse.map": "a,b"})], "is damaged|is not a plain tar"),
    "size in PAX": ([pax("k.jpg", {"size": "-512"})], "is damaged|is not a plain tar"),
    "newline": ([("k\n0 0 0 other.jpg", PICTURE)], "not have a valid name"),
    "symbolic link": ([special("k.jpg", tarfile.SYMTYPE), ("k.cls", b"0")], r"k\.jpg is a link, a device or sparse"),
    "hard link": ([special("k.jpg", tarfile.LNKTYPE), ("k.cls", b"0")], r"k\.jpg is a link, a device or sparse"),
    "device": ([special("k.jpg", tarfile.CHRTYPE), ("k.cls", b"0")], r"k\.jpg is a link, a device or sparse"),
    "pipe": ([special("k.jpg", tarfile.FIFOTYPE), ("k.cls", b"0")], r"k\.jpg is a link, a device or sparse"),
    "key twice": ([("k.jpg", b"1"), ("k.cls", b"0"), ("l.txt", b""), ("k.jpg", b"2")], "the key k occurs twice"),
    "member twice": ([("k.jpg", b"1"), ("k.jpg", b"2"), ("k.cls", b"0")], "the key k occurs twice"),
    "8 GB, last": ([("j.jpg", b"1"), ("j.cls", b"0"), claim("k.jpg", 8 << 30)], "is damaged or cut"),
    "8 GB, first": ([claim("k.jpg", 8 << 30), ("k.cls", b"0")], "is damaged or cut"),
    "8 GB class": ([("k.jpg", PICTURE), claim("k.cls", 8 << 30)], "is damaged or cut"),
}


def form_of(members: list[object]) -> int:
    headers = any(isinstance(member, tarfile.TarInfo) and member.pax_headers for member in members)
    return tarfile.PAX_FORMAT if headers else tarfile.GNU_FORMAT


def test_a_thousand_chained_headers_are_refused(tmp_path: Path) -> None:
    """tarfile reads each chained header by recursion."""
    header = tarfile.TarInfo("g")
    header.type, header.size = tarfile.XGLTYPE, 0
    path = tmp_path / "a.tar"
    path.write_bytes(header.tobuf(tarfile.USTAR_FORMAT) * 3000 + bytes(1024))
    with pytest.raises(DataError, match=r"is damaged or cut|is not a plain tar"):
        list(scan(path))


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_numbers_beyond_float32_are_left_out(tmp_path: Path) -> None:
    """The sample is read as if it lacked them; float32 ends at 3.4e38, and numpy would warn of more."""
    numbers = [b"1" + b"0" * 400, b"1" + b"0" * 9000, b"1e39", b"-1e39", b"1e400", b"NaN", b"-Infinity"]
    text = b'{"a": [' + b",".join(numbers) + b'], "b": 3.4e38, "c": 1e-50}'
    tar(tmp_path / "a.tar", ("k.jpg", PICTURE), ("k.cls", b"0"), ("k.json", text))
    made = shards.index(str(tmp_path), tmp_path, "*.tar", Fields(), 1)
    assert made.attribute_names == ["b", "c"]
    assert made.attributes is not None
    assert made.attributes.tolist() == [[float(np.float32(3.4e38)), 0.0]]


def test_names_in_json_are_made_printable(tmp_path: Path) -> None:
    text = json.dumps({"\x1b[2J": 1, "\ud800": {"\u202e": 2}, "x" * 1000: 3, "größe\u00a0😀": 4}).encode()
    tar(tmp_path / "a.tar", ("k.jpg", PICTURE), ("k.cls", b"0"), ("k.json", text))
    made = shards.index(str(tmp_path), tmp_path, "*.tar", Fields(), 1)
    assert made.attribute_names == ["\\ud800.\\u202e", "\\x1b[2J", "größe\u00a0😀", "x" * 200 + "…"]


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_tar_is_refused_and_nothing_is_made(tmp_path: Path, name: str) -> None:
    members, message = HOSTILE[name]
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    path = tar(folder / "a.tar", *members, form=form_of(members))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(DataError, match=message):
        list(scan(path))
    assert sorted(tmp_path.rglob("*")) == before
    with pytest.raises(DataError, match=message):
        shards.index(str(folder), tmp_path / "index", "*.tar", Fields(), 1)
    assert not (tmp_path / "index" / "index.json").exists()


def test_only_the_named_members_are_read(tmp_path: Path) -> None:
    """A pickle next to the image is not opened."""
    bomb = b"cos\nsystem\n(S'touch " + str(tmp_path / "owned").encode() + b"'\ntR."
    members = [(f"k.{extension}", bomb) for extension in ("pkl", "pyd", "pickle", "pth", "npy", "pt")]
    path = tar(tmp_path / "a.tar", ("k.jpg", PICTURE), ("k.cls", b"0"), *members)
    (one,) = scan(path)
    assert one.key == "k"
    shards.index(str(tmp_path), tmp_path, "*.tar", Fields(), 1)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("damage", ["cut", "cut at a member", "header", "end", "appended"])
def test_a_damaged_shard_is_named(tmp_path: Path, damage: str) -> None:
    """webdataset and tarfile stop without an error at most of these."""
    shards.write(tmp_path, samples(6), 6, [])
    path = tmp_path / "000000.tar"
    data = bytearray(path.read_bytes())
    with tarfile.open(path) as file:
        member = file.getmembers()[6]
    if damage == "header":
        data[member.offset] ^= 1
    elif damage == "end":
        data = bytearray(bytes(data).rstrip(b"\0"))
    elif damage == "appended":
        data = data + data  # `cat a.tar b.tar`: readers stop at the end of a
    else:
        del data[member.offset + (700 if damage == "cut" else 0) :]
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"000000\.tar is damaged or cut"):
        list(scan(path))


@pytest.mark.parametrize("data", [b"", b"\x1f\x8b compressed" * 100])
def test_a_file_that_is_not_a_tar_is_named(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.tar").write_bytes(data)
    with pytest.raises(DataError, match=r"a\.tar is not a plain tar"):
        list(scan(tmp_path / "a.tar"))
